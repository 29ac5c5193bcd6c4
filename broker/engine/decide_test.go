package engine_test

import (
	"slices"
	"testing"
	"testing/synctest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

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

// TestDelegateAcrossTrustDomains: a receiver in another trust domain is given nothing unless policy names
// both domains for each of the tools; one that is named takes steps like any other.
func TestDelegateAcrossTrustDomains(t *testing.T) {
	partner := as("writer")
	partner.ID = spiffeid.RequireFromString("spiffe://partner.example/writer")
	both := []string{"example.org", "partner.example"}
	for name, row := range map[string]struct {
		to      broker.Caller
		domains map[broker.ToolName][]string // that the permit names, of each tool
		missing broker.ToolName              // that it is refused for; empty: it is allowed
	}{
		"inside one":               {to: as("writer")},
		"no domains":               {to: partner, missing: "db.read"},
		"only the holder's":        {to: partner, domains: map[broker.ToolName][]string{"db.read": {"example.org"}, "deploy": both}, missing: "db.read"},
		"only the receiver's":      {to: partner, domains: map[broker.ToolName][]string{"db.read": {"partner.example"}, "deploy": both}, missing: "db.read"},
		"others":                   {to: partner, domains: map[broker.ToolName][]string{"db.read": {"example.org", "example"}, "deploy": both}, missing: "db.read"},
		"both for one of two":      {to: partner, domains: map[broker.ToolName][]string{"db.read": both}, missing: "deploy"},
		"both for each":            {to: partner, domains: map[broker.ToolName][]string{"db.read": both, "deploy": both}},
		"both, and more, unsorted": {to: partner, domains: map[broker.ToolName][]string{"db.read": {"z.example", "partner.example", "example.org"}, "deploy": both}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.policy.Answer = func(q broker.Question) broker.Decision {
					return broker.Decision{Allow: true, Domains: row.domains[q.Tool.Name], Policies: []string{"some"}}
				}
				root := w.open("planner", broker.OpenRequest{Depth: 1})
				d, err := w.Delegate(ctx, as("planner"), broker.DelegateRequest{From: root.ID, To: row.to.ID, Rights: use("db.read", "deploy")})
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
				if got := w.recorded(broker.OpDenied); len(got) != 1 || got[0].Code != broker.CodeForeignDomain || got[0].Tool != row.missing || !slices.Equal(got[0].Policies, []string{"some"}) {
					t.Errorf("the audit has the denials %+v, want one for tool %s", got, row.missing)
				}
				if v, err := w.Chain(ctx, root.Chain); err != nil || len(v.Delegations) != 1 {
					t.Errorf("the chain has %d delegations, %v; want the root alone", len(v.Delegations), err)
				}
			})
		})
	}
}
