package e2e_test

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// tick gives a pause in which nothing is sent.
func tick() <-chan time.Time { return time.After(100 * time.Millisecond) }

// ill is a fault of Vault, and the error that an agent gets.
type ill struct {
	path string
	fault
	code broker.Code
}

// TestBadVault spoils Vault's answers one after the other. The agent gets the right error, no mint is sent twice, no
// token is sent to another host, and in the end nothing is alive.
func TestBadVault(t *testing.T) {
	t.Parallel()
	need(t, true)
	env := newEnv(t, dev.Config{})
	p := newProxy(t, env)
	var elsewhere atomic.Int32
	other := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	defer other.Close()
	redirect := func(w http.ResponseWriter, r *http.Request, real func() *httptest.ResponseRecorder) {
		real()
		http.Redirect(w, r, other.URL+r.URL.Path, http.StatusTemporaryRedirect)
	}
	text := func(s string) fault { return body(func(string) string { return s }) }
	rows := map[string]ill{
		"500 after the mint":           {mintPath, status(500), broker.CodeOutcomeUnknown},
		"412 after the mint":           {mintPath, status(412), broker.CodeOutcomeUnknown},
		"429 after the mint":           {mintPath, status(429), broker.CodeOutcomeUnknown},
		"a lie: 403 after the mint":    {mintPath, status(403), broker.CodeVaultRefused},
		"cut after the mint":           {mintPath, cut, broker.CodeOutcomeUnknown},
		"redirect to another host":     {mintPath, redirect, broker.CodeOutcomeUnknown},
		"nothing in a 200":             {mintPath, text(""), broker.CodeOutcomeUnknown},
		"null":                         {mintPath, text("null"), broker.CodeOutcomeUnknown},
		"a login page":                 {mintPath, text("<html><form>"), broker.CodeOutcomeUnknown},
		"half an answer":               {mintPath, body(func(s string) string { return s[:len(s)/2] }), broker.CodeOutcomeUnknown},
		"more after the answer":        {mintPath, body(func(s string) string { return s + "{}" }), broker.CodeOutcomeUnknown},
		"two lease ids":                {mintPath, body(func(s string) string { return strings.Replace(s, "{", `{"lease_id":"a",`, 1) }), broker.CodeOutcomeUnknown},
		"a lease id in another case":   {mintPath, body(func(s string) string { return strings.Replace(s, "{", `{"Lease_ID":"a",`, 1) }), broker.CodeOutcomeUnknown},
		"no lease id":                  {mintPath, member(t, "lease_id", nil), broker.CodeOutcomeUnknown},
		"the lease of another mount":   {mintPath, member(t, "lease_id", "pki/issue/pawl-client/aaaaaaaaaaaaaaaaaaaaaaaa"), broker.CodeOutcomeUnknown},
		"a lease for a day":            {mintPath, member(t, "lease_duration", 86400), broker.CodeOutcomeUnknown},
		"a lease without an end":       {mintPath, member(t, "lease_duration", 0), broker.CodeOutcomeUnknown},
		"200 MB":                       {mintPath, huge, broker.CodeOutcomeUnknown},
		"a byte now and then":          {mintPath, drip, broker.CodeOutcomeUnknown},
		"500 after a token was made":   {childPath, status(500), broker.CodeVaultDown},
		"cut after a token was made":   {childPath, cut, broker.CodeVaultDown},
		"redirect of the step's token": {childPath, redirect, broker.CodeVaultDown},
		"nothing in place of a token":  {childPath, text(""), broker.CodeVaultDown},
	}
	w := newWorld(t, env, func(c *wire.Config) { c.Vault.NoTokenAhead = true }) // each step asks Vault for its token
	p.use(t, &w.config)
	w.here(nil, nil)
	d, err := w.agent("planner").Open(t.Context(), agent.Chain{Task: "bad vault", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	w.healthy(d)
	for _, name := range slices.Sorted(maps.Keys(rows)) {
		row := rows[name]
		p.spoil(row.path, row.fault)
		_, _, err := take(t.Context(), d, 0)
		unavailable(t, name, err, row.code)
		if n := p.requests(); n != 1 {
			t.Errorf("%s: Vault got %d requests, want one", name, n)
		}
	}
	w.healthy(d)
	w.allClosed(4 * bound)
	w.oracle.untilNone(w.before, 2*time.Second)
	if n := elsewhere.Load(); n != 0 {
		t.Errorf("%d requests went to the host that a redirect named", n)
	}
}

// unavailable checks that a refusal has status 503 and the code of the failing part.
func unavailable(t *testing.T, what string, err error, want broker.Code) {
	t.Helper()
	var problem *agent.Error
	switch {
	case err == nil:
		t.Errorf("%s: a secret was handed out", what)
	case !errors.As(err, &problem):
		t.Errorf("%s: %v, want a problem", what, err)
	case problem.Code != api.Code(want) || problem.Status != http.StatusServiceUnavailable:
		t.Errorf("%s: got %d %s, want 503 %s", what, problem.Status, problem.Code, want)
	}
}

// healthy takes a step and closes it, with retries until it works.
func (w *world) healthy(d *agent.Delegation) {
	w.t.Helper()
	var err error
	if !within(15*time.Second, func() bool {
		var step *agent.Step
		if step, _, err = take(w.t.Context(), d, 0); err == nil {
			err = step.Close(w.t.Context())
		}
		return err == nil
	}) {
		w.t.Fatalf("a step with a healthy Vault: %v", err)
	}
}

// TestVaultOutOfOrder seals, kills and pauses Vault under a broker with a live secret. Steps are refused, fences
// hold, and the secrets that were revoked meanwhile are dead when Vault is back.
func TestVaultOutOfOrder(t *testing.T) {
	t.Parallel()
	need(t, true)
	env := newEnv(t, dev.Config{})
	v := env.Vault
	for _, row := range []struct {
		name           string
		break_, repair func(context.Context) error
	}{
		{"sealed", v.Seal, v.Unseal},
		{"killed", func(context.Context) error { return v.Kill() }, v.Restart},
		{"paused", func(context.Context) error { return v.Pause() }, func(context.Context) error { return v.Continue() }},
	} {
		t.Run(row.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			w := newWorld(t, env, nil)
			w.here(nil, nil)
			rights := []agent.Right{{Tool: "db.read", Use: true}}
			doomed, err := w.agent("planner").Open(ctx, agent.Chain{Task: "revoked while Vault is out", Rights: rights})
			if err != nil {
				t.Fatal(err)
			}
			lasting, err := w.agent("writer").Open(ctx, agent.Chain{Task: "goes on", Rights: rights})
			if err != nil {
				t.Fatal(err)
			}
			w.healthy(lasting)
			_, l, err := take(ctx, doomed, 0)
			if err != nil {
				t.Fatal(err)
			}

			if err := row.break_(ctx); err != nil {
				t.Fatal(err)
			}
			_, _, err = take(ctx, lasting, 0)
			unavailable(t, "a step", err, broker.CodeVaultDown)
			asked := time.Now()
			rv, err := w.operator().Revoke(ctx, api.RevokeRequest{Selector: "chain:" + string(doomed.Info().Chain), Reason: "Vault is out"})
			if err != nil {
				t.Fatalf("fencing while Vault is %s: %v", row.name, err)
			}
			if took := time.Since(asked); took > time.Second {
				t.Errorf("fencing while Vault is %s took %v", row.name, took)
			}
			_, _, err = take(ctx, doomed, 0)
			mustRefuse(t, "a step under the fence", err, agent.ErrRevoked)
			// Severing at PostgreSQL needs no Vault.
			if !within(5*time.Second, func() bool { return !w.oracle.works(l) }) {
				t.Errorf("the login still works while Vault is %s", row.name)
			}
			if rv, err = w.operator().Revocation(ctx, rv.ID); err != nil || rv.Closure == string(broker.ClosureClosed) {
				t.Errorf("closure = %s, %v while Vault is %s: there is no proof of that yet", rv.Closure, err, row.name)
			}

			if err := row.repair(ctx); err != nil {
				t.Fatal(err)
			}
			if err := w.operator().Follow(ctx, rv.ID, func(now api.Revocation) error { rv = now; return nil }); err != nil {
				t.Fatal(err)
			}
			if rv.Closure != string(broker.ClosureClosed) || rv.Dead != 1 {
				t.Errorf("closure = %s with %d dead, want CLOSED with 1", rv.Closure, rv.Dead)
			}
			w.healthy(lasting)
			w.allClosed(4 * bound)
			w.oracle.untilNone(w.before, 5*time.Second)
		})
	}
}

// TestSlowTarget makes PostgreSQL delay a login for longer than a mint may take.
func TestSlowTarget(t *testing.T) {
	t.Parallel()
	need(t, true)
	w := newWorld(t, newEnv(t, dev.Config{}), nil)
	w.here(nil, nil)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	d, err := w.agent("planner").Open(ctx, agent.Chain{Task: "slow", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	w.healthy(d)
	conn := w.oracle.superuser()
	defer conn.Close(context.Background()) //nolint:errcheck // closing ends its transaction
	// Reads still work, and no role can be made.
	if _, err := conn.Exec(ctx, "BEGIN; LOCK TABLE pg_authid IN EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	_, _, err = take(ctx, d, 0)
	unavailable(t, "a step while no role can be made", err, broker.CodeOutcomeUnknown)
	if _, err := conn.Exec(ctx, "ROLLBACK", pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Fatal(err)
	}
	w.allClosed(4 * bound)
	w.oracle.untilNone(w.before, 2*time.Second)
	w.healthy(d)
}
