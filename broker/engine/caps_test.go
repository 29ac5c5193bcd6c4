package engine_test

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// TestCapsAtOpen checks that a chain gets no more than the caps of all permits of its tools allow. A field that it leaves
// out is the cap
// and more is refused with the cap named.
func TestCapsAtOpen(t *testing.T) {
	depth := func(n int) *int { return &n }
	caps := map[broker.ToolName]broker.Caps{
		"db.read":  {Steps: 50, Depth: depth(2), TTL: 15 * time.Minute},
		"db.write": {Steps: 20, Depth: depth(1), Labels: []string{"team"}, Required: []string{"team"}},
		"deploy":   {TTL: 8 * time.Hour},
	}
	team := map[string]string{"team": "payments"}
	for _, row := range []struct {
		name    string
		ask     broker.OpenRequest
		steps   int // of the chain
		ttl     time.Duration
		missing []string
		remedy  string
	}{
		{name: "what is left out is the cap", ask: broker.OpenRequest{Rights: use("db.read")}, steps: 50, ttl: 15 * time.Minute},
		{name: "never more than the default", ask: broker.OpenRequest{Rights: use("deploy")}, ttl: time.Hour},
		{name: "less is possible", ask: broker.OpenRequest{Rights: use("db.read"), Budget: broker.Budget{Steps: 3}, TTL: time.Minute, Depth: 2}, steps: 3, ttl: time.Minute},
		{name: "the tightest of two tools", ask: broker.OpenRequest{Rights: use("db.read", "db.write"), Labels: team}, steps: 20, ttl: 15 * time.Minute},
		{name: "more", ask: broker.OpenRequest{Rights: use("db.read"), Budget: broker.Budget{Steps: 51}, Depth: 3, TTL: time.Hour},
			missing: []string{"budget:steps", "depth", "ttl"}, remedy: "ask for at most 50 steps, a depth of at most 2, a lifetime of at most 15m0s"},
		{name: "more by another tool", ask: broker.OpenRequest{Rights: use("db.read", "db.write"), Budget: broker.Budget{Steps: 30}, Labels: team},
			missing: []string{"budget:steps"}, remedy: "ask for at most 20 steps"},
		{name: "no label", ask: broker.OpenRequest{Rights: use("db.write")}, missing: []string{"label:team"}, remedy: `ask for the label "team"`},
		{name: "another label", ask: broker.OpenRequest{Rights: use("db.write"), Labels: map[string]string{"team": "payments", "urgent": "yes"}},
			missing: []string{"label:urgent"}, remedy: `ask for no label "urgent"`},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.policy.Answer = func(q broker.Question) broker.Decision {
					if q.Open == nil || q.Open.Budget.Steps != row.ask.Budget.Steps {
						t.Errorf("policy is asked about %+v, want what the caller asked", q.Open)
					}
					return broker.Decision{Allow: true, Policies: []string{"cap/" + string(q.Tool.Name)}, Caps: caps[q.Tool.Name]}
				}
				row.ask.Task = "t"
				d, err := w.Open(ctx, as("opener"), row.ask)
				if row.missing == nil {
					if err != nil || d.Budget.Steps != row.steps || d.Expires.Sub(d.Created) != row.ttl || d.Depth != row.ask.Depth {
						t.Fatalf("Open = %+v, %v, want %d steps and %v", d, err, row.steps, row.ttl)
					}
					return
				}
				var refusal *broker.Error
				if !errors.As(err, &refusal) || refusal.Code != broker.CodeChainOverCap || !slices.Equal(refusal.Missing, row.missing) || refusal.Remedy != row.remedy {
					t.Fatalf("Open = %+v, want %v missing and %q", err, row.missing, row.remedy)
				}
				if len(refusal.Policies) != len(row.ask.Rights) {
					t.Errorf("the refusal names %v, want the policy of each tool", refusal.Policies)
				}
			})
		})
	}
}
