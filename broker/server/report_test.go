package server_test

import (
	"errors"
	"testing"

	"github.com/pawlsec/pawl/broker/agent"
)

// TestAgentReports: an agent reports violations under its own delegation and under those below it, and
// under no other delegation.
func TestAgentReports(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	c := w.agent(t, "root")
	rights := []agent.Right{{Tool: "db", Use: true, Delegate: true}}
	root, err := c.Open(ctx, agent.Chain{Task: "t", Depth: 1, Rights: rights})
	if err != nil {
		t.Fatal(err)
	}
	sub, err := root.Delegate(ctx, "spiffe://example.org/sub", agent.Share{Rights: rights})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []agent.DelegationID{root.ID(), sub} {
		got, err := c.Report(ctx, agent.Violation{Code: "odd", Delegation: id, Detail: "a page asked for more"})
		if want := (agent.Reported{Consequence: "deny"}); got != want || err != nil {
			t.Errorf("Report under %s = %+v, %v, want %+v", id, got, err, want)
		}
	}
	page, err := w.operator(t, "ann").ChainAudit(ctx, string(root.Info().Chain), 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	recorded := 0
	for _, e := range page.Entries {
		if e.Op == "violation" && e.Code == "odd" && e.Detail == "a page asked for more" {
			recorded++
		}
	}
	if recorded != 2 {
		t.Errorf("the audit has %d reports, want 2", recorded)
	}
	above := agent.Violation{Code: "odd", Delegation: root.ID()}
	if _, err := w.agent(t, "sub").Report(ctx, above); !errors.Is(err, agent.ErrNotFound) {
		t.Errorf("Report under a delegation above = %v, want not found", err)
	}
	malformed := agent.Violation{Code: "Odd!", Delegation: root.ID()}
	if _, err := c.Report(ctx, malformed); !errors.Is(err, agent.ErrMalformed) {
		t.Errorf("Report of a malformed code = %v, want malformed", err)
	}
}
