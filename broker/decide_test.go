package broker_test

import (
	"testing"
	"testing/synctest"

	"github.com/pawlsec/pawl/broker"
)

// TestForbiddenToOpen: a forbid with a consequence may hold when a chain is opened. There is no chain to
// end; the violation is recorded, and freezing the caller reaches its other chains.
func TestForbiddenToOpen(t *testing.T) {
	for what := broker.ConsequenceRevokeStep; what <= broker.ConsequenceFreezeCaller; what++ {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			before := w.open("writer", broker.OpenRequest{})
			w.policy.Answer = func(q broker.Question) broker.Decision {
				if q.Action == broker.ActionOpen {
					return broker.Decision{Policies: []string{"no"}, Consequence: what}
				}
				return broker.Decision{Allow: true}
			}
			_, err := w.Open(ctx, as("writer"), broker.OpenRequest{Task: "t", Rights: use("deploy")})
			refused(t, "Open with a forbidden tool", err, broker.Denied, broker.CodeViolation)
			if got := w.recorded(broker.OpViolation); len(got) != 1 || got[0].Detail != what.String() || got[0].Tool != "deploy" || got[0].Actor != as("writer").ID.String() {
				t.Errorf("the audit has the violations %+v, want one with %s", got, what)
			}
			_, err = w.Issue(ctx, as("writer"), step(before, "deploy"))
			if what == broker.ConsequenceFreezeCaller {
				refused(t, "a step of the frozen caller", err, broker.Revoked, broker.CodeFrozen)
			} else if err != nil {
				t.Errorf("after %s a step in another chain = %v, want a secret", what, err)
			}
		})
	}
}

// TestCanaryNeverMints: a tool that became a canary while a chain held it gives nothing any more, to
// whoever asks, however policy answers.
func TestCanaryNeverMints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{Depth: 1})
		bait := w.policy.Tools["deploy"]
		bait.Canary = true
		w.policy.Tools["deploy"] = bait
		_, err := w.Issue(ctx, as("planner"), step(root, "deploy"))
		refused(t, "a step with a canary", err, broker.Denied, broker.CodePolicyDenied)
		_, err = w.Delegate(ctx, as("planner"), broker.DelegateRequest{From: root.ID, To: as("writer").ID, Rights: use("db.read", "deploy")})
		refused(t, "passing a canary on", err, broker.Denied, broker.CodePolicyDenied)
		_, err = w.Open(ctx, as("planner"), broker.OpenRequest{Task: "t", Rights: use("db.read", "deploy")})
		refused(t, "opening with a canary", err, broker.Denied, broker.CodePolicyDenied)
		if n := len(w.target.Alive()); n != 0 || len(w.recorded(broker.OpIntent)) != 0 {
			t.Errorf("%d secrets and %d intents, want none", n, len(w.recorded(broker.OpIntent)))
		}
		for _, e := range w.recorded(broker.OpViolation) {
			if e.Code != broker.Code(broker.ViolationCanary) || e.Tool != "deploy" {
				t.Errorf("the audit has %+v, want the canary", e)
			}
		}
		if n := len(w.recorded(broker.OpViolation)); n != 3 {
			t.Errorf("%d violations, want 3", n)
		}
	})
}
