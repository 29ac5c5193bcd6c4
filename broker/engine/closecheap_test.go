package engine_test

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// putCounter counts the transactions that change something, and the records that they put, by family.
type putCounter struct {
	*brokertest.Memory

	mu      sync.Mutex // guards the fields below
	updates int
	orders  int
	puts    map[string]int
	hold    chan struct{} // the next Update waits until it is closed; nil: none waits
}

func (l *putCounter) Update(ctx context.Context, f func(broker.Tx) error) error {
	l.mu.Lock()
	hold := l.hold
	l.mu.Unlock()
	if hold != nil {
		<-hold
	}
	return l.Memory.Update(ctx, l.counting(&l.updates, f))
}

func (l *putCounter) Order(ctx context.Context, f func(broker.Tx) error, done func(error)) error {
	return l.Memory.Order(ctx, l.counting(&l.orders, f), done)
}

func (l *putCounter) counting(n *int, f func(broker.Tx) error) func(broker.Tx) error {
	return func(tx broker.Tx) error {
		counted := &countedTx{Tx: tx, puts: map[string]int{}}
		err := f(counted)
		l.mu.Lock()
		defer l.mu.Unlock()
		if err == nil && len(counted.puts) > 0 {
			*n++
			for family, n := range counted.puts {
				l.puts[family] += n
			}
		}
		return err
	}
}

// reset begins to count anew. Updates wait from now on until the returned channel is closed, if held is set.
func (l *putCounter) reset(held bool) chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.updates, l.orders, l.puts, l.hold = 0, 0, map[string]int{}, nil
	if held {
		l.hold = make(chan struct{})
	}
	return l.hold
}

func (l *putCounter) counted() (updates, orders int, puts map[string]int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.updates, l.orders, maps.Clone(l.puts)
}

type countedTx struct {
	broker.Tx
	puts map[string]int
}

func (t *countedTx) Put(key string, value []byte) error {
	family, _, _ := strings.Cut(key, "/")
	t.puts[family]++
	return t.Tx.Put(key, value)
}

// newCheap is a world with secrets without a lease, and a ledger that counts.
func newCheap(t *testing.T) (*world, *putCounter) {
	w := newWorld(t)
	w.Stop()
	w.backend = sharedTarget{w.target}
	l := &putCounter{Memory: w.ledger, puts: map[string]int{}}
	w.start(l)
	return w, l
}

// TestCloseIsOneRecord holds that the end of a step without a lease costs one transaction, one record of its grant and
// one entry of the audit log, which names the agent. The step's place in the budget is given back in it.
func TestCloseIsOneRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, l := newCheap(t)
		root := w.open("planner", broker.OpenRequest{Budget: broker.Budget{Live: 1}})
		for range 2 { // the second step has the place of the first
			got := w.issue("planner", step(root, "db.read"))
			untilDurable()
			l.reset(false)
			g, err := w.Close(ctx, as("planner"), got.Grant.ID)
			if err != nil || g.State != broker.StateClosed || g.Ending != broker.EndingClosed || g.Outcome != broker.OutcomeDead {
				t.Fatalf("Close = %+v, %v; want it CLOSED, closed and dead", g, err)
			}
			updates, orders, puts := l.counted()
			want := map[string]int{"g": 1, "l": 1, "p": 1, "u": 1, "e": 1} // the grant, two lists, the budget, the entry's list
			if updates != 1 || orders != 0 || !maps.Equal(puts, want) {
				t.Errorf("Close made %d updates and %d orders with the records %v; want 1, 0 and %v", updates, orders, puts, want)
			}
			if ops := w.durableOps(got.Grant.ID); !slices.Equal(ops, []broker.Op{broker.OpIntent, broker.OpHandle, broker.OpIssued, broker.OpClosed}) {
				t.Errorf("durable at the answer: %v, want CLOSED to follow ISSUED", ops)
			}
			entries, err := w.ledger.Entries(ctx, 0, 10_000)
			if last := entries[len(entries)-1]; err != nil || last.Actor != as("planner").ID.String() || last.Detail != "closed, dead" {
				t.Errorf("the last entry = %+v, %v; want it by the agent: closed, dead", last, err)
			}
		}
		w.wantAllClosed()
	})
}

// TestClosesShareATransaction holds that closes that come while the ledger is busy share a transaction.
func TestClosesShareATransaction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 32
		w, l := newCheap(t)
		root := w.open("planner", broker.OpenRequest{})
		var ids []broker.GrantID
		for range n {
			ids = append(ids, w.issue("planner", step(root, "db.read")).Grant.ID)
		}
		untilDurable()
		busy := l.reset(true)
		var closes sync.WaitGroup
		for _, id := range ids {
			closes.Go(func() {
				if g, err := w.Close(ctx, as("planner"), id); err != nil || g.State != broker.StateClosed {
					t.Errorf("Close = %s, %v; want CLOSED", g.State, err)
				}
			})
		}
		synctest.Wait()
		close(busy)
		closes.Wait()
		updates, orders, puts := l.counted()
		if updates+orders > 2 || puts["g"] != n || puts["u"] > 2 {
			t.Errorf("%d closes made %d transactions, %d records of grants and %d of the budget; want at most 2, %[1]d and 2",
				n, updates+orders, puts["g"], puts["u"])
		}
		w.wantAllClosed()
	})
}

// TestEndsAreOrdered holds that nothing waits for the record of a grant that ends without its agent, and that it is
// durable soon.
func TestEndsAreOrdered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, l := newCheap(t)
		root := w.open("planner", broker.OpenRequest{})
		var last broker.Grant
		for range 8 {
			last = w.issue("planner", step(root, "db.read")).Grant
		}
		untilDurable()
		l.reset(false)
		pass(time.Until(last.Expires) + time.Second)
		updates, orders, puts := l.counted()
		if updates != 0 || orders != 1 || puts["g"] != 8 {
			t.Errorf("8 ends at one time made %d updates, %d orders and %d records of grants; want 0, 1 and 8",
				updates, orders, puts["g"])
		}
		w.crash()
		if g := w.grantIn(root.Chain, last.ID); g.State != broker.StateClosed || g.Ending != broker.EndingExpired {
			t.Errorf("after a crash a second later the grant is %s, %s; want CLOSED, expired", g.State, g.Ending)
		}
		w.wantAllClosed()
	})
}

// TestCrashWhileClosing crashes the broker between the end of a secret at its target and the record of that. Its agent has
// no answer. The ledger has the grant as ISSUED, with its end, and the next process ends it then.
func TestCrashWhileClosing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, l := newCheap(t)
		root := w.open("planner", broker.OpenRequest{Budget: broker.Budget{Live: 1}})
		got := w.issue("planner", step(root, "db.read"))
		untilDurable()
		busy := l.reset(true)
		answered := make(chan error, 1)
		go func() {
			_, err := w.Close(ctx, as("planner"), got.Grant.ID)
			answered <- err
		}()
		synctest.Wait()
		if active, err := w.Active(ctx, got.Grant.ID); err != nil || active {
			t.Errorf("Active while the step is closed = %v, %v; want no", active, err)
		}
		if alive := w.target.Alive(); len(alive) > 0 {
			t.Error("the secret works while its end waits for the ledger")
		}
		next := w.ledger.Crash()
		close(busy)
		if err := <-answered; err == nil {
			t.Error("Close was answered without an error, and its record is lost")
		}
		w.Stop()
		w.ledger, w.vault = next, w.vault.Restarted()
		w.start(w.ledger)
		if g := w.grantIn(root.Chain, got.Grant.ID); g.State != broker.StateIssued || g.LatestEnd().Before(got.Grant.LatestEnd()) {
			t.Errorf("after the crash = %s until %v; want ISSUED until %v", g.State, g.LatestEnd(), got.Grant.LatestEnd())
		}
		pass(time.Until(got.Grant.Expires) + 10*time.Second)
		w.wantAllClosed()
		w.issue("planner", step(root, "db.read"))
	})
}

// TestCloseIsDurable fails the first write of CLOSED, with nothing committed and with an unknown outcome. The secret ends
// all the same, and a grant that is answered as CLOSED is CLOSED after a crash.
func TestCloseIsDurable(t *testing.T) {
	for _, fault := range []brokertest.Fault{brokertest.None, brokertest.NotCommitted, brokertest.CommittedButFails} {
		synctest.Test(t, func(t *testing.T) {
			w, _ := newCheap(t)
			root := w.open("planner", broker.OpenRequest{})
			got := w.issue("planner", step(root, "db.read"))
			untilDurable()
			failed := false
			w.ledger.Fail(func(_ int, entries []broker.Entry) brokertest.Fault {
				if failed || entries[0].Op != broker.OpClosed {
					return brokertest.None
				}
				failed = true
				return fault
			})
			g, err := w.Close(ctx, as("planner"), got.Grant.ID)
			if err != nil || g.State != broker.StateClosed {
				t.Errorf("fault %d: Close = %s, %v; want CLOSED", fault, g.State, err)
			}
			if w.target.Login(got.Secret.Reveal()) {
				t.Errorf("fault %d: the secret works", fault)
			}
			w.crash()
			if now := w.grantIn(root.Chain, g.ID); now.State != broker.StateClosed || now.Ending != broker.EndingClosed {
				t.Errorf("fault %d: after a crash it is %s, %q; want CLOSED, closed", fault, now.State, now.Ending)
			}
			w.wantAllClosed()
		})
	}
}

// TestLostEnds fails the ordered write of the end of an expired grant. It is written again.
func TestLostEnds(t *testing.T) {
	for _, fault := range []brokertest.Fault{brokertest.NotCommitted, brokertest.CommittedButFails} {
		synctest.Test(t, func(t *testing.T) {
			w, _ := newCheap(t)
			root := w.open("planner", broker.OpenRequest{Budget: broker.Budget{Live: 1}})
			got := w.issue("planner", step(root, "db.read"))
			untilDurable()
			failed := 0
			w.ledger.Fail(func(_ int, entries []broker.Entry) brokertest.Fault {
				if entries[0].Op != broker.OpClosed || failed > 2 {
					return brokertest.None
				}
				failed++
				return fault
			})
			pass(time.Until(got.Grant.Expires) + 10*time.Second)
			if failed == 0 || w.countAlarms("recording closed grants") != failed {
				t.Errorf("fault %d: %d writes failed with %d alarms", fault, failed, w.countAlarms("recording closed grants"))
			}
			w.crash()
			w.wantAllClosed()
			w.issue("planner", step(root, "db.read"))
		})
	}
}

// slowTarget is a target that takes long to sever.
type slowTarget struct {
	sharedTarget
	busy chan struct{} // until it is closed
}

func (b slowTarget) Sever(ctx context.Context, grants []broker.Grant) error {
	select {
	case <-b.busy:
		return b.sharedTarget.Sever(ctx, grants)
	case <-ctx.Done():
		return errors.New("no answer")
	}
}

// TestCloseAtASlowTarget holds that the end of a step is recorded soon, while its target takes long to end the secret.
func TestCloseAtASlowTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Stop()
		busy := make(chan struct{})
		w.backend = slowTarget{sharedTarget{w.target}, busy}
		w.start(w.ledger)
		root := w.open("planner", broker.OpenRequest{})
		got := w.issue("planner", step(root, "db.read"))
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		g, err := w.Close(short, as("planner"), got.Grant.ID)
		if err != nil || g.State != broker.StateIssued || g.Ending != broker.EndingClosed {
			t.Errorf("Close = %s, %q, %v; want ISSUED, with its end recorded", g.State, g.Ending, err)
		}
		if ops := w.durableOps(got.Grant.ID); !slices.Contains(ops, broker.OpEnd) {
			t.Errorf("durable at the answer: %v, want the end among it", ops)
		}
		close(busy)
		pass(10 * time.Second)
		w.wantAllClosed()
	})
}
