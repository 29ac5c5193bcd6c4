package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
)

// seen is what an operator and an agent see of a running broker.
type seen struct {
	t      *testing.T
	env    *dev.Env
	client *agent.Client     // the planner's
	d      *agent.Delegation // the planner's, for every tool of the test
}

// get requests a path over the operators' socket.
func (s *seen) get(path string) (status int, body string) {
	c := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.env.Config.Listen.Socket)
		}}}
	answer, err := c.Get("http://pawl" + path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer answer.Body.Close() //nolint:errcheck // only read
	raw, err := io.ReadAll(answer.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return answer.StatusCode, string(raw)
}

// step takes a step with the tool and closes it.
func (s *seen) step(tool string) error {
	ctx, cancel := context.WithTimeout(s.t.Context(), 5*time.Second)
	defer cancel()
	call := agent.Call{Tool: tool}
	if tool == "tls.call" {
		call.Args = agent.Args{"name": "a.agents.pawl.dev"}
	}
	return s.d.Step(ctx, call, func(context.Context, *agent.Secret) error { return nil })
}

// within waits until ok returns an empty text, and fails the test with the last one after ten seconds.
func (s *seen) within(what string, ok func() string) {
	s.t.Helper()
	s.withinTime(10*time.Second, what, ok)
}

// withinTime is within for a wait that is not the broker's.
func (s *seen) withinTime(d time.Duration, what string, ok func() string) {
	s.t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for end, wrong := time.After(d), ok(); wrong != ""; wrong = ok() {
		select {
		case <-end:
			s.t.Errorf("%s: after %s still %s", what, d, wrong)
			return
		case <-tick.C:
		}
	}
}

// refused returns the fault in the error of a step; empty if it has the code, a text with detail, and says whether
// to retry.
func refused(err error, code api.Code, detail string, retryable bool) string {
	var p *agent.Error
	if !errors.As(err, &p) || p.Code != code || !strings.Contains(p.Detail, detail) || p.Retryable != retryable {
		return fmt.Sprintf("the step = %v, want %s with %q, retryable %v", err, code, detail, retryable)
	}
	return ""
}

// fault is one row of TestOperatorSeesFaults.
type fault struct {
	name             string
	sabotage, repair func() error
	ready            int      // status of /readyz
	condition        string   // the label of pawl_condition, as `code="…",part="…"`
	names            []string // what /readyz and the doctor name
	tool             string   // of the agent's step
	code             api.Code // of its refusal
	detail           string
	retryable        bool
}

// TestOperatorSeesFaults breaks Vault in one way per row. Within ten seconds the health endpoints, the metrics, the
// doctor and the agent's error name it, and after the repair none does.
func TestOperatorSeesFaults(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	s := newSeen(ctx, t, dev.Config{NoPostgres: true})
	s.healthy("before")
	for _, row := range s.faults(ctx) {
		s.meet(ctx, row)
	}
}

// newSeen starts everything, and opens a chain of the planner.
func newSeen(ctx context.Context, t *testing.T, config dev.Config) *seen {
	t.Helper()
	parts.NeedVault(t)
	env, err := dev.Start(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(env.Close)
	s := &seen{t: t, env: env}
	s.client, err = agent.New(agent.Config{Address: "https://" + env.Broker.Agents().String(),
		Source: env.Identities.Source(dev.Agent("planner")), ServerID: dev.BrokerID})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.client.Close() }) // it always succeeds
	s.d = s.open(ctx)
	return s
}

// open opens a chain.
func (s *seen) open(ctx context.Context) *agent.Delegation {
	s.t.Helper()
	d, err := s.client.Open(ctx, chain)
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

var chain = agent.Chain{Task: "t", Rights: []agent.Right{{Tool: "notes.read", Use: true}, {Tool: "tls.call", Use: true}}}

// meet makes one fault, and undoes it.
func (s *seen) meet(ctx context.Context, row fault) {
	s.t.Helper()
	if err := row.sabotage(); err != nil {
		s.t.Fatalf("%s: %v", row.name, err)
	}
	s.named(ctx, row)
	if err := row.repair(); err != nil {
		s.t.Fatalf("%s: %v", row.name, err)
	}
	s.healthy("after " + row.name)
}

// healthy waits until nothing is wrong.
func (s *seen) healthy(when string) {
	s.t.Helper()
	s.within(when, func() string {
		for _, path := range []string{"/livez", "/readyz", "/healthz"} {
			if status, body := s.get(path); status != http.StatusOK || strings.Contains(body, "conditions") {
				return fmt.Sprintf("GET %s = %d %s", path, status, body)
			}
		}
		_, page := s.get("/metrics")
		if !strings.Contains(page, "\npawl_vault_ready 1\n") || !strings.Contains(page, "\npawl_ready 1\n") ||
			strings.Contains(page, "\npawl_condition{") {
			return "the metrics have a condition:\n" + page
		}
		for _, tool := range []string{"notes.read", "tls.call"} {
			if err := s.step(tool); err != nil {
				return fmt.Sprintf("a step with %s = %v", tool, err)
			}
		}
		return ""
	})
}

// named waits until each of the places names the fault.
func (s *seen) named(ctx context.Context, row fault) {
	s.t.Helper()
	s.within(row.name, func() string {
		for _, path := range []string{"/readyz", "/healthz"} {
			status, body := s.get(path)
			for _, name := range row.names {
				if status != row.ready || !strings.Contains(body, name) {
					return fmt.Sprintf("GET %s = %d %s, want %d with %q", path, status, body, row.ready, name)
				}
			}
		}
		_, page := s.get("/metrics")
		works := row.ready == http.StatusOK || !strings.Contains(row.condition, `part="vault"`)
		vaultReady := fmt.Sprintf("\npawl_vault_ready %d\n", map[bool]int{true: 1}[works])
		if !strings.Contains(page, "\npawl_condition{"+row.condition+"} 1\n") || !strings.Contains(page, vaultReady) {
			return fmt.Sprintf("the metrics lack %q or %q", row.condition, vaultReady)
		}
		return refused(s.step(row.tool), row.code, row.detail, row.retryable)
	})
	if status, body := s.get("/livez"); status != http.StatusOK || !json.Valid([]byte(body)) {
		s.t.Errorf("%s: GET /livez = %d %s, want 200: fences and revocations work", row.name, status, body)
	}
	out, err := runDoctor(ctx, s.env.ConfigFile)
	for _, name := range row.names {
		if err == nil || !strings.Contains(failedLine(out, "broker"), name) {
			s.t.Errorf("%s: pawl doctor = %v\n%s\nwant the broker wrong, with %q", row.name, err, out, name)
		}
	}
}

func (s *seen) faults(ctx context.Context) []fault {
	vault := func(method, path string, data map[string]any) func() error {
		return func() error {
			c, err := s.env.Vault.Client()
			if err != nil {
				return err
			}
			if method == "DELETE" {
				_, err = c.Logical().DeleteWithContext(ctx, path)
			} else {
				_, err = c.Logical().WriteWithContext(ctx, path, data)
			}
			return err
		}
	}
	const notes = "sys/policies/acl/pawl-tool-notes-read"
	down := fault{ready: 503, tool: "notes.read", code: "vault_unavailable", retryable: true}
	killed, sealed, hangs := down, down, down
	killed.name, killed.condition, killed.detail = "Vault killed", `code="vault_unreachable",part="vault"`, "Vault does not answer"
	killed.names = []string{"vault_unreachable", "Vault at " + s.env.Vault.Address() + " does not answer"}
	killed.sabotage, killed.repair = s.env.Vault.Kill, func() error { return s.env.Vault.Restart(ctx) }
	hangs.name, hangs.condition, hangs.detail, hangs.names = "Vault hangs", killed.condition, killed.detail, killed.names
	hangs.sabotage, hangs.repair = s.env.Vault.Pause, s.env.Vault.Continue
	sealed.name, sealed.condition, sealed.detail = "Vault sealed", `code="vault_sealed",part="vault"`, "Vault is sealed"
	sealed.names = []string{"vault_sealed", "is sealed"}
	sealed.sabotage = func() error { return s.env.Vault.Seal(ctx) }
	sealed.repair = func() error { return s.env.Vault.Unseal(ctx) }
	return []fault{killed, hangs, sealed,
		{name: "a tool's policy removed", sabotage: vault("DELETE", notes, nil),
			repair: vault("PUT", notes, map[string]any{"policy": `path "secret/data/notes" { capabilities = ["read"] }`}),
			ready:  200, condition: `code="vault_policy",part="tool notes.read"`,
			names: []string{"tool notes.read", "pawl-tool-notes-read", "secret/data/notes"},
			tool:  "notes.read", code: "vault_policy", detail: "pawl-tool-notes-read"},
		{name: "a policy of an identity group added", sabotage: s.addGroup(ctx), repair: vault("DELETE", "identity/group/name/mesh", nil),
			ready: 503, condition: `code="vault_identity_policy",part="vault"`,
			names: []string{"vault_identity_policy", "mesh-readers", "identity/entity/id/"},
			tool:  "tls.call", code: "vault_identity_policy", detail: `"mesh-readers"`},
	}
}

// addGroup gives the broker's entity a policy through an identity group.
func (s *seen) addGroup(ctx context.Context) func() error {
	return func() error {
		c, err := s.env.Vault.Client()
		if err != nil {
			return err
		}
		ids, err := c.Logical().ListWithContext(ctx, "identity/entity/id")
		if err != nil {
			return err
		}
		_, err = c.Logical().WriteWithContext(ctx, "identity/group/name/mesh", map[string]any{
			"policies": []string{"mesh-readers"}, "member_entity_ids": ids.Data["keys"]})
		return err
	}
}
