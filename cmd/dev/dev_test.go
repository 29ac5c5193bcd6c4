package dev_test

import (
	"context"
	"encoding/json"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/dev"
)

func TestFirstSecret(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e, err := dev.Start(ctx, dev.Config{Progress: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	b := e.Broker.Broker
	c := broker.Caller{ID: dev.Agent("planner"), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	root, err := b.Open(ctx, c, broker.OpenRequest{Task: "look", Rights: []broker.Right{{Tool: "db.read", Use: true}, {Tool: "tls.call", Use: true}, {Tool: "notes.read", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	args, _ := broker.NewArgs(map[string]broker.Value{"tables": broker.List("orders")})
	name, _ := broker.NewArgs(map[string]broker.Value{"name": broker.String("a.agents.pawl.dev")})
	for _, r := range []broker.StepRequest{{Tool: "db.read", Args: args}, {Tool: "tls.call", Args: name}, {Tool: "notes.read"}} {
		r.Delegation = root.ID
		began := time.Now()
		got, err := b.Issue(ctx, c, r)
		if err != nil {
			t.Fatal(err)
		}
		t.Log(r.Tool, time.Since(began), got.Grant.Lease)
		if r.Tool == "db.read" {
			var s struct{ Username, Password, Host, Port, Database string }
			_ = json.Unmarshal(got.Secret.Reveal(), &s)
			conn, err := pgx.Connect(ctx, e.Postgres.DSNFor(s.Username, s.Password, s.Database))
			if err != nil {
				t.Fatal(err)
			}
			var n int
			if err := conn.QueryRow(ctx, "SELECT count(*) FROM orders").Scan(&n); err != nil || n != 3 {
				t.Fatal(n, err)
			}
		}
		began = time.Now()
		g, err := b.Close(ctx, c, got.Grant.ID)
		t.Log(r.Tool, time.Since(began), g.State, g.Outcome, g.Evidence, err)
	}
}
