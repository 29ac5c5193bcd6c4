package engine_test

import (
	"slices"
	"testing"
	"testing/synctest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
)

// TestForbiddenToOpen holds that opening a chain with a forbidden tool is a violation. There is no chain to revoke, so
// the broker records the violation. A freeze of the caller stops its other chains.
func TestForbiddenToOpen(t *testing.T) {
	for consequence := broker.ConsequenceRevokeStep; consequence <= broker.ConsequenceFreezeCaller; consequence++ {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			before := w.open("writer", broker.OpenRequest{})
			w.policy.Answer = func(q broker.Question) broker.Decision {
				if q.Action == broker.ActionOpen {
					return broker.Decision{Policies: []string{"no"}, Consequence: consequence}
				}
				return broker.Decision{Allow: true}
			}
			_, err := w.Open(ctx, as("writer"), broker.OpenRequest{Task: "t", Rights: use("deploy")})
			refused(t, "Open with a forbidden tool", err, broker.Denied, broker.CodeViolation)
			got := w.recorded(broker.OpViolation)
			if len(got) != 1 || got[0].Detail != consequence.String() || got[0].Tool != "deploy" ||
				got[0].Actor != as("writer").ID.String() {
				t.Errorf("the audit log has the violations %+v, want one with %s", got, consequence)
			}
			_, err = w.Issue(ctx, as("writer"), step(before, "deploy"))
			if consequence == broker.ConsequenceFreezeCaller {
				refused(t, "Issue by the frozen caller", err, broker.Revoked, broker.CodeFrozen)
			} else if err != nil {
				t.Errorf("after %s Issue in another chain = %v, want a secret", consequence, err)
			}
		})
	}
}

// TestCanaryNeverMints makes a tool a canary after a chain has got it. From then on the broker refuses every request
// with the tool, although policy allows it.
func TestCanaryNeverMints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{Depth: 1})
		bait := w.policy.Tools["deploy"]
		bait.Canary = true
		w.policy.Tools["deploy"] = bait
		_, err := w.Issue(ctx, as("planner"), step(root, "deploy"))
		refused(t, "Issue with a canary", err, broker.Denied, broker.CodePolicyDenied)
		_, err = w.Delegate(ctx, as("planner"), broker.DelegateRequest{From: root.ID, To: as("writer").ID,
			Rights: use("db.read", "deploy")})
		refused(t, "Delegate with a canary", err, broker.Denied, broker.CodePolicyDenied)
		_, err = w.Open(ctx, as("planner"), broker.OpenRequest{Task: "t", Rights: use("db.read", "deploy")})
		refused(t, "Open with a canary", err, broker.Denied, broker.CodePolicyDenied)
		secrets, intents := len(w.target.Alive()), len(w.recorded(broker.OpIntent))
		if secrets != 0 || intents != 0 {
			t.Errorf("there are %d secrets and %d intents, want none", secrets, intents)
		}
		violations := w.recorded(broker.OpViolation)
		for _, e := range violations {
			if e.Code != broker.Code(broker.ViolationCanary) || e.Tool != "deploy" {
				t.Errorf("the audit log has the violation %+v, want the canary's", e)
			}
		}
		if len(violations) != 3 {
			t.Errorf("the audit log has %d violations, want 3", len(violations))
		}
	})
}

// TestDelegateAcrossTrustDomains holds that a receiver in another trust domain gets a delegation only when policy names
// both domains for each tool. Such a receiver takes steps like any other.
func TestDelegateAcrossTrustDomains(t *testing.T) {
	partner := as("writer")
	partner.ID = spiffeid.RequireFromString("spiffe://partner.example/writer")
	both := []string{"example.org", "partner.example"}
	for name, row := range map[string]struct {
		to           broker.Caller
		read, deploy []string        // the domains that policy's permits name, for db.read and for deploy
		missing      broker.ToolName // the tool that Delegate is refused for; empty: it is allowed
	}{
		"the same domain":           {as("writer"), nil, nil, ""},
		"no domains":                {partner, nil, nil, "db.read"},
		"the holder's only":         {partner, []string{"example.org"}, both, "db.read"},
		"the receiver's only":       {partner, []string{"partner.example"}, both, "db.read"},
		"other domains":             {partner, []string{"example.org", "example"}, both, "db.read"},
		"both for one of two tools": {partner, both, nil, "deploy"},
		"both for each tool":        {partner, both, both, ""},
		"both and more, unsorted":   {partner, []string{"z.example", "partner.example", "example.org"}, both, ""},
	} {
		domains := map[broker.ToolName][]string{"db.read": row.read, "deploy": row.deploy}
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.policy.Answer = func(q broker.Question) broker.Decision {
					return broker.Decision{Allow: true, Domains: domains[q.Tool.Name], Policies: []string{"some"}}
				}
				root := w.open("planner", broker.OpenRequest{Depth: 1})
				d, err := w.Delegate(ctx, as("planner"), broker.DelegateRequest{From: root.ID, To: row.to.ID,
					Rights: use("db.read", "deploy")})
				if row.missing == "" {
					if err != nil {
						t.Fatalf("Delegate = %v, want a delegation", err)
					}
					if _, err := w.Issue(ctx, row.to, step(d, "db.read")); err != nil {
						t.Errorf("Issue = %v, want a secret", err)
					}
					return
				}
				refused(t, "Delegate", err, broker.Denied, broker.CodeForeignDomain)
				got := w.recorded(broker.OpDenied)
				if len(got) != 1 || got[0].Code != broker.CodeForeignDomain || got[0].Tool != row.missing ||
					!slices.Equal(got[0].Policies, []string{"some"}) {
					t.Errorf("the audit log has the denials %+v, want one for tool %s", got, row.missing)
				}
				if v, err := w.Chain(ctx, root.Chain); err != nil || len(v.Delegations) != 1 {
					t.Errorf("the chain has %d delegations, %v; want only the root", len(v.Delegations), err)
				}
			})
		})
	}
}
