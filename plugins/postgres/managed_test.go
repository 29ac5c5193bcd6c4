package postgres_test

import (
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// TestNoSuperuser sets a database up as the role that a managed service gives: it has CREATEROLE and owns the database.
func TestNoSuperuser(tt *testing.T) {
	server := parts.OwnPostgreSQL(tt, parts.PostgresConfig{NoSync: true, Settings: map[string]string{
		"max_prepared_transactions": "5"}})
	t := &target{T: tt, server: server, root: pool(tt, server.DSN("postgres")), name: "managed"}
	const password = "the password of the administrator in this test"
	verifier, err := postgres.Verifier(password)
	if err != nil {
		t.Fatal(err)
	}
	t.exec("CREATE ROLE administrator LOGIN CREATEROLE CREATEDB PASSWORD '" + verifier + "'")
	t.exec("CREATE DATABASE managed OWNER administrator")
	conn, err := pgx.Connect(t.Context(), server.DSNFor("administrator", password, t.name))
	if err != nil {
		t.Fatal("connecting as the administrator")
	}
	defer conn.Close(t.Context())
	t.run(conn, "CREATE TABLE orders (id serial PRIMARY KEY, customer int); INSERT INTO orders (customer) VALUES (1), (2)")

	cfg := postgres.SetupConfig{VaultPassword: vaultPassword, Tables: []postgres.Grantable{
		{Table: "orders", Verbs: []string{"select", "insert"}}}}
	if err := postgres.Setup(t.Context(), conn, cfg); err == nil {
		t.Error("Setup with the superuser's script = nil, want an error")
	}
	cfg.NoSuperuser = true
	for range 2 { // it may be repeated
		if err := postgres.Setup(t.Context(), conn, cfg); err != nil {
			t.Fatalf("Setup without a superuser = %v, want nil", err)
		}
	}
	if n := t.count("SELECT count(*) FROM pg_auth_members WHERE member = 'administrator'::regrole"); n != 0 {
		t.Errorf("memberships of the administrator after Setup = %d, want 0", n)
	}
	t.root = pool(tt, server.DSN(t.name))
	t.vault = pool(tt, server.DSNFor("pawl_vault", vaultPassword, t.name))
	t.creds = &serviceLogins{vault: t.vault, ttl: time.Hour}
	t.backend = t.newBackend(postgres.Config{})
	if err := t.backend.Check(t.Context()); err != nil {
		t.Fatal(err)
	}

	for _, args := range []string{`{"tables":["orders"],"verbs":["select","insert"]}`,
		`{"tables":["orders"],"verbs":["select","insert"],"filter_column":"customer","filter_value":"1"}`} {
		c := t.mint(args)
		agent := t.login(c)
		t.run(agent, "SELECT FROM "+c.Names["public.orders"], "INSERT INTO "+c.Names["public.orders"]+" (customer) VALUES (1)",
			"BEGIN", "SELECT FROM "+c.Names["public.orders"], "PREPARE TRANSACTION 'x'", "BEGIN",
			"DECLARE c CURSOR FOR SELECT FROM "+c.Names["public.orders"])
		if _, err := t.login(c).Exec(t.Context(), "DELETE FROM "+c.Names["public.orders"]); sqlState(err) != "42501" {
			t.Errorf("DELETE = %v, want 42501", sqlState(err))
		}
		t.sever(c.grant)
		if !t.sessionEnded(agent) || !t.refusesLogin(c) {
			t.Error("the session or the login works after Sever")
		}
		if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
			t.Errorf("Prove after Sever = %v %q, want dead", e.Outcome, e.Answer)
		}
		if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", c.User); err != nil {
			t.Errorf("end_logins = %v, want nil", sqlState(err))
		}
	}
	t.awaitNone("SELECT count(*) FROM pg_roles WHERE rolname LIKE 'pawl-gr%'")
	if err := t.backend.Collect(t.Context(), time.Hour); err != nil {
		t.Errorf("Collect = %v, want nil", err)
	}

	for _, call := range []string{"adopt_logins()", "list_shapes()", "drop_views('orders')"} {
		if _, err := conn.Exec(t.Context(), "SELECT pawl."+call); err != nil {
			t.Errorf("pawl.%s as the administrator = %v, want nil", call, sqlState(err))
		}
	}

	confined := tool()
	confined.Settings["network"] = "office"
	_, _, err = t.backend.Prepare(t.Context(), confined, newGrant(`{"tables":["orders"],"verbs":["select"]}`))
	if broker.KindOf(err) != broker.Denied || !strings.Contains(err.Error(), "without a superuser") {
		t.Errorf("Prepare with a network = %v, want denied, without a superuser", err)
	}
	limits, err := t.backend.Limits(t.Context())
	if text := strings.Join(limits, "\n"); err != nil || strings.Count(text, "\n") != 1 ||
		!strings.Contains(text, "network") || !strings.Contains(text, "large objects") {
		t.Errorf("Limits() = %q, %v, want network and large objects", limits, err)
	}
	if limits, err := newTarget(tt).backend.Limits(t.Context()); err != nil || len(limits) != 0 {
		t.Errorf("Limits() after a superuser's setup = %q, %v, want none", limits, err)
	}
}
