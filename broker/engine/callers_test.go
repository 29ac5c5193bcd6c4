package engine_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/store/bolt"
)

// limited permits everything, and steps under limits. A label of a limit gets its value from the envelope.
func limited(limits ...broker.Limit) func(broker.Question) broker.Decision {
	return func(q broker.Question) broker.Decision {
		d := broker.Decision{Allow: q.Action != broker.ActionReport}
		if q.Action != broker.ActionUse {
			return d
		}
		for _, l := range limits {
			if l.Label != "" {
				l.Value = q.Chain.SignedLabels()[l.Label]
			}
			d.Limits = append(d.Limits, l)
		}
		return d
	}
}

// TestLimitOverChains lets one caller take 50 steps at once, over 25 chains, against a limit of 10 in an hour: exactly
// 10 are taken, on the real ledger, and none more after a restart.
func TestLimitOverChains(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ledger.db")
	target := brokertest.NewTarget()
	vault := brokertest.NewVault(target)
	policy := brokertest.AllowAll("db.read")
	policy.Answer = limited(broker.Limit{Policy: "p", Steps: 10, Window: time.Hour})
	start := func() (*engine.Engine, func()) {
		ledger, err := bolt.Open(bolt.Config{Path: file, Reserve: -1})
		if err != nil {
			t.Fatal(err)
		}
		b, err := engine.New(engine.Config{Ledger: ledger, Policy: func() broker.Policy { return policy }, Vault: vault,
			Backends: map[string]broker.Backend{"target": target}, Now: time.Now, Random: rand.Reader, SweepEvery: -1})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		return b, func() {
			b.Stop()
			if err := ledger.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	b, stop := start()
	var roots []broker.Delegation
	for range 25 {
		root, err := b.Open(ctx, as("agent"), broker.OpenRequest{Task: "t", Rights: use("db.read")})
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, root)
	}
	fifty := func(b *engine.Engine) (taken int) {
		var wg sync.WaitGroup
		var mu sync.Mutex // guards taken
		for i := range 50 {
			wg.Go(func() {
				_, err := b.Issue(ctx, as("agent"), step(roots[i%25], "db.read"))
				mu.Lock()
				defer mu.Unlock()
				var refusal *broker.Error
				switch {
				case err == nil:
					taken++
				case !errors.As(err, &refusal) || refusal.Code != broker.CodeCallerLimit || refusal.RetryAfter <= 0 || refusal.RetryAfter > time.Hour+time.Minute:
					t.Errorf("Issue = %v, want the limit with a time to wait", err)
				}
			})
		}
		wg.Wait()
		return taken
	}
	if n := fifty(b); n != 10 {
		t.Errorf("%d steps of 50 were taken, want exactly 10", n)
	}
	stop()
	vault = vault.Restarted()
	b, stop = start()
	defer stop()
	if n := fifty(b); n != 0 {
		t.Errorf("%d steps were taken after the restart, want none", n)
	}
}

// TestLimitCountsFor checks for whom a step counts: for its caller, and for the principal of its chain.
func TestLimitCountsFor(t *testing.T) {
	type act struct {
		opener, caller, behalf, team string
		taken                        bool
	}
	for name, row := range map[string]struct {
		limit broker.Limit
		acts  []act
	}{
		"another chain of the caller": {broker.Limit{Steps: 2}, []act{
			{"a", "a", "", "", true}, {"a", "a", "", "", true}, {"a", "a", "", "", false}, {"b", "b", "", "", true}}},
		"a delegation counts for the opener": {broker.Limit{Steps: 2}, []act{
			{"a", "b", "", "", true}, {"a", "c", "", "", true}, {"a", "a", "", "", false}, {"a", "d", "", "", false},
			{"d", "d", "", "", true}}},
		"and for the receiver": {broker.Limit{Steps: 2}, []act{
			{"a", "b", "", "", true}, {"c", "b", "", "", true}, {"b", "b", "", "", false}, {"d", "b", "", "", false}}},
		"another agent's own chain counts for whom it is": {broker.Limit{Steps: 2}, []act{
			{"a", "a", "ana", "", true}, {"b", "b", "ana", "", true}, {"c", "c", "ana", "", false}, {"c", "c", "", "", true},
			{"a", "a", "bo", "", true}, {"a", "a", "bo", "", false}}},
		"a SPIFFE ID counts as that caller": {broker.Limit{Steps: 2}, []act{
			{"b", "b", "spiffe://example.org/a", "", true}, {"c", "c", "spiffe://example.org/a", "", true}, {"a", "a", "", "", false}}},
		"by label": {broker.Limit{Steps: 1, Label: "team"}, []act{
			{"a", "a", "", "x", true}, {"a", "a", "", "x", false}, {"a", "a", "", "y", true}, {"a", "a", "", "y", false}}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				row.limit.Policy, row.limit.Window = "p", time.Hour
				w.policy.Answer = limited(row.limit)
				w.policy.Envelopes = map[string]broker.Envelope{}
				for i, a := range row.acts {
					r := broker.OpenRequest{Depth: 1}
					if a.behalf != "" || a.team != "" {
						r.Envelope = fmt.Sprint(i)
						w.policy.Envelopes[r.Envelope] = broker.Envelope{Issuer: "desk", Behalf: a.behalf,
							Labels: map[string]string{"team": a.team}, Expires: time.Now().Add(time.Hour)}
					}
					d := w.open(a.opener, r)
					if a.caller != a.opener {
						var err error
						d, err = w.Delegate(ctx, as(a.opener), broker.DelegateRequest{From: d.ID, To: as(a.caller).ID, Rights: use("db.read")})
						if err != nil {
							t.Fatal(err)
						}
					}
					_, err := w.Issue(ctx, as(a.caller), step(d, "db.read"))
					if a.taken && err != nil {
						t.Fatalf("step %d = %v, want a secret", i, err)
					}
					if !a.taken {
						refused(t, fmt.Sprintf("step %d", i), err, broker.Denied, broker.CodeCallerLimit)
					}
				}
			})
		})
	}
}

// TestLimitDoesNotCount checks what does not count: refusals, a canary, and an idempotency key that is used again. And
// that the limit frees when the window has passed.
func TestLimitDoesNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		allow := limited(broker.Limit{Policy: "p", Steps: 2, Window: time.Hour})
		w.policy.Answer = func(q broker.Question) broker.Decision {
			if q.Tool.Name == "deploy" && q.Action == broker.ActionUse {
				return broker.Decision{}
			}
			return allow(q)
		}
		canary := w.policy.Tools["db.read"]
		canary.Name, canary.Canary = "bait", true
		w.policy.Tools["bait"] = canary
		root := w.open("agent", broker.OpenRequest{})
		keyed := step(root, "db.read")
		keyed.Key = "once"
		w.issue("agent", keyed)
		for range 5 {
			if again := w.issue("agent", keyed); !again.Repeated {
				t.Fatal("a repeated key made another step")
			}
			if _, err := w.Issue(ctx, as("agent"), step(root, "deploy")); err == nil {
				t.Fatal("a denied step was taken")
			}
			if _, err := w.Issue(ctx, as("agent"), step(root, "bait")); err == nil {
				t.Fatal("a canary was handed out")
			}
		}
		w.issue("agent", step(root, "db.read"))
		_, err := w.Issue(ctx, as("agent"), step(root, "db.read"))
		refused(t, "a third step", err, broker.Denied, broker.CodeCallerLimit)
		var refusal *broker.Error
		errors.As(err, &refusal)
		pass(refusal.RetryAfter)
		w.issue("agent", step(w.open("agent", broker.OpenRequest{}), "db.read"))
	})
}

// callerPolicy is a policy with rules over the history of a caller.
type callerPolicy struct {
	*brokertest.Policy
	windows []time.Duration
}

func (p callerPolicy) CallerWindows() []time.Duration { return p.windows }

// TestCallerHistory checks "never deploy after db.read" over chains: for the caller, for the opener of another's step,
// and within the window alone. A race of both over two chains never ends with both taken in the wrong order.
func TestCallerHistory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.policy.Answer = func(q broker.Question) broker.Decision {
			_, read := q.CallerHistory[time.Hour]["db.read"]
			return broker.Decision{Allow: q.Action != broker.ActionReport && !(q.Action == broker.ActionUse && q.Tool.Name == "deploy" && read)}
		}
		w.wrap = func(p *brokertest.Policy) broker.Policy { return callerPolicy{p, []time.Duration{time.Hour}} }
		w.issue("a", step(w.open("a", broker.OpenRequest{}), "deploy"))
		w.issue("a", step(w.open("a", broker.OpenRequest{}), "db.read"))
		for name, try := range map[string]func() error{
			"in another chain": func() error {
				_, err := w.Issue(ctx, as("a"), step(w.open("a", broker.OpenRequest{}), "deploy"))
				return err
			},
			"by another agent in its chain": func() error {
				d, err := w.Delegate(ctx, as("a"), broker.DelegateRequest{From: w.open("a", broker.OpenRequest{Depth: 1}).ID, To: as("b").ID, Rights: use("deploy")})
				if err != nil {
					t.Fatal(err)
				}
				_, err = w.Issue(ctx, as("b"), step(d, "deploy"))
				return err
			},
			"in another's chain": func() error {
				d, err := w.Delegate(ctx, as("c"), broker.DelegateRequest{From: w.open("c", broker.OpenRequest{Depth: 1}).ID, To: as("a").ID, Rights: use("deploy")})
				if err != nil {
					t.Fatal(err)
				}
				_, err = w.Issue(ctx, as("a"), step(d, "deploy"))
				return err
			},
		} {
			refused(t, name, try(), broker.Denied, broker.CodePolicyDenied)
		}
		w.issue("d", step(w.open("d", broker.OpenRequest{}), "deploy"))
		pass(time.Hour + time.Minute)
		w.issue("a", step(w.open("a", broker.OpenRequest{}), "deploy"))

		// The race: ten callers with a step of each kind in a chain of its own.
		for i := range 10 {
			name := fmt.Sprintf("racer%d", i)
			one, two := w.open(name, broker.OpenRequest{}), w.open(name, broker.OpenRequest{})
			var wg sync.WaitGroup
			wg.Go(func() { _, _ = w.Issue(ctx, as(name), step(one, "db.read")) }) // the entries below are judged
			wg.Go(func() { _, _ = w.Issue(ctx, as(name), step(two, "deploy")) })
			wg.Wait()
		}
		var order strings.Builder
		read := map[string]bool{}
		for _, e := range w.recorded(broker.OpIntent) {
			fmt.Fprintln(&order, e.Actor, e.Tool)
			if strings.Contains(e.Actor, "racer") && e.Tool == "deploy" && read[e.Actor] {
				t.Errorf("%s deployed after it had read:\n%s", e.Actor, order.String())
			}
			read[e.Actor] = read[e.Actor] || e.Tool == "db.read"
		}
	})
}

// TestNothingIsKeptWithoutNeed checks that a step writes no record of its caller when no policy needs one, and that the
// records of callers that are gone are dropped.
func TestNothingIsKeptWithoutNeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("agent", broker.OpenRequest{TTL: 24 * time.Hour})
		w.issue("agent", step(root, "db.read"))
		if n := w.tallies(); n != 0 {
			t.Errorf("%d records without a policy over callers, want none", n)
		}
		w.policy.Answer = limited(broker.Limit{Policy: "p", Steps: 1000, Window: time.Hour})
		for i := range 40 {
			name := fmt.Sprintf("agent%d", i)
			w.issue(name, step(w.open(name, broker.OpenRequest{}), "db.read"))
		}
		if n := w.tallies(); n != 40 {
			t.Errorf("%d records of 40 callers, want one each", n)
		}
		pass(broker.MaxWindow + 2*time.Hour)
		for i := range 20 {
			name := fmt.Sprintf("later%d", i)
			w.issue(name, step(w.open(name, broker.OpenRequest{}), "db.read"))
		}
		if n := w.tallies(); n > 25 {
			t.Errorf("%d records, want those of the 20 present callers and a few", n)
		}
	})
}

func (w *world) tallies() (n int) {
	if err := w.ledger.View(context.Background(), func(tx broker.Tx) error {
		return tx.Scan("q/", "", func(string, []byte) bool { n++; return true })
	}); err != nil {
		w.t.Fatal(err)
	}
	return n
}
