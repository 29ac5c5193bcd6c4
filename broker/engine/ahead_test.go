package engine_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine/internal/ahead"
)

// endingTarget makes secrets that end with their step by themselves, so a token that outlives the step may mint them. It
// puts the argument table into the name of the step's token.
type endingTarget struct{ *brokertest.Target }

func (b endingTarget) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	m, name, err := b.Target.Prepare(ctx, t, g)
	m.TTL = g.Expires.Sub(g.Created)
	if table, ok := g.Args.Get("table"); ok {
		text, _ := table.Text()
		name += "-" + text
	}
	return m, name, err
}

func tableArgs(t *testing.T, table string) args.Args {
	t.Helper()
	a, err := args.Parse([]byte(fmt.Sprintf(`{"table":%q}`, table)))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// newAhead is a world in which tokens are made ahead, after two steps with db.read. It counts the acts at Vault.
func newAhead(t *testing.T) (w *world, root broker.Delegation, acts *actCounter) {
	w = newWorld(t)
	w.Stop()
	w.backend = endingTarget{w.target}
	w.start(w.ledger)
	root = w.open("planner", broker.OpenRequest{})
	for range 2 {
		w.issue("planner", step(root, "db.read"))
	}
	synctest.Wait()
	acts = &actCounter{}
	w.onAct(acts, nil)
	return w, root, acts
}

// TestNoTokenAhead holds that no token is made ahead where the configuration says so.
func TestNoTokenAhead(t *testing.T) {
	for _, none := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.Stop()
			w.backend, w.noTokenAhead = endingTarget{w.target}, none
			w.start(w.ledger)
			root := w.open("planner", broker.OpenRequest{})
			for range 3 {
				w.issue("planner", step(root, "db.read"))
				synctest.Wait()
			}
			if ids := w.aheads(); (len(ids) == 0) != none {
				t.Errorf("with NoTokenAhead %v made ahead: %v", none, ids)
			}
		})
	}
}

// aheads returns the grants' ids of the recorded tokens that were made ahead, as the ledger has them.
func (w *world) aheads() (ids []broker.GrantID) {
	w.t.Helper()
	if err := w.ledger.View(ctx, func(tx broker.Tx) error {
		return tx.Scan("j/", "", func(key string, _ []byte) bool {
			ids = append(ids, broker.GrantID(key[len(key)-broker.IDLength:]))
			return true
		})
	}); err != nil {
		w.t.Fatal(err)
	}
	return ids
}

// wantNoneAhead fails the test unless no token that was made ahead is recorded, and no step's token is alive but for those
// of grants that are not CLOSED.
func (w *world) wantNoneAhead(live int) {
	w.t.Helper()
	if ids, n := w.aheads(), w.vault.Steps(); len(ids) > 0 || n != live {
		w.t.Errorf("made ahead and recorded: %v; %d tokens of steps are alive; want none and %d", ids, n, live)
	}
}

// TestTokenAhead holds that from the third step with a tool on, the step waits for one commit and one request to Vault. It
// has the id that was drawn with its token, and its handle is durable before the mint.
func TestTokenAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, root, acts := newAhead(t)
		for range 3 {
			made := w.aheads()
			if len(made) != 1 {
				t.Fatalf("made ahead: %v, want one", made)
			}
			var before []string // acts at Vault before the mint, and at it
			var mu sync.Mutex
			w.onAct(acts, func(point string) error {
				mu.Lock()
				defer mu.Unlock()
				before = append(before, point)
				if point == "mint" {
					if ops := w.durableOps(made[0]); !slices.Equal(ops, []broker.Op{broker.OpToken, broker.OpIntent, broker.OpHandle}) {
						t.Errorf("durable at the mint: %v, want the token, the intent and the handle", ops)
					}
				}
				return nil
			})
			got := w.issue("planner", step(root, "db.read"))
			synctest.Wait()
			mu.Lock()
			if got.Grant.ID != made[0] {
				t.Errorf("the step's grant is %s, want %s", got.Grant.ID, made[0])
			}
			if n := acts.of("mint"); n != 1 || slices.Index(before, "mint") > slices.Index(before, "child") {
				t.Errorf("the acts were %v, want the mint before the next token is made", before)
			}
			mu.Unlock()
			if !w.target.Login(got.Secret.Reveal()) || got.Grant.LatestEnd().Before(got.Grant.Expires) {
				t.Errorf("the secret does not work, or its latest end is %v", got.Grant.LatestEnd())
			}
			g := w.grantIn(root.Chain, got.Grant.ID)
			if end := g.Token.Expires; end.Before(g.Expires) || end.After(g.Expires.Add(2*ahead.Wait)) || g.Lease.Expires.After(g.Expires) {
				t.Errorf("the grant ends at %v, its token at %v, its lease at %v", g.Expires, end, g.Lease.Expires)
			}
		}
	})
}

// TestTokenAheadIsWorthIt holds for which steps a token is made ahead: the second of two like it, within a short time,
// whose secret ends by itself with the step.
func TestTokenAheadIsWorthIt(t *testing.T) {
	with := func(r broker.StepRequest, table string) broker.StepRequest {
		r.Args = tableArgs(t, table)
		return r
	}
	for name, row := range map[string]struct {
		steps  func(w *world, d broker.Delegation)
		target func(w *world) broker.Backend
		made   int
	}{
		"one step": {made: 0, steps: func(w *world, d broker.Delegation) { w.issue("planner", step(d, "db.read")) }},
		"two tools": {made: 0, steps: func(w *world, d broker.Delegation) {
			w.issue("planner", step(d, "db.read"))
			w.issue("planner", step(d, "db.write"))
		}},
		"two of each": {made: 2, steps: func(w *world, d broker.Delegation) {
			for range 2 {
				w.issue("planner", step(d, "db.read"))
				w.issue("planner", step(d, "db.write"))
			}
		}},
		"a long pause": {made: 0, steps: func(w *world, d broker.Delegation) {
			w.issue("planner", step(d, "db.read"))
			pass(ahead.Wait + time.Second)
			w.issue("planner", step(d, "db.read"))
		}},
		"other names": {made: 0, steps: func(w *world, d broker.Delegation) {
			w.issue("planner", with(step(d, "db.read"), "a"))
			w.issue("planner", with(step(d, "db.read"), "b"))
		}},
		"same names": {made: 1, steps: func(w *world, d broker.Delegation) {
			for range 2 {
				w.issue("planner", with(step(d, "db.read"), "a"))
			}
		}},
		"its token ends it": {made: 0, steps: func(w *world, d broker.Delegation) {
			for range 3 {
				w.issue("planner", step(d, "db.read"))
			}
		},
			target: func(w *world) broker.Backend { return w.target }},
		"a shared token": {made: 0, steps: func(w *world, d broker.Delegation) {
			for range 3 {
				w.issue("planner", step(d, "db.read"))
			}
		},
			target: func(w *world) broker.Backend { return sharedTarget{w.target} }},
		"Vault fails": {made: 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.Stop()
				if w.backend = (endingTarget{w.target}); row.target != nil {
					w.backend = row.target(w)
				}
				w.start(w.ledger)
				root := w.open("planner", broker.OpenRequest{})
				if name == "Vault fails" {
					var n atomic.Int32
					w.vault.Fail(func(point string) error {
						if point == "child" && n.Add(1) == 3 {
							return context.DeadlineExceeded
						}
						return nil
					})
					for range 2 {
						w.issue("planner", step(root, "db.read"))
					}
				} else {
					row.steps(w, root)
				}
				synctest.Wait()
				if made := w.aheads(); len(made) != row.made {
					t.Errorf("made ahead: %v, want %d", made, row.made)
				}
			})
		})
	}
}

// TestTokenAheadIsNotUsed holds when a token that was made ahead is not used: it is ended, and its id never given out.
func TestTokenAheadIsNotUsed(t *testing.T) {
	for name, row := range map[string]struct {
		before func(w *world, d broker.Delegation)
		change func(*testing.T, *broker.StepRequest)
		taken  bool
	}{
		"nothing": {taken: true},
		"its bundle was replaced": {before: func(w *world, _ broker.Delegation) {
			w.wrap = func(p *brokertest.Policy) broker.Policy { return successor{p} }
		}},
		"nobody took it in time":      {before: func(*world, broker.Delegation) { pass(ahead.Wait + time.Second) }},
		"the step is much shorter":    {change: func(_ *testing.T, r *broker.StepRequest) { r.TTL = 10 * time.Second }},
		"the token has another name":  {change: func(t *testing.T, r *broker.StepRequest) { r.Args = tableArgs(t, "a") }},
		"the delegation's token died": {before: func(w *world, d broker.Delegation) { w.killDelegation(d) }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, root, _ := newAhead(t)
				made := w.aheads()[0]
				if row.before != nil {
					row.before(w, root)
				}
				r := step(root, "db.read")
				if row.change != nil {
					row.change(t, &r)
				}
				got := w.issue("planner", r)
				if (got.Grant.ID == made) != row.taken || !w.target.Login(got.Secret.Reveal()) {
					t.Errorf("the step's grant is %s, and the token was made for %s; taken: want %v", got.Grant.ID, made, row.taken)
				}
				pass(2 * ahead.Wait)
				for range 3 {
					if again := w.issue("planner", step(root, "db.read")); again.Grant.ID == made {
						t.Errorf("the id %s was given out", made)
					}
				}
				w.revoke("chain:%s", root.Chain)
				pass(2 * time.Minute)
				w.wantAllClosed()
				w.wantNoneAhead(0)
			})
		})
	}
}

// successor is another bundle with the same tools.
type successor struct{ *brokertest.Policy }

func (successor) Digest() string { return "successor" }

// killDelegation ends the delegation's token in Vault.
func (w *world) killDelegation(d broker.Delegation) {
	w.t.Helper()
	v, err := w.Chain(ctx, d.Chain)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, token := range v.Delegations[0].Tokens {
		if err := w.vault.Kill(ctx, token.Accessor); err != nil {
			w.t.Fatal(err)
		}
	}
}

// TestTokenAheadIdle holds that a token that nobody takes is ended after a short time, while the chain lives.
func TestTokenAheadIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, root, acts := newAhead(t)
		pass(ahead.Wait * 3 / 2)
		w.wantNoneAhead(2)
		if n := acts.of("kill"); n != 1 {
			t.Errorf("%d tokens were killed, want 1", n)
		}
		w.issue("planner", step(root, "db.read"))
	})
}

// TestTokenAheadUnderAFence holds that a fence that covers the step of a token that was made ahead ends it, and is CLOSED
// only then.
func TestTokenAheadUnderAFence(t *testing.T) {
	for _, selector := range []string{"chain:CHAIN", "subtree:NODE", "tool:db.read", "spiffe:spiffe://example.org/planner"} {
		for _, down := range []bool{false, true} {
			t.Run(fmt.Sprint(selector, down), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w, root, _ := newAhead(t)
					token := w.aheadToken()
					w.vault.Fail(func(point string) error {
						if down && point == "kill" {
							return context.DeadlineExceeded
						}
						return nil
					})
					rv := w.revoke("%s", strings.NewReplacer("CHAIN", string(root.Chain), "NODE", string(root.ID)).Replace(selector))
					pass(time.Second)
					if w.vault.Alive(token) != down {
						t.Errorf("a second after the fence the token that was made ahead is alive: %v, want %v", !down, down)
					}
					if got, err := w.Revocation(ctx, rv.ID); down && (err != nil || got.Closure == broker.ClosureClosed) {
						t.Errorf("with the token alive: %+v, %v; want it not CLOSED", got, err)
					}
					w.vault.Fail(nil)
					pass(10 * time.Second)
					if w.vault.Alive(token) {
						t.Error("the token that was made ahead is alive once Vault is back")
					}
					_, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
					refused(t, "Issue", err, broker.Revoked, broker.CodeFenced)
					pass(time.Minute)
					w.wantClosure(rv, broker.ClosureClosed)
					w.wantAllClosed()
					w.wantNoneAhead(0)
				})
			})
		}
	}
}

// aheadToken returns the accessor of the token that was made ahead: the last one.
func (w *world) aheadToken() string {
	w.t.Helper()
	if n := len(w.aheads()); n != 1 {
		w.t.Fatalf("%d tokens are recorded, want 1", n)
	}
	return w.vault.Last()
}

// TestTokenAheadTakenOnce holds that of steps at the same time one has the token.
func TestTokenAheadTakenOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, root, _ := newAhead(t)
		made := w.aheads()[0]
		var took atomic.Int32
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if got := w.issue("planner", step(root, "db.read")); got.Grant.ID == made {
					took.Add(1)
				}
			})
		}
		wg.Wait()
		if n := took.Load(); n != 1 {
			t.Errorf("%d steps have the token, want 1", n)
		}
		w.revoke("chain:%s", root.Chain)
		pass(time.Minute)
		w.wantAllClosed()
		w.wantNoneAhead(0)
	})
}

// TestTokenAheadCrash crashes the broker before and after each act of the ledger, Vault and the target, during a step that
// takes a token made ahead while the next one is made, and while it is idle. After a restart none is left, and no id is
// given out again.
func TestTokenAheadCrash(t *testing.T) {
	points := map[string]bool{}
	for n := 1; ; n++ {
		finished := false
		synctest.Test(t, func(t *testing.T) {
			w, root, _ := newAhead(t)
			made := w.aheads()
			d := &crash{left: n}
			w.ledger.Fail(func(_ int, entries []broker.Entry) brokertest.Fault {
				if d.act("ledger") != nil {
					return brokertest.NotCommitted
				}
				if d.act("ledger committed") != nil {
					return brokertest.CommittedButFails
				}
				return brokertest.None
			})
			w.vault.Fail(d.act)
			w.target.Fail(d.act)
			_, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
			pass(2 * ahead.Wait)
			finished = err == nil && d.point() == ""
			points[d.point()] = true
			made = append(made, w.aheads()...)
			w.ledger.Fail(nil)
			w.target.Fail(nil)
			w.crash()
			pass(2 * time.Second)
			if ids := w.aheads(); len(ids) > 0 {
				t.Errorf("after the restart: made ahead %v, want none", ids)
			}
			for range 3 {
				if again := w.issue("planner", step(root, "db.read")); slices.Contains(made, again.Grant.ID) {
					t.Errorf("the id %s was given out again", again.Grant.ID)
				}
			}
			w.revoke("chain:%s", root.Chain)
			pass(2 * time.Minute)
			w.wantAllClosed()
			w.wantNoneAhead(0)
		})
		if t.Failed() {
			t.Fatalf("a crash at act %d", n)
		}
		if finished {
			break
		}
	}
	for _, want := range []string{"ledger", "ledger committed", "child", "child done", "mint", "mint done", "kill"} {
		if !points[want] {
			t.Errorf("no crash came at %q: %v", want, points)
		}
	}
}

// TestTokenAheadFaults fails each act once, in turn, while the process lives on. The step has a secret that works, or is
// refused as Unavailable. Everything ends.
func TestTokenAheadFaults(t *testing.T) {
	for _, fault := range []brokertest.Fault{brokertest.NotCommitted, brokertest.CommittedButFails} {
		for n := 1; n <= 16; n++ {
			synctest.Test(t, func(t *testing.T) {
				w, root, _ := newAhead(t)
				var acts atomic.Int32
				fail := func(string) error {
					if acts.Add(1) == int32(n) {
						return fmt.Errorf("fault at act %d", n)
					}
					return nil
				}
				w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault {
					if fail("") != nil {
						return fault
					}
					return brokertest.None
				})
				w.vault.Fail(fail)
				w.target.Fail(fail)
				for range 3 {
					got, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
					if broker.KindOf(err) != 0 && broker.KindOf(err) != broker.Unavailable {
						t.Fatalf("fault %v at act %d: Issue = %v, want a secret or Unavailable", fault, n, err)
					}
					if err == nil && !w.target.Login(got.Secret.Reveal()) {
						t.Fatalf("fault %v at act %d: Issue returned a secret that does not work", fault, n)
					}
					untilDurable()
				}
				pass(2 * time.Minute)
				if ids := w.aheads(); len(ids) > 0 {
					t.Errorf("fault %v at act %d: made ahead and recorded: %v, want none", fault, n, ids)
				}
				w.revoke("chain:%s", root.Chain)
				pass(2 * time.Minute)
				w.wantAllClosed()
				w.wantNoneAhead(0)
			})
		}
	}
}
