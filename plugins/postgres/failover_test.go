package postgres_test

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// TestFailover makes the primary read only under the backend's open connections and promotes its standby. The backend
// must leave the old server, and its secrets must reach the new one.
func TestFailover(tt *testing.T) {
	t := ownTarget(tt)
	standby := parts.OwnStandby(tt, t.server)
	there := pool(tt, standby.DSN(t.name))
	_, first, _ := strings.Cut(t.server.Address(), ":")
	_, second, _ := strings.Cut(standby.Address(), ":")
	t.backend.Close()
	backend, err := postgres.New(postgres.Config{Credentials: t.creds, DSN: fmt.Sprintf(
		"host=127.0.0.1,127.0.0.1 port=%s,%s dbname=%s sslmode=disable target_session_attrs=read-write",
		first, second, t.name)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(backend.Close)
	t.backend = backend
	if err := t.backend.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	c := t.mint(`{"tables":["orders"]}`)
	c.grant.State, c.grant.Lease.Ref = broker.StateIssued, c.User
	if got := fmt.Sprint(c.Port); got != first {
		t.Errorf("port of the secret = %s, want the primary's %s", got, first)
	}
	for _, address := range []string{t.server.Address(), standby.Address()} {
		if !strings.Contains(c.URL, address) {
			t.Errorf("the secret's URL does not name %s", address)
		}
	}
	r := &replica{target: t, standby: standby, there: there}
	r.replay()
	t.exec("ALTER SYSTEM SET default_transaction_read_only = on")
	t.exec("SELECT pg_reload_conf()")
	t.await("SELECT (current_setting('default_transaction_read_only') = 'on')::int", 1)
	r.execThere("SELECT pg_promote()")

	conn, err := pgx.Connect(t.Context(), c.URL)
	if err != nil {
		t.Fatalf("logging in with the secret after the failover = %v", sqlState(err))
	}
	var port string
	if err := conn.QueryRow(t.Context(), "SHOW port").Scan(&port); err != nil || port != second {
		t.Errorf("the secret reaches port %s, %v, want the new primary's %s", port, err, second)
	}
	if _, _, err := t.backend.Prepare(t.Context(), tool(), newGrant(`{"tables":["t1"]}`)); err != nil {
		t.Errorf("Prepare after the failover = %v, want nil", err)
	}
	t.vault = pool(tt, standby.DSNFor("pawl_vault", vaultPassword, t.name))
	if got := fmt.Sprint(t.mint(`{"tables":["t1"]}`).Port); got != second {
		t.Errorf("port of the secret after the failover = %s, want the new primary's %s", got, second)
	}
	t.sever(c.grant)
	if !t.sessionEnded(conn) {
		t.Error("the session at the new primary is open after Sever")
	}
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeUnknown || !strings.Contains(e.Answer, "promotion") {
		t.Errorf("Prove after the failover = %v %q, want unknown: the old server may take the login", e.Outcome, e.Answer)
	}
	r.execThere("SELECT pawl.adopt_logins()")
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
		t.Errorf("Prove after adopt_logins = %v %q, want dead", e.Outcome, e.Answer)
	}
}

// TestStandbyFirst has a DSN whose first server is a standby that does not know the latest logins. The broker and its
// agents must reach the primary.
func TestStandbyFirst(tt *testing.T) {
	r := newReplica(tt)
	r.execThere("SELECT pg_wal_replay_pause()")
	_, first, _ := strings.Cut(r.standby.Address(), ":")
	_, second, _ := strings.Cut(r.server.Address(), ":")
	for _, attributes := range []string{"", "target_session_attrs=read-write"} {
		backend, err := postgres.New(postgres.Config{Credentials: r.creds, DSN: fmt.Sprintf(
			"host=127.0.0.1,127.0.0.1 port=%s,%s dbname=%s sslmode=disable %s", first, second, r.name, attributes)})
		if err != nil {
			r.Fatal(err)
		}
		r.Cleanup(backend.Close)
		r.backend = backend
		c := r.mint(`{"tables":["orders"]}`)
		conn := r.login(c)
		r.sever(c.grant)
		if e := r.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead || !r.sessionEnded(conn) {
			r.Errorf("Prove at the primary = %v %q, want dead", e.Outcome, e.Answer)
		}
	}
}

// TestReadOnlyByDefault ends a login in a database that is read only by default, as some are while their disk is full.
func TestReadOnlyByDefault(tt *testing.T) {
	t := ownTarget(tt)
	c := t.mint(`{"tables":["orders"]}`)
	conn := t.login(c)
	t.exec("ALTER DATABASE " + t.name + " SET default_transaction_read_only = on")
	t.backend = t.newBackend(postgres.Config{})
	t.sever(c.grant)
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead || !t.sessionEnded(conn) || !t.refusesLogin(c) {
		t.Errorf("Prove = %v %q, want dead", e.Outcome, e.Answer)
	}
}

// TestFailoverBehindOneName has a DSN with one name that leads to the primary, as a managed service gives it. The primary
// stops, the standby is promoted, and the name follows.
func TestFailoverBehindOneName(tt *testing.T) {
	r := newReplica(tt)
	var moved atomic.Bool
	r.backend = r.backendAt(forward(tt, func() string {
		if moved.Load() {
			return r.standby.Address()
		}
		return r.server.Address()
	}))
	c := r.mint(`{"tables":["orders"]}`)
	c.grant.State, c.grant.Lease.Ref = broker.StateIssued, c.User
	r.replay()
	if err := r.server.Stop(); err != nil {
		r.Fatal(err)
	}
	r.execThere("SELECT pg_promote()")
	moved.Store(true)
	conn, err := pgx.Connect(r.Context(), c.URL)
	if err != nil {
		r.Fatalf("logging in with the secret after the failover = %v", sqlState(err))
	}
	r.sever(c.grant)
	if !r.sessionEnded(conn) {
		r.Error("the session at the new primary is open after Sever")
	}
	if e := r.prove(c.grant)[0]; e.Outcome != broker.OutcomeUnknown || !strings.Contains(e.Answer, "promotion") {
		r.Errorf("Prove after the failover = %v %q, want unknown: the old server may take the login", e.Outcome, e.Answer)
	}
	r.execThere("SELECT pawl.adopt_logins()")
	if e := r.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
		r.Errorf("Prove after adopt_logins = %v %q, want dead", e.Outcome, e.Answer)
	}
	r.vault = pool(tt, r.standby.DSNFor("pawl_vault", vaultPassword, r.name))
	r.run(r.login(r.mint(`{"tables":["t1"]}`)), "SELECT FROM t1")
}
