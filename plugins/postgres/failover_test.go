package postgres_test

import (
	"fmt"
	"strings"
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
	t.sever(c.grant)
	if !t.sessionEnded(conn) {
		t.Error("the session at the new primary is open after Sever")
	}
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
		t.Errorf("Prove after the failover = %v %q, want dead", e.Outcome, e.Answer)
	}
}
