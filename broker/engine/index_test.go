package engine_test

import (
	"context"
	"crypto/rand"
	"fmt"
	mrand "math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/selector"
)

// countingLedger counts the records that are read: by key, and in scans.
type countingLedger struct {
	*brokertest.Memory
	reads   atomic.Int64
	updates atomic.Int64 // of the reads, those in updates: all other updates wait for them
}

type countingTx struct {
	broker.Tx
	reads *atomic.Int64
}

func (l *countingLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	before := l.reads.Load()
	err := l.Memory.Update(ctx, func(tx broker.Tx) error { return f(countingTx{tx, &l.reads}) })
	l.updates.Add(l.reads.Load() - before)
	return err
}

func (l *countingLedger) Order(ctx context.Context, f func(broker.Tx) error, done func(error)) error {
	before := l.reads.Load()
	err := l.Memory.Order(ctx, func(tx broker.Tx) error { return f(countingTx{tx, &l.reads}) }, done)
	l.updates.Add(l.reads.Load() - before)
	return err
}

func (l *countingLedger) View(ctx context.Context, f func(broker.Tx) error) error {
	return l.Memory.View(ctx, func(tx broker.Tx) error { return f(countingTx{tx, &l.reads}) })
}

func (tx countingTx) Get(key string) ([]byte, error) {
	tx.reads.Add(1)
	return tx.Tx.Get(key)
}

func (tx countingTx) Scan(prefix, after string, f func(string, []byte) bool) error {
	return tx.Tx.Scan(prefix, after, func(key string, value []byte) bool {
		tx.reads.Add(1)
		return f(key, value)
	})
}

func (tx countingTx) ScanBack(prefix, before string, f func(string, []byte) bool) error {
	return tx.Tx.ScanBack(prefix, before, func(key string, value []byte) bool {
		tx.reads.Add(1)
		return f(key, value)
	})
}

// count returns how many records f reads.
func (l *countingLedger) count(f func()) int64 {
	before := l.reads.Load()
	f()
	return l.reads.Load() - before
}

// newCounted is newWorld over a ledger that counts.
func newCounted(t *testing.T) (*world, *countingLedger) {
	w := newWorld(t)
	w.Stop()
	ledger := &countingLedger{Memory: w.ledger}
	w.start(ledger)
	return w, ledger
}

// scanning returns a broker over the world's ledger that has no index yet: it reads all chains.
func (w *world) scanning() *engine.Engine {
	w.t.Helper()
	b, err := engine.New(engine.Config{Ledger: w.ledger, Policy: func() broker.Policy { return w.policy }, Vault: w.vault,
		Backends: map[string]broker.Backend{"target": w.target, "keeper": staticBackend{w.target}},
		Now:      w.clock, Random: rand.Reader, SweepEvery: -1})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(b.Stop)
	return b
}

// TestPlanCostsWhatItSelects plans and revokes eight chains of one agent, beside the chains of others. The number of
// those does not matter.
func TestPlanCostsWhatItSelects(t *testing.T) {
	for _, text := range []string{
		"spiffe:spiffe://example.org/mine", "spiffe:spiffe://example.org/mine/*", `task:"my task"`, "label.team:mine",
		"tool:deploy", "tool:deploy and spiffe:spiffe://example.org/*", "vault:secret/deploy", "arg.shard:mine",
		"leaked:sha256:" + strings.Repeat("0", 64) + " or label.team:mine",
	} {
		t.Run(text, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, ledger := newCounted(t)
				deploy := w.policy.Tools["deploy"]
				deploy.Path, deploy.Arguments = brokertest.Path("secret/deploy"), map[string]broker.Parameter{"shard": {}}
				w.policy.Tools["deploy"] = deploy
				holder := "mine"
				if strings.HasSuffix(text, "mine/*") {
					holder = "mine/1"
				}
				for range 8 {
					w.open(holder, broker.OpenRequest{Task: "my task", Labels: map[string]string{"team": "mine"}})
				}
				s := selecting(t, "%s", text)
				cost := func(others int) (plan, revoke int64) {
					for i := range others {
						w.open(fmt.Sprint("other/", i), broker.OpenRequest{Rights: use("db.read"),
							Labels: map[string]string{"team": "other"}})
					}
					synctest.Wait()
					var p broker.Plan
					var err error
					plan = ledger.count(func() { p, err = w.Plan(ctx, responder, s) })
					if err != nil || p.Nodes+p.Later != 8 {
						t.Fatalf("Plan(%s) = %+v, %v; want 8 delegations", text, p, err)
					}
					revoke = ledger.count(func() {
						_, err = w.Revoke(ctx, responder, selector.Request{Selector: s, Reason: "a test", Plan: p.Token, Freeze: true})
						synctest.Wait()
					})
					if err != nil {
						t.Fatal(err)
					}
					return plan, revoke
				}
				plan, revoke := cost(8)
				if err := w.liftAll(); err != nil {
					t.Fatal(err)
				}
				if p, r := cost(500); p > plan+20 || r > revoke+20 {
					t.Errorf("beside 8 chains a plan reads %d records and a freeze %d, beside 508 chains %d and %d; want as many",
						plan, revoke, p, r)
				}
			})
		})
	}
}

// liftAll lifts all freezes, as two operators.
func (w *world) liftAll() error {
	all, err := w.Revocations(ctx)
	if err != nil {
		return err
	}
	for _, rv := range all {
		if rv.Lifted {
			continue
		}
		_, _ = w.Unfreeze(ctx, broker.Operator{Name: "first"}, rv.ID) // asks for the second
		if _, err := w.Unfreeze(ctx, broker.Operator{Name: "second"}, rv.ID); err != nil {
			return err
		}
	}
	return nil
}

// TestIndexSelectsTheSame draws chains, steps, ends and sweeps. After each, plans of drawn selectors must select the
// same with the index as without: a plan's token names its set.
func TestIndexSelectsTheSame(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.Stop()
				w.sweepEvery = 5 * time.Minute
				w.start(w.ledger)
				d := &drawnWorld{world: w, r: mrand.New(mrand.NewPCG(seed, 1))}
				for n := range 60 {
					d.act()
					synctest.Wait()
					scan := w.scanning()
					for range 6 {
						text := d.selector(2)
						s := selecting(t, "%s", text)
						got, errGot := w.Plan(ctx, responder, s)
						want, errWant := scan.Plan(ctx, responder, s)
						if !reflect.DeepEqual(got, want) || fmt.Sprint(errGot) != fmt.Sprint(errWant) {
							t.Fatalf("after %d acts, Plan(%s) = %+v, %v; without the index %+v, %v",
								n, text, got, errGot, want, errWant)
						}
					}
				}
			})
		})
	}
}

// drawnWorld draws what happens in a world.
type drawnWorld struct {
	*world
	r    *mrand.Rand
	held []drawn
}

type drawn struct {
	holder string
	broker.Delegation
}

func (d *drawnWorld) one(of ...string) string { return of[d.r.IntN(len(of))] }

func (d *drawnWorld) act() {
	caller := d.one("a/1", "a/2", "a", "b", "b/c/1")
	switch n := d.r.IntN(10); {
	case n < 3 || len(d.held) == 0:
		r := broker.OpenRequest{Task: d.one("one", "two words", "üö"), Depth: 2, Rights: use("db.read", "note"),
			TTL: time.Duration(1+d.r.IntN(180)) * time.Minute, Labels: map[string]string{d.one("env", "team"): d.one("x", "y")}}
		if d.r.IntN(3) == 0 {
			r.Rights = use("deploy", "db.write")
		}
		d.held = append(d.held, drawn{caller, d.open(caller, r)})
	case n < 5:
		from := d.held[d.r.IntN(len(d.held))]
		if child, err := d.Delegate(ctx, as(from.holder), broker.DelegateRequest{From: from.ID, To: as(caller).ID,
			Rights: from.Scope[:1], Depth: from.Depth - 1}); err == nil {
			d.held = append(d.held, drawn{caller, child})
		}
	case n < 8:
		from := d.held[d.r.IntN(len(d.held))]
		_, _ = d.Issue(ctx, as(from.holder), step(from.Delegation, from.Scope[d.r.IntN(len(from.Scope))].Tool)) // may have ended
	case n < 9:
		pass(time.Duration(d.r.IntN(50)) * time.Minute)
	default:
		pass(time.Duration(d.r.IntN(8)) * time.Hour)
		_, _ = d.Sweep(ctx) // as on its schedule
	}
}

func (d *drawnWorld) selector(depth int) string {
	if depth > 0 {
		switch d.r.IntN(6) {
		case 0:
			return "(" + d.selector(depth-1) + " and " + d.selector(depth-1) + ")"
		case 1:
			return "(" + d.selector(depth-1) + " or " + d.selector(depth-1) + ")"
		case 2:
			return "not " + d.selector(depth-1)
		}
	}
	terms := []string{"spiffe:spiffe://example.org/a/1", "spiffe:spiffe://example.org/a/*", "spiffe:spiffe://example.org/a",
		"spiffe:spiffe://example.org/*", "spiffe:spiffe://example.org/b/c/*", "task:one", `task:"two words"`,
		`task:"üö"`, "label.env:x", "label.team:y", "tool:db.read", "tool:note", "tool:deploy", "vault:kv/*", "vault:kv/notes",
		"arg.table:x", "bundle:" + d.policy.Digest(), "bundle:other", "leaked:sha256:" + strings.Repeat("0", 64),
		"until:2030-01-01T00:00:00Z"}
	if len(d.held) > 0 {
		h := d.held[d.r.IntN(len(d.held))]
		terms = append(terms, "chain:"+string(h.Chain), "subtree:"+string(h.ID))
	}
	return d.one(terms...)
}

// TestIndexIsAdded starts a broker over a ledger without an index, as an earlier build leaves it. It adds the index, and
// selects the same before, meanwhile and after.
func TestIndexIsAdded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := &drawnWorld{world: w, r: mrand.New(mrand.NewPCG(7, 7))}
		for range 80 {
			d.act()
		}
		synctest.Wait()
		w.Stop()
		want := w.dropIndex()
		w.start(w.ledger)
		s := selecting(t, "spiffe:spiffe://example.org/* or tool:note")
		before, err := w.Plan(ctx, responder, s)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		after, err := w.Plan(ctx, responder, s)
		if before.Revision = after.Revision; err != nil || !reflect.DeepEqual(before, after) {
			t.Errorf("Plan = %+v, %v; before the index was added %+v", after, err, before)
		}
		got := indexKeys(t, w.ledger)
		for _, key := range got {
			if !slices.Contains(want, key) {
				t.Errorf("the index has %s, which it did not have when it was kept as chains were opened", key)
			}
		}
		if len(got) == 0 {
			t.Error("there is no index")
		}
	})
}

// indexKeys lists the keys of the index.
// lateIndex commits the first keys of the index only once a view has begun, and that view reads only once the index is
// complete.
type lateIndex struct {
	*brokertest.Memory
	armed atomic.Bool
	begun chan struct{}
}

type indexingTx struct {
	broker.Tx
	indexes *bool
}

func (tx indexingTx) Put(key string, value []byte) error {
	*tx.indexes = *tx.indexes || strings.HasPrefix(key, "o/")
	return tx.Tx.Put(key, value)
}

func (l *lateIndex) Update(ctx context.Context, f func(broker.Tx) error) error {
	return l.Memory.Update(ctx, func(tx broker.Tx) error {
		indexes := false
		err := f(indexingTx{tx, &indexes})
		if indexes {
			<-l.begun
		}
		return err
	})
}

func (l *lateIndex) View(ctx context.Context, f func(broker.Tx) error) error {
	return l.Memory.View(ctx, func(tx broker.Tx) error {
		if l.armed.CompareAndSwap(true, false) {
			close(l.begun)
			synctest.Wait()
		}
		return f(tx)
	})
}

// TestIndexIsNewerThanAView completes the index after a plan's view has begun. The view cannot see the index, so the plan
// must not use it.
func TestIndexIsNewerThanAView(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.open("a", broker.OpenRequest{})
		synctest.Wait()
		w.Stop()
		w.dropIndex()
		l := &lateIndex{Memory: w.ledger, begun: make(chan struct{})}
		w.start(l)
		synctest.Wait()
		l.armed.Store(true)
		if p, err := w.Plan(ctx, responder, selecting(t, "spiffe:spiffe://example.org/a")); err != nil || p.Chains != 1 {
			t.Errorf("Plan beside the end of the indexing = %+v, %v; want the open chain", p, err)
		}
		l.armed.Store(false)
		if p, err := w.Plan(ctx, responder, selecting(t, "spiffe:spiffe://example.org/a")); err != nil || p.Chains != 1 {
			t.Errorf("Plan with the index = %+v, %v; want the open chain", p, err)
		}
	})
}

// dropIndex leaves the ledger as an earlier build does, and returns the keys that it had.
func (w *world) dropIndex() []string {
	w.t.Helper()
	keys := indexKeys(w.t, w.ledger)
	if err := w.ledger.Update(ctx, func(tx broker.Tx) error {
		for _, key := range keys {
			if err := tx.Put(key, nil); err != nil {
				return err
			}
		}
		_, err := tx.Append(broker.Entry{Op: broker.OpResume})
		return err
	}); err != nil {
		w.t.Fatal(err)
	}
	return keys
}

func indexKeys(t *testing.T, l broker.Ledger) (list []string) {
	t.Helper()
	if err := l.View(ctx, func(tx broker.Tx) error {
		for _, prefix := range []string{"a/", "i/", "o/", "z/"} {
			if err := tx.Scan(prefix, "", func(key string, _ []byte) bool { list = append(list, key); return true }); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return list
}

// TestIndexEnds holds that the index has no keys of chains that ended long ago, but those of static secrets.
func TestIndexEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.open("a", broker.OpenRequest{Labels: map[string]string{"env": "x"}, TTL: time.Hour})
		kept := w.open("b", broker.OpenRequest{TTL: time.Hour, Rights: use("note")})
		w.issue("b", step(kept, "note"))
		pass(3 * time.Hour)
		for range 2 {
			if _, err := w.Sweep(ctx); err != nil {
				t.Fatal(err)
			}
		}
		for _, key := range indexKeys(t, w.ledger) {
			if !strings.HasPrefix(key, "i/") || !strings.HasSuffix(key, string(kept.Chain)) {
				t.Errorf("the index still has %s", key)
			}
		}
		if p, err := w.Plan(ctx, responder, selecting(t, "tool:note")); err != nil || p.Static != 1 {
			t.Errorf("Plan = %+v, %v; want the static secret", p, err)
		}
	})
}

// TestFenceOfLaterSteps freezes a tool that many chains may use later, and none uses now. Others wait for the
// transaction of the fence, so it reads as much with many chains as with few.
func TestFenceOfLaterSteps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, ledger := newCounted(t)
		cost := func(more int) int64 {
			for range more {
				w.open("planner", broker.OpenRequest{})
			}
			before := ledger.updates.Load()
			rv, err := w.Revoke(ctx, responder, selector.Request{Selector: selecting(t, "tool:deploy"), Reason: "a test", Freeze: true})
			if err != nil || !rv.Nothing {
				t.Fatalf("Revoke = %+v, %v; want one that covers nothing yet", rv, err)
			}
			n := ledger.updates.Load() - before
			if err := w.liftAll(); err != nil {
				t.Fatal(err)
			}
			return n
		}
		if few, many := cost(10), cost(300); many > few+5 {
			t.Errorf("the transaction of a fence reads %d records beside 10 chains, and %d beside 310; want as many", few, many)
		}
	})
}
