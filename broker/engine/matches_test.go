package engine_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/selector"
)

func (w *world) tryRevoke(freeze bool, format string, args ...any) (broker.Revocation, error) {
	w.t.Helper()
	return w.Revoke(ctx, responder, selector.Request{Selector: selecting(w.t, format, args...), Reason: "a test", Freeze: freeze})
}

// rules counts the rules that every transaction reads, and records the revocations.
func (w *world) countRecords() (rules, revocations int) {
	w.t.Helper()
	if err := w.ledger.View(ctx, func(tx broker.Tx) error {
		if err := tx.Scan("f/", "", func(string, []byte) bool { rules++; return true }); err != nil {
			return err
		}
		return tx.Scan("r/", "", func(string, []byte) bool { revocations++; return true })
	}); err != nil {
		w.t.Fatal(err)
	}
	return rules, revocations
}

// TestRulesThatMatchNothing: a final rule that no open thing and no step still to come can fall under is refused, not
// answered CLOSED; a freeze is about later chains as well, and says that it covers nothing yet.
func TestRulesThatMatchNothing(t *testing.T) {
	for _, row := range []struct {
		selector               string
		final, nothing, frozen bool // accepted as final; covers nothing now; the freeze covers nothing now
	}{
		{"tool:typo", false, true, true},
		{"tool:note", false, true, true}, // a tool that nobody who is open holds
		{"spiffe:spiffe://example.org/nobody", false, true, true},
		{"spiffe:spiffe://example.org/over", false, true, true}, // held a chain that is over
		{"spiffe:spiffe://example.org/fenced", false, true, true},
		{"tool:deploy", true, true, true}, // root may still take such a step
		{"tool:deploy and arg.table:users", true, true, true},
		{"tool:deploy and arg.tabel:users", false, true, true}, // no argument of that name
		{"tool:deploy and vault:other/*", false, true, true},
		{"tool:deploy and until:2000-01-01T00:00:00Z", false, true, true},
		{"tool:deploy and since:2100-01-01T00:00:00Z", true, true, true},
		{"bundle:old", false, true, true},
		{"bundle:test and not tool:db.read", true, true, true},
		{"tool:db.read", true, false, false},
		{"spiffe:spiffe://example.org/root", true, false, false},
	} {
		t.Run(row.selector, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.open("over", broker.OpenRequest{TTL: time.Minute})
				w.revoke("chain:%s", w.open("fenced", broker.OpenRequest{}).Chain)
				pass(2 * time.Minute)
				root := w.open("root", broker.OpenRequest{})
				w.issue("root", step(root, "db.read"))
				_, before := w.countRecords()
				if rv, err := w.tryRevoke(false, "%s", row.selector); row.final {
					if err != nil || rv.Nothing != row.nothing {
						t.Errorf("Revoke = %+v, %v; want it fenced, covering nothing now: %v", rv, err, row.nothing)
					}
				} else {
					refused(t, "Revoke", err, broker.NotFound, broker.CodeSelectorEmpty)
					if _, after := w.countRecords(); after != before {
						t.Error("a refused revocation was written")
					}
				}
			})
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.issue("root", step(w.open("root", broker.OpenRequest{}), "db.read"))
				if rv, err := w.tryRevoke(true, "%s", row.selector); err != nil || rv.Nothing != row.frozen {
					t.Errorf("freeze = %+v, %v; want it in force, covering nothing now: %v", rv, err, row.frozen)
				}
			})
		})
	}
}

// TestRepeatedCommands: the same command answers with the revocation that stands, so that what is repeated
// without end (by an operator, a signal, or a thief with a delegation that is not his) writes no more.
func TestRepeatedCommands(t *testing.T) {
	for _, row := range []struct {
		name, selector string // %s is the chain, subtree or grant
		freeze         bool
	}{
		{"a chain", "chain:%[1]s", false}, {"a chain, frozen", "chain:%[1]s", true},
		{"a subtree", "subtree:%[2]s", false}, {"a grant", "grant:%[3]s", false}, {"a grant, frozen", "grant:%[3]s", true},
		{"a rule", "tool:db.read%.0[1]s", false}, {"a rule, frozen", "tool:db.read%.0[1]s", true},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				root := w.open("root", broker.OpenRequest{})
				got := w.issue("root", step(root, "db.read"))
				ask := func() broker.Revocation {
					t.Helper()
					rv, err := w.tryRevoke(row.freeze, row.selector+"%.0[1]s%.0[2]s%.0[3]s", root.Chain, root.ID, got.Grant.ID)
					if err != nil {
						t.Fatal(err)
					}
					return rv
				}
				first := ask()
				rules, revocations := w.countRecords()
				for range 10 {
					pass(time.Second)
					if rv := ask(); rv.ID != first.ID || !rv.Repeated || first.Repeated {
						t.Errorf("repeated: %+v, want %s as it stands", rv, first.ID)
					}
				}
				if r, n := w.countRecords(); r != rules || n != revocations {
					t.Errorf("%d rules and %d revocations, want %d and %d as after the first", r, n, rules, revocations)
				}
			})
		})
	}
}

// TestRepeatedRuleCoversNewChains: a final rule is about what was open, so the same command later is another
// one when there are other chains, and takes the first one's place among the rules.
func TestRepeatedRuleCoversNewChains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		old := w.open("root", broker.OpenRequest{})
		w.issue("root", step(old, "db.read"))
		first := w.revoke("tool:db.read")
		pass(time.Second)
		later := w.open("root", broker.OpenRequest{})
		got := w.issue("root", step(later, "db.read"))
		second := w.revoke("tool:db.read")
		if second.ID == first.ID || second.Repeated {
			t.Fatalf("Revoke with a new chain = %+v, want a revocation of its own", second)
		}
		if rules, _ := w.countRecords(); rules != 1 {
			t.Errorf("%d rules, want the second in place of the first", rules)
		}
		for _, d := range []broker.Delegation{old, later} {
			_, err := w.Issue(ctx, as("root"), step(d, "db.read"))
			refused(t, "Issue", err, broker.Revoked, broker.CodeFenced)
		}
		pass(time.Second)
		if w.target.Login(got.Secret.Reveal()) {
			t.Error("the secret of the new chain works")
		}
		w.wantClosure(first, broker.ClosureClosed)
		w.wantClosure(second, broker.ClosureClosed)
	})
}

// TestThiefAddsNoRecords: a request with somebody else's delegation fences its chain and freezes the thief, once.
func TestThiefAddsNoRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.policy.Answer = func(q broker.Question) broker.Decision {
			if q.Action == broker.ActionReport {
				return broker.Decision{Consequence: broker.ConsequenceFreezeCaller}
			}
			return broker.Decision{Allow: true}
		}
		for range 20 {
			_, err := w.Issue(ctx, as("thief"), step(root, "db.read"))
			refused(t, "Issue by a thief", err, broker.NotFound, broker.CodeViolation)
		}
		if rules, revocations := w.countRecords(); rules != 1 || revocations != 2 {
			t.Errorf("%d rules and %d revocations, want one freeze and one revocation", rules, revocations)
		}
	})
}

// TestLostAnswerIsReconciled: when the answer of the fence's transaction was lost, the repeated command finds it
// in force, and what it covers is ended by this process.
func TestLostAnswerIsReconciled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault { return brokertest.CommittedButFails })
		w.vault.Fail(func(string) error { return errors.New("sealed") })
		w.target.Fail(func(string) error { return errors.New("sealed") })
		_, err := w.tryRevoke(false, "chain:%s", root.Chain)
		refused(t, "Revoke", err, broker.Unavailable, broker.CodeLedgerDown)
		w.ledger.Fail(nil)
		w.vault.Fail(nil)
		w.target.Fail(nil)
		rv := w.revoke("chain:%s", root.Chain)
		if !rv.Repeated {
			t.Fatalf("Revoke = %+v, want the fence that was committed", rv)
		}
		pass(10 * time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		w.wantAllClosed()
	})
}
