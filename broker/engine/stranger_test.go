package engine_test

import (
	"reflect"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// TestStrangerLearnsNothing presents ids that are another's, and ids that nobody has, to each procedure that takes one.
// The answers must be the same, and so must be the number of durable updates before them.
func TestStrangerLearnsNothing(t *testing.T) {
	rows := map[string]func(w *world, d broker.DelegationID, g broker.GrantID) error{
		"issue": func(w *world, d broker.DelegationID, _ broker.GrantID) error {
			_, err := w.Issue(ctx, as("thief"), broker.StepRequest{Delegation: d, Tool: "db.read"})
			return err
		},
		"delegate": func(w *world, d broker.DelegationID, _ broker.GrantID) error {
			_, err := w.Delegate(ctx, as("thief"), broker.DelegateRequest{From: d, To: as("friend").ID, Rights: use("db.read")})
			return err
		},
		"status": func(w *world, d broker.DelegationID, _ broker.GrantID) error {
			_, err := w.Status(ctx, as("thief"), d)
			return err
		},
		"stream": func(w *world, d broker.DelegationID, _ broker.GrantID) error {
			_, err := w.Peek(ctx, as("thief"), d)
			return err
		},
		"heartbeat": func(w *world, d broker.DelegationID, _ broker.GrantID) error {
			return w.Heartbeat(ctx, as("thief"), d)
		},
		"acknowledge": func(w *world, d broker.DelegationID, _ broker.GrantID) error {
			return w.Acknowledge(ctx, as("thief"), d, "rv000000000000000000000001")
		},
		"report": func(w *world, d broker.DelegationID, g broker.GrantID) error {
			_, err := w.Report(ctx, as("thief"), broker.ReportRequest{Delegation: d, Violation: "odd"})
			return err
		},
		"report a step that the delegation does not have": func(w *world, d broker.DelegationID, g broker.GrantID) error {
			_, err := w.Report(ctx, as("thief"), broker.ReportRequest{Delegation: d, Violation: "odd",
				Grant: "gr000000000000000000000001"})
			return err
		},
		"collect": func(w *world, _ broker.DelegationID, g broker.GrantID) error {
			_, _, err := w.Collect(ctx, as("thief"), g)
			return err
		},
		"close": func(w *world, _ broker.DelegationID, g broker.GrantID) error {
			_, err := w.Close(ctx, as("thief"), g)
			return err
		},
	}
	for name, present := range rows {
		for consequence := broker.ConsequenceDeny; consequence <= broker.ConsequenceFreezeCaller; consequence++ {
			t.Run(name+"/"+consequence.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					root := w.open("root", broker.OpenRequest{Depth: 1, Rights: use("db.read")})
					grant := w.issue("root", sealed(root, "")).Grant.ID
					w.policy.Answer = func(q broker.Question) broker.Decision {
						return broker.Decision{Allow: q.Action != broker.ActionReport, Consequence: consequence}
					}
					var updates atomic.Int32
					w.ledger.Fail(func(_ int, entries []broker.Entry) brokertest.Fault {
						if slices.ContainsFunc(entries, func(e broker.Entry) bool { return e.Actor == as("thief").ID.String() }) {
							updates.Add(1) // and not the ends of what a consequence has fenced, which follow the answer
						}
						return brokertest.None
					})
					unknown := present(w, "dl000000000000000000000001", "gr000000000000000000000001")
					synctest.Wait()
					before := updates.Load()
					others := present(w, root.ID, grant)
					if !reflect.DeepEqual(unknown, others) {
						t.Errorf("for an id that nobody has: %#v\nfor another's: %#v", unknown, others)
					}
					if mine := updates.Load() - before; mine != before {
						t.Errorf("another's id took %d updates, and one that nobody has %d", mine, before)
					}
				})
			})
		}
	}
}

// TestStrangerIsFrozenAlone lets a thief present the delegation of another where policy freezes whoever does. The owner
// goes on; the thief can open nothing.
func TestStrangerIsFrozenAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{Rights: use("db.read")})
		w.policy.Answer = func(q broker.Question) broker.Decision {
			return broker.Decision{Allow: q.Action != broker.ActionReport, Consequence: broker.ConsequenceFreezeCaller}
		}
		_, err := w.Issue(ctx, as("thief"), step(root, "db.read"))
		refused(t, "Issue by the thief", err, broker.NotFound, broker.CodeDelegationUnknown)
		if _, err := w.Issue(ctx, as("root"), step(root, "db.read")); err != nil {
			t.Errorf("Issue by the owner = %v, want a secret", err)
		}
		_, err = w.Open(ctx, as("thief"), broker.OpenRequest{Task: "t", Rights: use("db.read")})
		refused(t, "Open by the thief", err, broker.Revoked, broker.CodeFrozen)
	})
}
