package e2e_test

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// asRoot writes to Vault with its root token.
func (w *world) asRoot(path string, data map[string]any) {
	w.t.Helper()
	root, err := w.env.Vault.Client()
	if err == nil && data == nil {
		_, err = root.Logical().DeleteWithContext(w.t.Context(), path)
	} else if err == nil {
		_, err = root.Logical().WriteWithContext(w.t.Context(), path, data)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// open counts the grants of a chain that are not closed.
func (w *world) open(chain agent.ChainID) (n int) {
	w.t.Helper()
	for _, g := range w.grants() {
		if g.Chain == string(chain) && g.State != string(broker.StateClosed) {
			n++
		}
	}
	return n
}

// TestQuota takes eighty steps under a budget of ten while a quota in Vault refuses the mints, and then the tokens. No
// outcome is unknown, each agent is told how long to wait, and each grant is closed long before a mint could have
// settled. Afterwards, and after a restart, the budget has all of its ten steps.
func TestQuota(t *testing.T) {
	t.Parallel()
	need(t, true)
	env := newEnv(t, dev.Config{})
	w := newWorld(t, env, func(c *wire.Config) {
		c.Vault.MintTimeout, c.Vault.MintBound = 10*time.Second, 90*time.Second
		c.Vault.NoTokenAhead = true // each step meets the quota on tokens
	})
	s := w.here(nil, nil)
	d, err := w.agent("planner").Open(t.Context(), agent.Chain{Task: "quota", Budget: api.Budget{Steps: 10},
		Rights: []agent.Right{{Tool: "db.read", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	other, err := w.agent("writer").Open(t.Context(), agent.Chain{Task: "other", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	w.healthy(other)
	w.asRoot("sys/quotas/config", map[string]any{"enable_rate_limit_response_headers": true})
	for _, path := range []string{"database/creds/pawl-db-read", "auth/token/create"} {
		w.asRoot("sys/quotas/rate-limit/q", map[string]any{"path": path, "rate": 1, "interval": "1h"})
		if !within(5*time.Second, func() bool { _, _, err := take(t.Context(), other, 0); return err != nil }) {
			t.Fatal("Vault refuses nothing in spite of its quota")
		}
		for range 10 {
			var all sync.WaitGroup
			for range 4 {
				all.Go(func() {
					_, _, err := take(t.Context(), d, 0)
					unavailable(t, "a step with a quota on "+path, err, broker.CodeVaultBusy)
					var problem *agent.Error
					if errors.As(err, &problem) && problem.RetryAfter() < time.Minute {
						t.Errorf("the agent is to retry after %v, and Vault said an hour", problem.RetryAfter())
					}
				})
			}
			all.Wait()
			if !within(20*time.Second, func() bool { return w.open(d.Info().Chain) == 0 }) {
				t.Fatal("steps for which nothing was made are open")
			}
		}
		w.asRoot("sys/quotas/rate-limit/q", nil)
	}
	s.Close()
	w.here(nil, nil)
	for range 10 {
		w.healthy(d)
	}
	_, _, err = take(t.Context(), d, 0)
	var problem *agent.Error
	if !errors.As(err, &problem) || problem.Code != "budget_exhausted" {
		t.Errorf("the eleventh step = %v, want budget_exhausted", err)
	}
}

// TestSigningKeyRotated rotates the key of a jwt tool, and forbids its older versions, while the broker has it cached.
// Forty steps at once all get a token.
func TestSigningKeyRotated(t *testing.T) {
	t.Parallel()
	need(t, false)
	w := newWorld(t, newEnv(t, dev.Config{NoPostgres: true}), nil)
	w.here(nil, nil)
	d, err := w.agent("planner").Open(t.Context(), agent.Chain{Task: "rotated", Rights: []agent.Right{{Tool: "api.call", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	call := agent.Call{Tool: "api.call", Args: agent.Args{"audience": "https://orders.pawl.dev"}}
	if _, err := d.Begin(t.Context(), call); err != nil {
		t.Fatal(err)
	}
	for version := 2; version <= 3; version++ {
		w.asRoot("transit/keys/pawl-tokens/rotate", map[string]any{})
		w.asRoot("transit/keys/pawl-tokens/config", map[string]any{"min_encryption_version": version})
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				if _, err := d.Begin(t.Context(), call); err != nil {
					t.Errorf("a step after rotation %d: %v", version-1, err)
				}
			})
		}
		all.Wait()
	}
}
