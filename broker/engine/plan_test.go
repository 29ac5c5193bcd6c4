package engine_test

import (
	"context"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/selector"
)

// interruptedLedger runs a function just before the next update.
type interruptedLedger struct {
	*brokertest.Memory
	before func() // nil: none
}

func (l *interruptedLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	if before := l.before; before != nil {
		l.before = nil
		before()
	}
	return l.Memory.Update(ctx, f)
}

// TestPlanIsComparedInTheFencingTransaction issues, delegates or opens after Revoke has compared the set with the plan,
// and before it fences. The plan is stale when the selector matches the addition, and otherwise not.
func TestPlanIsComparedInTheFencingTransaction(t *testing.T) {
	type addition func(*world, broker.Delegation)
	issue := func(tool broker.ToolName) addition {
		return func(w *world, d broker.Delegation) { w.issue("root", step(d, tool)) }
	}
	for _, row := range []struct {
		name, selector string
		meanwhile      addition
		stale          bool
	}{
		{"a step in the chain", "chain", issue("db.read"), true},
		{"a delegation in the chain", "chain", func(w *world, d broker.Delegation) {
			if _, err := w.Delegate(ctx, as("root"), broker.DelegateRequest{From: d.ID, To: as("child").ID,
				Rights: use("deploy")}); err != nil {
				w.t.Error(err)
			}
		}, true},
		{"a step in another chain", "chain", func(w *world, _ broker.Delegation) {
			w.issue("other", step(w.open("other", broker.OpenRequest{}), "db.read"))
		}, false},
		{"a step that the rule matches", "tool:db.read", issue("db.read"), true},
		{"a step that the rule does not match", "tool:db.read", issue("deploy"), false},
		{"a chain that the rule matches", "spiffe:spiffe://example.org/root", func(w *world, _ broker.Delegation) {
			w.open("root", broker.OpenRequest{})
		}, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.Stop()
				ledger := &interruptedLedger{Memory: w.ledger}
				w.start(ledger)
				root := w.open("root", broker.OpenRequest{Depth: 1})
				w.issue("root", step(root, "db.read"))
				text := row.selector
				if text == "chain" {
					text = "chain:" + string(root.Chain)
				}
				s := selecting(t, "%s", text)
				plan, err := w.Plan(ctx, responder, s)
				if err != nil {
					t.Fatal(err)
				}
				ledger.before = func() { row.meanwhile(w, root) }
				_, err = w.Revoke(ctx, responder, selector.Request{Selector: s, Reason: "a test", Plan: plan.Token})
				if row.stale {
					refused(t, "Revoke of a plan whose set has just grown", err, broker.Conflict, broker.CodePlanStale)
				} else if err != nil {
					t.Errorf("Revoke = %v, want it fenced: the plan's set has not grown", err)
				}
			})
		})
	}
}

// TestPlanCounts holds that a plan has the counts, the tasks and the revision of one snapshot.
func TestPlanCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		first := w.open("root", broker.OpenRequest{Task: "rotate the keys", Rights: use("db.read", "note")})
		w.issue("root", step(first, "note"))
		pass(2 * time.Minute) // the grant is closed, and its static secret must still be rotated
		w.issue("root", step(first, "note"))
		w.issue("root", step(first, "db.read"))
		w.vault.Fail(func(point string) error {
			if point == "mint created" {
				return context.DeadlineExceeded
			}
			return nil
		})
		_, err := w.Issue(ctx, as("root"), step(first, "db.read"))
		// The grant is not live, and not proven dead.
		refused(t, "Issue with a lost answer", err, broker.Unavailable, broker.CodeOutcomeUnknown)
		w.vault.Fail(nil)
		second := w.open("root", broker.OpenRequest{Task: "read the mail"})
		for range broker.MaxPlannedTasks {
			w.open("root", broker.OpenRequest{Task: "idle"})
		}
		w.open("other", broker.OpenRequest{})
		untilDurable() // the grant with the lost answer is being ended
		entries, err := w.Entries(ctx, 0, 1000)
		if err != nil {
			t.Fatal(err)
		}
		plan, err := w.Plan(ctx, responder, selecting(t, "spiffe:spiffe://example.org/root"))
		if err != nil {
			t.Fatal(err)
		}
		if want := entries[len(entries)-1].Revision; plan.Revision != want {
			t.Errorf("the plan's revision = %d, want %d", plan.Revision, want)
		}
		if want := map[string]int{"keeper": 1, "target": 2}; !reflect.DeepEqual(plan.ByBackend, want) {
			t.Errorf("the plan's ByBackend = %v, want %v", plan.ByBackend, want)
		}
		if plan.Live != 2 || plan.Issued != 2 || plan.Static != 2 || plan.Later != 0 {
			t.Errorf("plan = %+v, want 2 live and 2 issued, 2 static, and no later steps", plan)
		}
		const most = broker.MaxPlannedTasks
		if len(plan.Tasks) != most || plan.TasksMore != 2 || plan.Chains != most+2 {
			t.Errorf("the plan has %d tasks and %d more of %d chains, want %d and 2 of %d",
				len(plan.Tasks), plan.TasksMore, plan.Chains, most, most+2)
		}
		want := broker.PlannedTask{Chain: first.Chain, Task: "rotate the keys", Delegations: 1, Grants: plan.Grants}
		if plan.Tasks[0] != want {
			t.Errorf("the plan's first task = %+v, want %+v", plan.Tasks[0], want)
		}
		plan, err = w.Plan(ctx, responder, selecting(t, "tool:deploy"))
		if err != nil || plan.Grants != 0 || plan.Later != most+2 {
			t.Errorf("a plan of later steps = %+v, %v; want %d delegations (%s among them)",
				plan, err, most+2, second.ID)
		}
	})
}
