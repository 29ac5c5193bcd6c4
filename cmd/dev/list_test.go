package dev_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
)

// TestLaggingList holds that the rights of `pawl vault plan` suffice to prove a certificate dead when Vault
// updates its revocation list late.
func TestLaggingList(t *testing.T) {
	parts.NeedVault(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e, err := dev.Start(ctx, dev.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	root, err := e.Vault.Client()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := root.Logical().WriteWithContext(ctx, "pki/config/crl",
		map[string]any{"auto_rebuild": true, "expiry": "72h"}); err != nil {
		t.Fatal(err)
	}
	b := e.Broker.Broker
	c := broker.Caller{ID: dev.Agent("planner"), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	chain, err := b.Open(ctx, c,
		broker.OpenRequest{Task: "a lagging list", Rights: []broker.Right{{Tool: "tls.call", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	args, err := args.New(map[string]args.Value{"name": args.String("a.agents.pawl.dev")})
	if err != nil {
		t.Fatal(err)
	}
	got, err := b.Issue(ctx, c, broker.StepRequest{Delegation: chain.ID, Tool: "tls.call", Args: args})
	if err != nil {
		t.Fatal(err)
	}
	g, err := b.Close(ctx, c, got.Grant.ID)
	if err != nil || g.Outcome != broker.OutcomeDead || len(g.Evidence) == 0 ||
		!strings.Contains(g.Evidence[len(g.Evidence)-1].Answer, "on the list of ") {
		t.Errorf("Close() = %s %v, %v, want dead by the revocation list", g.Outcome, g.Evidence, err)
	}
}
