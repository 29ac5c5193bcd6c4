package e2e_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// givenUp is a chain with a login and a certificate. The login cannot be ended, because the function that ends logins
// in its database is broken.
type givenUp struct {
	*outage
	said *logBuffer
}

func newGivenUp(t *testing.T) *givenUp {
	t.Helper()
	need(t, true)
	if _, official, err := (parts.Binaries{NoBuild: true}).Vault(t.Context()); err != nil || official {
		parts.Without(t, "vault", "only the Vault built here gives up on a lease in seconds; on PATH is another")
	}
	env := newEnv(t, dev.Config{RevokeRetryBase: 40 * time.Millisecond})
	g := &givenUp{outage: &outage{world: newWorld(t, env, func(c *wire.Config) { c.SweepEvery = time.Second })}, said: &logBuffer{}}
	g.here(slog.New(slog.NewTextHandler(io.MultiWriter(g.said, keptLog(t, g.file)), nil)), nil)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the broker's log:\n%s", g.said)
		}
	})
	g.root = g.open()
	_, l, err := take(t.Context(), g.root, 2*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	g.logins = append(g.logins, l)
	g.certificate(g.root)
	return g
}

// fail breaks the function with which Vault and the broker end logins, as a bad migration would.
func (g *givenUp) fail() {
	g.t.Helper()
	conn := g.oracle.superuser()
	defer conn.Close(context.Background()) //nolint:errcheck // the statement is committed
	if _, err := conn.Exec(g.t.Context(), `CREATE OR REPLACE FUNCTION
		pawl.disable(names text[], OUT done int, OUT obstacle text) LANGUAGE plpgsql AS $$ BEGIN RAISE 'broken by a migration'; END $$`); err != nil {
		g.t.Fatal(err)
	}
}

// mend runs the setup again. The test does nothing else to recover.
func (g *givenUp) mend() {
	g.t.Helper()
	conn := g.oracle.superuser()
	defer conn.Close(context.Background()) //nolint:errcheck // the work is committed
	if err := postgres.Setup(g.t.Context(), conn, postgres.SetupConfig{}); err != nil {
		g.t.Fatal(err)
	}
}

// shows reports whether a grant's record has its lease as given up. It also checks that no record names a lease that
// Vault does not list.
func (g *givenUp) shows(leases []string) bool {
	g.t.Helper()
	var shown []string
	for _, r := range g.grants() {
		if slices.ContainsFunc(r.Evidence, func(e api.Evidence) bool { return strings.Contains(e.Answer, "given up revoking") }) {
			shown = append(shown, r.Lease)
		}
	}
	if len(shown) > 0 && !slices.Equal(shown, leases) {
		g.t.Fatalf("leases %v are shown as given up, but Vault lists %v", shown, leases)
	}
	return len(shown) > 0
}

func (g *givenUp) gauge(want int) bool {
	g.t.Helper()
	return strings.Contains(string(g.metrics(g.t)), fmt.Sprintf("\npawl_irrevocable_leases %d\n", want))
}

// TestRealIrrevocableLease: a lease that a real Vault has given up is shown with its grant, logged once and counted.
// The revocation is PARTIAL while the login works. Once the database is repaired, the broker revokes the lease by
// itself; Vault would never retry.
func TestRealIrrevocableLease(t *testing.T) {
	g := newGivenUp(t)
	g.fail()
	rv := g.revoke(string(g.root.Info().Chain))
	_, err := g.root.Begin(t.Context(), agent.Call{Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}})
	mustRefuse(t, "a step after the acknowledgement", err, agent.ErrRevoked)

	lease := g.oracle.leases("database/creds/pawl-db-read/")
	if len(lease) != 1 {
		t.Fatalf("the login's leases are %v, want one", lease)
	}
	if !within(20*time.Second, func() bool { g.peek(rv.ID, 1, g.end); return g.oracle.irrevocable() == "1" }) {
		t.Fatalf("Vault has given up %s leases after 20 s, want the login's", g.oracle.irrevocable())
	}
	if !within(15*time.Second, func() bool {
		got := g.peek(rv.ID, 1, g.end)
		return got.Closure == string(broker.ClosurePartial) && got.Dead == 1 && got.Alive == 1 && g.shows(lease) && g.gauge(1)
	}) {
		t.Fatalf("the revocation is %+v, grants %+v, metrics\n%s\nwant PARTIAL, with the lease shown as given up and counted",
			g.peek(rv.ID, 1, g.end), g.grants(), g.metrics(t))
	}
	if !g.oracle.works(g.logins[0]) {
		t.Fatal("the login does not work, so the test proves nothing")
	}
	if n := strings.Count(g.said.String(), "Vault has given up revoking lease "+lease[0]); n != 1 {
		t.Errorf("it was logged %d times, want once", n)
	}

	g.mend()
	g.follow(rv.ID, 2)
	g.ended()
	if !within(10*time.Second, func() bool { return g.gauge(0) }) {
		t.Errorf("pawl_irrevocable_leases does not return to 0:\n%s", g.metrics(t))
	}
}
