package dev_test

import (
	"context"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
)

// TestEveryTool takes a step with each tool of the development bundle and closes it.
func TestEveryTool(t *testing.T) {
	parts.NeedVault(t)
	parts.NeedPostgreSQL(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e, err := dev.Start(ctx, dev.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	b := e.Broker.Broker
	c := broker.Caller{ID: dev.Agent("planner"), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	rows := []struct {
		tool broker.ToolName
		args map[string]args.Value
		want broker.Outcome
	}{
		{"db.read", map[string]args.Value{"tables": args.List("orders")}, broker.OutcomeDead},
		{"tls.call", map[string]args.Value{"name": args.String("a.agents.pawl.dev")}, broker.OutcomeDead},
		{"api.call", map[string]args.Value{"audience": args.String("https://mail.pawl.dev")}, broker.OutcomeDead},
		{"host.uptime", nil, broker.OutcomeDead},
		{"notes.fetch", nil, broker.OutcomeDead},
		{"notes.read", nil, broker.OutcomeStatic},
	}
	var rights []broker.Right
	for _, row := range rows {
		rights = append(rights, broker.Right{Tool: row.tool, Use: true})
	}
	root, err := b.Open(ctx, c, broker.OpenRequest{Task: "every tool", Rights: rights})
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows {
		args, err := args.New(row.args)
		if err != nil {
			t.Fatal(err)
		}
		got, err := b.Issue(ctx, c, broker.StepRequest{Delegation: root.ID, Tool: row.tool, Args: args})
		if err != nil {
			t.Errorf("Issue(%s) = %v, want a secret", row.tool, err)
			continue
		}
		g, err := b.Close(ctx, c, got.Grant.ID)
		if err != nil || g.State != broker.StateClosed || g.Outcome != row.want {
			t.Errorf("Close(%s) = %s %s %v, %v; want CLOSED %s", row.tool, g.State, g.Outcome, g.Evidence, err, row.want)
		}
	}
}
