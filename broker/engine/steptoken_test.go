package engine_test

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// TestStepTokenBeforeIntent holds that the broker makes a step's token before it commits the intent, and does not mint
// with it before. It revokes the token when the intent is refused. It makes none when it can foresee the refusal.
func TestStepTokenBeforeIntent(t *testing.T) {
	for name, row := range map[string]struct {
		before func(w *world, d broker.Delegation) // after a first step, while nothing is under way
		during func(w *world, d broker.Delegation) // while the token is made, before the intent is committed
		budget broker.Budget
		key    string
		kind   broker.Kind
		made   bool // the broker makes a token for the refused step
	}{
		"fenced meanwhile": {made: true, kind: broker.Revoked,
			during: func(w *world, d broker.Delegation) { w.revoke("subtree:%s", d.ID) }},
		"fenced before": {kind: broker.Revoked,
			before: func(w *world, d broker.Delegation) { w.revoke("subtree:%s", d.ID) }},
		"the budget is spent":   {kind: broker.Denied, budget: broker.Budget{Steps: 1}},
		"the key is a used one": {key: "once", made: true},
		"the ledger is down": {made: true, kind: broker.Unavailable, before: func(w *world, _ broker.Delegation) {
			w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault { return brokertest.NotCommitted })
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				root := w.open("planner", broker.OpenRequest{Budget: row.budget})
				r := step(root, "db.read")
				r.Key = row.key
				w.issue("planner", r)
				if row.before != nil {
					row.before(w, root)
				}
				var children atomic.Int64
				w.vault.Fail(func(point string) error {
					if point == "child" {
						children.Add(1)
						if row.during != nil {
							row.during(w, root)
						}
					}
					if point == "mint" {
						t.Error("the broker minted for a refused step")
					}
					return nil
				})
				got, err := w.Issue(ctx, as("planner"), r)
				if broker.KindOf(err) != row.kind && !(row.kind == 0 && err == nil && got.Repeated) {
					t.Errorf("Issue = %+v, %v; want kind %v", got, err, row.kind)
				}
				w.ledger.Fail(nil)
				pass(10 * time.Millisecond)
				if made := children.Load() > 0; made != row.made {
					t.Errorf("the broker made a token: %v, want %v", made, row.made)
				}
				pass(2 * time.Minute)
				if n := w.vault.Steps(); n != 0 {
					t.Errorf("%d step tokens are alive, want none", n)
				}
			})
		})
	}
}
