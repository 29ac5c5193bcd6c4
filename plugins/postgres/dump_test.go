package postgres_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// client runs a client program of PostgreSQL with a connection to a database, and returns its output.
func client(tt *testing.T, server *parts.PostgresServer, name string, args ...string) (string, error) {
	tt.Helper()
	host, port, _ := strings.Cut(server.Address(), ":")
	c := exec.CommandContext(tt.Context(), parts.NeedPostgreSQLProgram(tt, name), args...)
	c.Dir = tt.TempDir() // a program of PostgreSQL fails in a directory that another test removes
	c.Env = append(os.Environ(), "PGHOST="+host, "PGPORT="+port, "PGUSER=postgres", "PGPASSWORD="+server.Password())
	out, err := c.CombinedOutput()
	return string(out), err
}

// TestDump restores a dump of a database at another server, with the roles made first and without them.
func TestDump(tt *testing.T) {
	old := newTarget(tt)
	const filtered = `{"tables":["orders"],"verbs":["select"],"filter_column":"customer","filter_value":"1"}`
	left := old.mint(`{"tables":["orders"]}`)
	old.mint(filtered)
	dump := filepath.Join(tt.TempDir(), "dump")
	if out, err := client(tt, old.server, "pg_dump", "--format=custom", "--file="+dump, old.name); err != nil {
		tt.Fatalf("pg_dump = %v, %s", err, out)
	}
	for name, rolesFirst := range map[string]bool{"with the roles first": true, "without the roles": false} {
		tt.Run(name, func(tt *testing.T) {
			server := parts.OwnPostgreSQL(tt, parts.PostgresConfig{NoSync: true})
			t := &target{T: tt, server: server, root: pool(tt, server.DSN("postgres")), name: old.name}
			if rolesFirst {
				t.exec("BEGIN; " + postgres.Bootstrap() + "; DROP SCHEMA pawl CASCADE; COMMIT")
			}
			t.exec("CREATE DATABASE " + t.name)
			out, err := client(tt, server, "pg_restore", "--dbname="+t.name, dump)
			t.Logf("pg_restore: %v, %d errors", err, strings.Count(out, "error:"))
			for _, line := range strings.Split(out, "\n") {
				if rolesFirst && strings.Contains(line, "error:") && !strings.Contains(line, `role "pawl-`) {
					t.Errorf("pg_restore with the roles first: %s", line)
				}
			}
			t.root = pool(tt, server.DSN(t.name))
			conn, err := pgx.Connect(t.Context(), server.DSN(t.name))
			if err != nil {
				t.Fatal("connecting to the restored database")
			}
			defer conn.Close(t.Context())
			cfg := postgres.SetupConfig{VaultPassword: vaultPassword, Tables: []postgres.Grantable{
				{Table: "orders", Verbs: []string{"select", "insert", "update", "delete"}}}}
			if rolesFirst { // version 1 did not record the server of a login
				t.exec(`CREATE OR REPLACE FUNCTION pawl.version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1';
					UPDATE pawl.logins SET server = NULL`)
			}
			err = postgres.Setup(t.Context(), conn, cfg)
			if !rolesFirst {
				const mend = "DROP SCHEMA pawl CASCADE"
				if err == nil || !strings.Contains(err.Error(), mend) {
					t.Fatalf("Setup after a restore without the roles = %v, want an error that names %s", err, mend)
				}
				t.exec(mend)
				err = postgres.Setup(t.Context(), conn, cfg)
			}
			if err != nil {
				t.Fatalf("Setup in the restored database = %v, want nil", err)
			}
			t.vault = pool(tt, server.DSNFor("pawl_vault", vaultPassword, t.name))
			t.creds = &serviceLogins{vault: t.vault, ttl: time.Hour}
			t.backend = t.newBackend(postgres.Config{})
			for _, args := range []string{`{"tables":["orders"]}`, filtered} {
				c := t.mint(args)
				t.run(t.login(c), "SELECT FROM "+c.Names["public.orders"])
				t.sever(c.grant)
				if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
					t.Errorf("Prove after Sever = %v %q, want dead", e.Outcome, e.Answer)
				}
			}
			left.grant.State, left.grant.Lease.Ref = broker.StateIssued, left.User
			if e := t.prove(left.grant)[0]; e.Outcome == broker.OutcomeDead {
				t.Errorf("Prove of a login at the old server = dead %q, want unknown", e.Answer)
			}
			if err := t.backend.Collect(t.Context(), time.Hour); err != nil {
				t.Errorf("Collect = %v, want nil", err)
			}
		})
	}
}
