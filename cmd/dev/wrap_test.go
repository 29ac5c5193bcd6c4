package dev_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
)

// TestWrapped uses a wrapped token like a tool that speaks to Vault. The secret can be unwrapped once, and the
// token inside reads its note and nothing else. Neither token is left when the step is closed, before the
// unwrapping or after it.
func TestWrapped(t *testing.T) {
	parts.NeedVault(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e, err := dev.Start(ctx, dev.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	b := e.Broker.Broker
	c := broker.Caller{ID: dev.Agent("planner"), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	chain, err := b.Open(ctx, c,
		broker.OpenRequest{Task: "wrapped", Rights: []broker.Right{{Tool: "notes.fetch", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	root, err := e.Vault.Client()
	if err != nil {
		t.Fatal(err)
	}
	known := func(g broker.Grant) (n int) {
		for _, accessor := range strings.Split(g.Lease.Ref, ",") {
			if _, err := root.Auth().Token().LookupAccessorWithContext(ctx, accessor); err == nil {
				n++
			}
		}
		return n
	}
	for _, opened := range []bool{false, true} {
		got, err := b.Issue(ctx, c, broker.StepRequest{Delegation: chain.ID, Tool: "notes.fetch"})
		if err != nil {
			t.Fatal(err)
		}
		var s struct {
			Token string `json:"wrapping_token"`
			Path  string `json:"creation_path"`
		}
		if err := json.Unmarshal(got.Secret.Reveal(), &s); err != nil || s.Path != "auth/token/create/pawl-notes" {
			t.Fatalf("the secret's creation path is %q, %v", s.Path, err)
		}
		want := 2
		if opened {
			want = 1 // the wrapping token had one use
			unwrap(ctx, t, e, root, s.Token)
		}
		if n := known(got.Grant); n != want {
			t.Errorf("Vault knows %d of the step's two tokens, unwrapped %v; want %d", n, opened, want)
		}
		g, err := b.Close(ctx, c, got.Grant.ID)
		if err != nil || g.Outcome != broker.OutcomeDead {
			t.Errorf("Close() = %s %v, %v, want dead", g.Outcome, g.Evidence, err)
		}
		if n := known(got.Grant); n != 0 {
			t.Errorf("Vault knows %d tokens of a closed step, unwrapped %v; want 0", n, opened)
		}
	}
}

// unwrap uses a wrapping token, tries it again, and reads the note with the token inside.
func unwrap(ctx context.Context, t *testing.T, e *dev.Env, root *api.Client, wrapping string) {
	t.Helper()
	inside, err := root.Logical().UnwrapWithContext(ctx, wrapping)
	if err != nil || inside.Auth == nil {
		t.Fatalf("unwrapping = %v, want a token", err)
	}
	if again, err := root.Logical().UnwrapWithContext(ctx, wrapping); err == nil {
		t.Errorf("unwrapping again succeeds, with a token: %v", again.Auth != nil)
	}
	agent, err := e.Vault.Client()
	if err != nil {
		t.Fatal(err)
	}
	agent.SetToken(inside.Auth.ClientToken)
	if note, err := agent.Logical().ReadWithContext(ctx, "secret/data/notes"); err != nil || note == nil {
		t.Errorf("reading the note = %v, want it", err)
	}
	if _, err := agent.Logical().ReadWithContext(ctx, "secret/metadata/notes"); err == nil {
		t.Error("the token can read more than the note")
	}
}
