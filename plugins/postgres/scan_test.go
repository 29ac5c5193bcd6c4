package postgres_test

import (
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
)

// TestEndScansNoRoles checks that ending one login does not read the roles of all others. Vault ends the logins of a
// database one at a time.
func TestEndScansNoRoles(tt *testing.T) {
	t := targetOn(tt, parts.OwnPostgreSQL(tt, parts.PostgresConfig{NoSync: true}))
	const logins, ends = 200, 50
	creds := make([]credential, logins)
	grants := make([]broker.Grant, logins)
	for i := range creds {
		creds[i] = t.mint(`{"tables":["orders"]}`)
		grants[i] = creds[i].grant
	}
	if err := t.backend.Sever(t.Context(), grants); err != nil {
		t.Fatal(err)
	}
	const read = "SELECT coalesce(sum(seq_tup_read), 0)::int FROM pg_stat_sys_tables WHERE relname = 'pg_authid'"
	before := t.count(read)
	conn, err := pgx.ConnectConfig(t.Context(), t.vault.Config().ConnConfig)
	if err != nil {
		t.Fatal(sqlState(err))
	}
	for _, c := range creds[:ends] {
		if _, err := conn.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", c.User); err != nil {
			t.Fatal(sqlState(err))
		}
	}
	pid := conn.PgConn().PID()
	if err := conn.Close(t.Context()); err != nil { // then the server counts what the session has read
		t.Fatal(err)
	}
	t.awaitNone("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid)
	n := t.count(read) - before
	t.Logf("%d roles were read by scans", n)
	if n > ends*logins/2 {
		t.Errorf("roles that were read by scans for %d ends among %d logins = %d, want about none", ends, logins, n)
	}
}
