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

	"github.com/jackc/pgx/v5"

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

// fail breaks a function of the database, as a bad migration would.
func (g *givenUp) fail(function string) {
	g.t.Helper()
	g.exec("CREATE OR REPLACE FUNCTION " + function + " LANGUAGE plpgsql AS $$ BEGIN RAISE 'broken by a migration'; END $$")
}

func (g *givenUp) exec(statement string) {
	g.t.Helper()
	conn := g.oracle.superuser()
	defer conn.Close(context.Background()) //nolint:errcheck // the statement is committed
	if _, err := conn.Exec(g.t.Context(), statement); err != nil {
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
	g.fail("pawl.disable(names text[], OUT done int, OUT obstacle text)") // Vault and the broker end logins with it
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

// counts reports whether a metric has so many leases that are still being removed.
func (g *givenUp) counts(removing int) bool {
	g.t.Helper()
	return strings.Contains(string(g.metrics(g.t)), fmt.Sprintf("\npawl_leftover_leases{state=\"removing\"} %d\n", removing))
}

// tokens counts the tokens in Vault that were made for a grant.
func (g *givenUp) tokens(grant string) (n int) {
	g.t.Helper()
	listed, err := g.oracle.vault.Logical().ListWithContext(g.t.Context(), "auth/token/accessors")
	if err != nil || listed == nil {
		g.t.Fatalf("listing tokens: %v", err)
	}
	for _, accessor := range listed.Data["keys"].([]any) {
		token, err := g.oracle.vault.Auth().Token().LookupAccessorWithContext(g.t.Context(), fmt.Sprint(accessor))
		if err == nil && strings.Contains(fmt.Sprint(token.Data["display_name"]), grant) {
			n++
		}
	}
	return n
}

// TestRealClosedBeforeLeases: a real PostgreSQL shows a login dead, and a real Vault cannot remove its lease. The
// revocation is CLOSED, and the lease is counted beside it. The step's token is gone, and nothing that Vault does with
// the lease brings the login back: neither a renewal nor a new setup. The login is dropped before Vault ends it, and
// then the lease goes too, without a person's command to Vault.
func TestRealClosedBeforeLeases(t *testing.T) {
	g := newGivenUp(t)
	grant := g.logins[0].Username[len("pawl-"):][:26]
	if n := g.tokens(grant); n != 1 {
		t.Fatalf("%d tokens in Vault are of grant %s, want one", n, grant)
	}
	g.fail("pawl.end_logins(names text[]) RETURNS int") // Vault's revocation statement, which the broker does not need
	rv := g.revoke(string(g.root.Info().Chain))
	g.follow(rv.ID, 2)
	lease := g.oracle.leases("database/creds/pawl-db-read/")
	got := g.peekAny(rv.ID)
	if len(lease) != 1 || got.Leases != 1 || got.Alive+got.Unknown != 0 {
		t.Fatalf("the revocation is %+v while Vault has %v, want one lease still being removed and none alive", got, lease)
	}
	if n := g.tokens(grant); n != 0 {
		t.Errorf("%d tokens in Vault are of the closed grant %s, want none: they could mint", n, grant)
	}
	if _, err := g.oracle.vault.Sys().RenewWithContext(t.Context(), lease[0], 3600); err == nil {
		t.Log("Vault renewed the lease")
	}
	if g.oracle.works(g.logins[0]) {
		t.Error("the login works after a renewal of its lease")
	}
	if !g.counts(1) {
		t.Errorf("pawl_leftover_leases does not count the lease:\n%s", g.metrics(t))
	}
	if !within(20*time.Second, func() bool { return g.oracle.irrevocable() == "1" && g.gauge(1) }) {
		t.Errorf("Vault has given up %s leases after 20 s, want the login's, and pawl_irrevocable_leases counts it",
			g.oracle.irrevocable())
	}

	login := pgx.Identifier{g.logins[0].Username}.Sanitize()
	g.exec("DROP OWNED BY " + login + "; DROP ROLE " + login)
	g.mend()
	if !within(40*time.Second, func() bool { return g.counts(0) && g.peekAny(rv.ID).Leases == 0 }) {
		t.Errorf("the revocation is %+v, want no lease left once the database is mended", g.peekAny(rv.ID))
	}
	g.ended()
	if last := g.peekAny(rv.ID); last.Closure != string(broker.ClosureClosed) || !last.Settled.Equal(got.Settled) {
		t.Errorf("the revocation is %+v, want it CLOSED as before", last)
	}
}

func (g *givenUp) peekAny(id string) api.Revocation {
	g.t.Helper()
	rv, err := g.operator().Revocation(g.t.Context(), id)
	if err != nil {
		g.t.Fatal(err)
	}
	return rv
}
