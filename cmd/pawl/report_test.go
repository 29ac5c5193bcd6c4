package main

import (
	"crypto/rand"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/audit"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/broker/server"
)

// TestOperatorScripts runs operators' commands against the real engine in memory, on a local socket.
func TestOperatorScripts(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "pawl") // t.TempDir is too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a temporary directory
	private, public, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	engine := startEngine(t, brokertest.NewTarget())
	socket := filepath.Join(dir, "admin.sock")
	serveOperators(t, engine, private, "ann", socket)
	rv := revokedChain(t, engine)
	testscript.Run(t, testscript.Params{Dir: "testdata/operator", RequireExplicitExec: true, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("PAWL_SOCKET", socket)
			e.Setenv("PAWL_OPERATORS", "")
			e.Setenv("REVOCATION", string(rv.ID))
			e.Setenv("CHAIN", string(rv.Chain))
			for name, key := range map[string]jose.JSONWebKey{"broker.pub": public, "other.pub": other} {
				raw, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{key}})
				if err != nil {
					return err
				}
				if err := os.WriteFile(filepath.Join(e.WorkDir, name), raw, 0o600); err != nil {
					return err
				}
			}
			return nil
		}})
}

func startEngine(t *testing.T, target *brokertest.Target) *engine.Engine {
	t.Helper()
	tools := brokertest.AllowAll("db")
	b, err := engine.New(engine.Config{Ledger: brokertest.NewMemory(), Vault: brokertest.NewVault(target),
		Policy:   func() broker.Policy { return tools },
		Backends: map[string]broker.Backend{"target": target}, Now: time.Now, Random: rand.Reader, SweepEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	return b
}

func serveOperators(t *testing.T, b *engine.Engine, key jose.JSONWebKey, operator, socket string) *httptest.Server {
	t.Helper()
	signer, err := audit.NewSigner("example.org/pawl", key)
	if err != nil {
		t.Fatal(err)
	}
	notary, err := audit.NewNotary(audit.NotaryConfig{Source: b, Entries: b.Entries, Signer: signer, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	s, err := server.New(server.Config{Broker: b, Notary: notary, Now: time.Now,
		Identify: func(*http.Request) (broker.Caller, error) { return broker.Caller{}, nil },
		Operator: func(*http.Request) (broker.Operator, error) { return broker.Operator{Name: operator}, nil }})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	h := httptest.NewUnstartedServer(s.Operators())
	_ = h.Listener.Close() // the socket replaces it
	h.Listener = l
	h.Start()
	t.Cleanup(h.Close)
	t.Cleanup(s.Close)
	return h
}

// revokedChain opens a chain, takes a step, reports a canary and revokes all of it.
func revokedChain(t *testing.T, b *engine.Engine) broker.Revocation {
	t.Helper()
	ctx := t.Context()
	agent := agentNamed("agent")
	root, err := b.Open(ctx, agent, broker.OpenRequest{Task: "t", Rights: []broker.Right{{Tool: "db", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Issue(ctx, agent, broker.StepRequest{Delegation: root.ID, Tool: "db"}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Report(ctx, agent, broker.ReportRequest{Delegation: root.ID, Violation: "canary"}); err != nil {
		t.Fatal(err)
	}
	sel, err := selector.Parse("chain:" + string(root.Chain))
	if err != nil {
		t.Fatal(err)
	}
	rv, err := b.Revoke(ctx, broker.Operator{Name: "ann"}, selector.Request{Selector: sel, Reason: "a canary"})
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.After(10 * time.Second)
	for rv.Settled.IsZero() {
		woken, cancel := b.Watch("")
		if rv, err = b.Revocation(ctx, rv.ID); err != nil {
			t.Fatal(err)
		}
		if rv.Settled.IsZero() {
			select {
			case <-woken:
			case <-deadline:
				t.Fatalf("%+v did not settle within 10 s", rv)
			}
		}
		cancel()
	}
	return rv
}
