package engine_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// countRecords counts the ledger's records of rules, which every transaction reads, and of revocations.
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

// TestRulesThatMatchNothing holds that a final rule is refused, and not answered CLOSED, when it can match nothing open
// and no later step. A freeze also covers later chains, so it is accepted. It reports that it covers nothing yet.
func TestRulesThatMatchNothing(t *testing.T) {
	for _, row := range []struct {
		selector                         string
		accepted, nothing, freezeNothing bool // whether Revoke accepts it; Nothing of the revocation, and of a freeze
	}{
		{"tool:typo", false, true, true},
		{"tool:note", false, true, true}, // no open delegation has the tool
		{"spiffe:spiffe://example.org/unknown", false, true, true},
		{"spiffe:spiffe://example.org/expired", false, true, true}, // held an expired chain
		{"spiffe:spiffe://example.org/fenced", false, true, true},
		{"tool:deploy", true, true, true}, // root may take such a step later
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
				w.open("expired", broker.OpenRequest{TTL: time.Minute})
				w.revoke("chain:%s", w.open("fenced", broker.OpenRequest{}).Chain)
				pass(2 * time.Minute)
				root := w.open("root", broker.OpenRequest{})
				w.issue("root", step(root, "db.read"))
				_, before := w.countRecords()
				if rv, err := w.tryRevoke(false, "%s", row.selector); row.accepted {
					if err != nil || rv.Nothing != row.nothing {
						t.Errorf("Revoke = %+v, %v; want it fenced, and Nothing %v", rv, err, row.nothing)
					}
				} else {
					refused(t, "Revoke", err, broker.NotFound, broker.CodeSelectorEmpty)
					if _, after := w.countRecords(); after != before {
						t.Error("the ledger has a record of the refused revocation")
					}
				}
			})
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.issue("root", step(w.open("root", broker.OpenRequest{}), "db.read"))
				if rv, err := w.tryRevoke(true, "%s", row.selector); err != nil || rv.Nothing != row.freezeNothing {
					t.Errorf("freezing = %+v, %v; want it in force, and Nothing %v", rv, err, row.freezeNothing)
				}
			})
		})
	}
}

// TestRepeatedCommands holds that a repeated command is answered with the existing revocation. An operator, a signal or
// a caller with another's delegation can repeat a command without end, and the ledger does not grow.
func TestRepeatedCommands(t *testing.T) {
	for _, row := range []struct {
		name, selector string // %[1]s is the chain, %[2]s the delegation, %[3]s the grant
		freeze         bool
	}{
		{"a chain", "chain:%[1]s", false}, {"a frozen chain", "chain:%[1]s", true},
		{"a subtree", "subtree:%[2]s", false},
		{"a grant", "grant:%[3]s", false}, {"a frozen grant", "grant:%[3]s", true},
		{"a rule", "tool:db.read%.0[1]s", false}, {"a freeze by a rule", "tool:db.read%.0[1]s", true},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				root := w.open("root", broker.OpenRequest{})
				got := w.issue("root", step(root, "db.read"))
				command := func() broker.Revocation {
					t.Helper()
					rv, err := w.tryRevoke(row.freeze, row.selector+"%.0[1]s%.0[2]s%.0[3]s",
						root.Chain, root.ID, got.Grant.ID)
					if err != nil {
						t.Fatal(err)
					}
					return rv
				}
				first := command()
				rules, revocations := w.countRecords()
				for range 10 {
					pass(time.Second)
					if rv := command(); rv.ID != first.ID || !rv.Repeated || first.Repeated {
						t.Errorf("the repeated command = %+v, want the existing %s", rv, first.ID)
					}
				}
				if r, n := w.countRecords(); r != rules || n != revocations {
					t.Errorf("the ledger has %d rules and %d revocations, want %d and %d as after the first command",
						r, n, rules, revocations)
				}
			})
		})
	}
}

// TestRepeatedRuleCoversNewChains holds that a repeated final rule covers the chains opened since. A final rule covers
// only the chains that were open. So the second command makes a new revocation, and its rule replaces the first.
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
			t.Fatalf("Revoke after another chain was opened = %+v, want a new revocation", second)
		}
		if rules, _ := w.countRecords(); rules != 1 {
			t.Errorf("the ledger has %d rules, want the second in place of the first", rules)
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

// TestThiefAddsNoRecords holds that a caller who uses another's delegation freezes itself once, however often it tries.
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
			refused(t, "Issue by a thief", err, broker.NotFound, broker.CodeDelegationUnknown)
		}
		if rules, revocations := w.countRecords(); rules != 1 || revocations != 1 {
			t.Errorf("the ledger has %d rules and %d revocations, want one of each, for the freeze",
				rules, revocations)
		}
	})
}

// TestLostAnswerIsReconciled loses the answer of the fencing transaction. The repeated command finds the fence in
// force, and this process ends the grants that it covers.
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
			t.Fatalf("the repeated Revoke = %+v, want the committed revocation", rv)
		}
		pass(10 * time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		w.wantAllClosed()
	})
}
