package engine_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// durableOps returns the ops of the grant's durable entries.
func (w *world) durableOps(id broker.GrantID) (ops []broker.Op) {
	w.t.Helper()
	entries, err := w.ledger.Entries(ctx, 0, 10_000)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		if e.Grant == id {
			ops = append(ops, e.Op)
		}
	}
	return ops
}

// untilDurable waits until the ordered changes are durable.
func untilDurable() {
	pass(broker.MaxOrderDelay)
	synctest.Wait()
}

// crash ends the process, and starts the next one on the durable changes.
func (w *world) crash() {
	w.t.Helper()
	next := w.ledger.Crash()
	w.Stop()
	w.ledger, w.vault = next, w.vault.Restarted()
	w.start(w.ledger)
}

// commitCounter counts the commits that a step waits for.
type commitCounter struct {
	*brokertest.Memory
	waited, ordered int
}

func (l *commitCounter) Update(ctx context.Context, f func(broker.Tx) error) error {
	l.waited++
	return l.Memory.Update(ctx, f)
}

func (l *commitCounter) Order(ctx context.Context, f func(broker.Tx) error, done func(error)) error {
	l.ordered++
	return l.Memory.Order(ctx, f, done)
}

// TestOneCommitForAStep holds that a step waits for one commit once its delegation has a token, and that this commit is
// durable, with the intent in the audit log, before anything is minted.
func TestOneCommitForAStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Stop()
		l := &commitCounter{Memory: w.ledger}
		w.start(l)
		root := w.open("planner", broker.OpenRequest{})
		w.issue("planner", step(root, "db.read"))
		l.waited, l.ordered = 0, 0
		atMint := 0
		w.vault.Fail(func(point string) error {
			if point == "mint" {
				atMint++
				entries, err := w.ledger.Entries(ctx, 0, 10_000)
				if n := len(entries); err != nil || entries[n-1].Op != broker.OpHandle || entries[n-2].Op != broker.OpIntent {
					t.Errorf("the last durable entry before the mint = %+v, %v; want the handle, after the intent", entries[n-1], err)
				}
			}
			return nil
		})
		got := w.issue("planner", step(root, "db.read"))
		if l.waited != 1 || l.ordered != 1 || atMint != 1 {
			t.Errorf("the step waited for %d commits and ordered %d, with %d mints; want 1 of each", l.waited, l.ordered, atMint)
		}
		if ops := w.durableOps(got.Grant.ID); !slices.Equal(ops, []broker.Op{broker.OpIntent, broker.OpHandle}) {
			t.Errorf("durable at the hand-over: %v, want the intent and the handle", ops)
		}
		untilDurable()
		if ops := w.durableOps(got.Grant.ID); !slices.Equal(ops, []broker.Op{broker.OpIntent, broker.OpHandle, broker.OpIssued}) {
			t.Errorf("durable %v later: %v, want these and ISSUED", broker.MaxOrderDelay, ops)
		}
	})
}

// TestCrashBeforeIssuedIsDurable crashes the broker after it has handed a secret over, and before the record of that is
// durable. The ledger has a HANDLE with a latest end that is true, and the next process ends the secret. For the first
// step of a delegation the handle is recorded after the intent, for the second one with it.
func TestCrashBeforeIssuedIsDurable(t *testing.T) {
	for first, n := range map[string]int{"first step": 0, "second step": 1} {
		t.Run(first, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				root := w.open("planner", broker.OpenRequest{})
				for range n {
					w.issue("planner", step(root, "db.read"))
				}
				got := w.issue("planner", step(root, "db.read"))
				if g := w.grantIn(root.Chain, got.Grant.ID); g.State != broker.StateIssued {
					t.Fatalf("the grant is %s for readers, want ISSUED", g.State)
				}
				w.crash()
				g := w.grantIn(root.Chain, got.Grant.ID)
				if g.State != broker.StateHandle || g.Token.Accessor == "" || g.LatestEnd().Before(got.Grant.LatestEnd()) {
					t.Errorf("after the crash = %s, latest end %v; want HANDLE and %v or later", g.State, g.LatestEnd(), got.Grant.LatestEnd())
				}
				pass(time.Second)
				if w.target.Login(got.Secret.Reveal()) {
					t.Error("the secret works a second after the restart")
				}
				if g := w.grantIn(root.Chain, got.Grant.ID); g.State == broker.StateClosed {
					t.Error("the grant is CLOSED while, for all that the ledger knows, its mint may be under way")
				}
				pass(2 * time.Minute)
				w.wantAllClosed()
				w.issue("planner", step(root, "db.read")) // the chain is still usable
			})
		})
	}
}

func (w *world) grantIn(chain broker.ChainID, id broker.GrantID) broker.Grant {
	w.t.Helper()
	v, err := w.Chain(ctx, chain)
	at := slices.IndexFunc(v.Grants, func(g broker.Grant) bool { return g.ID == id })
	if err != nil || at < 0 {
		w.t.Fatalf("Chain = %+v, %v; want the grant %s", v.Grants, err, id)
	}
	return v.Grants[at]
}

// TestFenceIsDurableWithIssued crashes the broker right after the acknowledgement of a fence. The fence is there, and so
// is each ISSUED that was ordered before it.
func TestFenceIsDurableWithIssued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{})
		got := w.issue("planner", step(root, "db.read"))
		rv := w.revoke("chain:%s", root.Chain)
		ops := w.durableOps(got.Grant.ID)
		w.crash()
		if !slices.Contains(ops, broker.OpIssued) {
			t.Errorf("durable at the acknowledgement: %v, want ISSUED among it", ops)
		}
		_, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
		refused(t, "Issue after the crash", err, broker.Revoked, broker.CodeFenced)
		pass(time.Minute)
		w.wantClosure(rv, broker.ClosureClosed)
		w.wantAllClosed()
	})
}

// TestLostIssued fails the write of ISSUED after the secret was handed over, with nothing committed and with an unknown
// outcome. The broker raises an alarm and ends the secret at once.
func TestLostIssued(t *testing.T) {
	for _, fault := range []brokertest.Fault{brokertest.NotCommitted, brokertest.CommittedButFails} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			root := w.open("planner", broker.OpenRequest{})
			w.issue("planner", step(root, "db.read"))
			untilDurable()
			w.ledger.Fail(func(_ int, entries []broker.Entry) brokertest.Fault {
				if entries[0].Op == broker.OpIssued {
					return fault
				}
				return brokertest.None
			})
			got := w.issue("planner", step(root, "db.read"))
			if !w.target.Login(got.Secret.Reveal()) {
				t.Fatal("the secret does not work")
			}
			pass(time.Second)
			if w.target.Login(got.Secret.Reveal()) {
				t.Errorf("fault %d: the secret works a second after its record failed", fault)
			}
			if n := w.countAlarms("recording a secret that was handed out"); n != 1 {
				t.Errorf("fault %d: %d alarms, want 1", fault, n)
			}
			pass(10 * time.Second)
			if g := w.grantIn(root.Chain, got.Grant.ID); g.State != broker.StateClosed || g.Ending != broker.EndingFailed {
				t.Errorf("fault %d: the grant is %s, %s; want CLOSED, failed", fault, g.State, g.Ending)
			}
			pass(2 * time.Minute)
			w.wantAllClosed()
		})
	}
}

// namedTarget makes secrets that only their answer names.
type namedTarget struct{ *brokertest.Target }

func (b namedTarget) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	m, name, err := b.Target.Prepare(ctx, t, g)
	m.Named = true
	return m, name, err
}

// outlivingVault makes secrets with which an agent can obtain what outlives them.
type outlivingVault struct{ *brokertest.Vault }

func (v outlivingVault) Mint(ctx context.Context, h broker.Handle, m broker.Mint) (broker.Lease, broker.Secret, error) {
	lease, secret, err := v.Vault.Mint(ctx, h, m)
	lease.Outlives = lease.Expires.Add(time.Minute)
	return lease, secret, err
}

// TestLeaseThatIsNeeded holds that ISSUED is durable before the hand-over where only the lease can end or bound it.
func TestLeaseThatIsNeeded(t *testing.T) {
	for name, change := range map[string]func(*world){
		"named":    func(w *world) { w.backend = namedTarget{w.target} },
		"outlives": func(w *world) { w.brokerVault = outlivingVault{w.vault} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.Stop()
				change(w)
				w.start(w.ledger)
				root := w.open("planner", broker.OpenRequest{})
				got := w.issue("planner", step(root, "db.read"))
				if ops := w.durableOps(got.Grant.ID); !slices.Contains(ops, broker.OpIssued) {
					t.Errorf("durable at the hand-over: %v, want ISSUED among it", ops)
				}
			})
		})
	}
}

// blindBackend has a target that cannot be asked.
type blindBackend struct{ t *brokertest.Target }

func (b blindBackend) Load(t broker.Tool) error { return b.t.Load(t) }

func (b blindBackend) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	return b.t.Prepare(ctx, t, g)
}

// TestUnrecordedSecretLives holds that a HANDLE is not called dead while a secret may live that was handed over before a
// crash, where neither a lease nor the target shows its end.
func TestUnrecordedSecretLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Stop()
		w.backend = blindBackend{w.target}
		w.start(w.ledger)
		root := w.open("planner", broker.OpenRequest{})
		got := w.issue("planner", step(root, "db.read"))
		w.crash()
		pass(time.Until(got.Grant.LatestEnd()) - time.Second)
		g := w.grantIn(root.Chain, got.Grant.ID)
		if g.State != broker.StateHandle || g.Outcome == broker.OutcomeDead {
			t.Errorf("a second before the secret's end the grant is %s, %v; want HANDLE, not dead", g.State, g.Outcome)
		}
		pass(20 * time.Minute) // past the longest life of a secret at this target
		w.wantAllClosed()
	})
}
