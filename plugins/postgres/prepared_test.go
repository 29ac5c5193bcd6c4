package postgres_test

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
)

// elsewhere opens a session of the login in another database.
func (t *target) elsewhere(c credential, database string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), strings.Replace(c.URL, "/"+t.name, "/"+database, 1))
	if err != nil {
		t.Fatalf("logging in to %s = %v", database, sqlState(err))
	}
	t.Cleanup(func() { _ = conn.Close(t.Context()) })
	return conn
}

const preparedLeft = "SELECT count(*) FROM pg_prepared_xact()"

// TestPreparedTransaction leaves a prepared transaction behind. It outlives its session, keeps its locks and can be
// committed later, so the login is not dead before Sever has rolled it back.
func TestPreparedTransaction(tt *testing.T) {
	t := ownTarget(tt)
	for name, prepare := range map[string]func(t *target, c credential){
		"as itself": func(t *target, c credential) {
			t.run(t.login(c), "BEGIN", "INSERT INTO orders (customer, note) VALUES (1, 'prepared')",
				"PREPARE TRANSACTION 'it''s \\ quoted'")
		},
		"as its group": func(t *target, c credential) {
			t.run(t.login(c), `SET ROLE "pawl-shape-`+strings.Split(c.User, "-")[2]+`"`, "BEGIN",
				"INSERT INTO orders (customer, note) VALUES (1, 'prepared')", "PREPARE TRANSACTION 'x'")
		},
		"in another database": func(t *target, c credential) {
			t.run(t.elsewhere(c, "postgres"), "BEGIN", "SELECT lo_create(0)", "PREPARE TRANSACTION 'x'")
		},
		"of its own role": func(t *target, c credential) { t.alterItselfPrepared(c) },
	} {
		tt.Run(name, func(tt *testing.T) {
			t := t.with(tt)
			c, other := t.mint(`{"tables":["orders"],"verbs":["select","insert"]}`), t.mint(`{"tables":["t1"]}`)
			prepare(t, c)
			if n := t.count(preparedLeft); n != 1 {
				t.Fatalf("prepared transactions = %d, want 1", n)
			}
			if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", c.User); err != nil {
				t.Errorf("end_logins = %v, want nil", err)
			}
			if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname = $1", c.User); n != 1 && name != "as its group" {
				t.Error("the role was dropped: only a superuser can end its prepared transaction now")
			}
			if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeAlive {
				t.Errorf("Prove with a prepared transaction = %v %q, want alive", e.Outcome, e.Answer)
			}
			if found := t.find(); !found[c.grant.ID] && name != "as its group" {
				t.Errorf("Find() = %v, want %s", found, c.grant.ID)
			}
			t.sever(c.grant, other.grant)
			if n := t.count(preparedLeft); n != 0 {
				t.Errorf("prepared transactions after Sever = %d, want 0", n)
			}
			if n := t.count("SELECT count(*) FROM orders WHERE note = 'prepared'"); n != 0 {
				t.Errorf("rows of the prepared transaction = %d, want 0", n)
			}
			for _, e := range t.prove(c.grant, other.grant) {
				if e.Outcome != broker.OutcomeDead {
					t.Errorf("Prove after Sever = %v %q, want dead", e.Outcome, e.Answer)
				}
			}
			const lent = `SELECT count(*) FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member
				JOIN pg_roles g ON g.oid = m.roleid WHERE r.rolname LIKE 'pawl-cert-%' AND g.rolname LIKE 'pawl-%'`
			if n := t.count(lent); n != 0 {
				t.Errorf("agents' roles that the revoker is still a member of = %d, want 0", n)
			}
			if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", c.User); err != nil {
				t.Errorf("end_logins = %v, want nil", err)
			}
			if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname = $1", c.User); n != 0 {
				t.Errorf("roles after end_logins = %d, want 0", n)
			}
		})
	}
}

// TestPreparedTransactionStays has a prepared transaction where the revoker cannot connect. The grant stays alive, and
// the error has the statement by which a DBA ends it.
func TestPreparedTransactionStays(tt *testing.T) {
	t := ownTarget(tt)
	dsn, err := t.server.CreateDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	there := pool(tt, dsn)
	name := dsn[strings.LastIndex(dsn, "/")+1 : strings.Index(dsn, "?")]
	c, other := t.mint(`{"tables":["orders"]}`), t.mint(`{"tables":["orders"]}`)
	t.run(t.elsewhere(c, name), "BEGIN", "SELECT lo_create(0)", "PREPARE TRANSACTION 'the agent''s text'")
	t.exec(`REVOKE CONNECT ON DATABASE "` + name + `" FROM PUBLIC`)
	var xid string
	if err := t.root.QueryRow(t.Context(), "SELECT transaction::text FROM pg_prepared_xacts").Scan(&xid); err != nil {
		t.Fatal(err)
	}
	want := "WHERE transaction = '" + xid + "' \\gexec"
	err = t.backend.Sever(t.Context(), []broker.Grant{c.grant, other.grant})
	if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), name) ||
		strings.Contains(err.Error(), "the agent") {
		t.Errorf("Sever = %v, want the statement %q in database %s, without the agent's text", err, want, name)
	}
	e := t.prove(c.grant, other.grant)
	if e[0].Outcome != broker.OutcomeAlive || !strings.Contains(e[0].Answer, want) || !t.refusesLogin(c) {
		t.Errorf("Prove = %v %q, want alive with %q", e[0].Outcome, e[0].Answer, want)
	}
	if e[1].Outcome != broker.OutcomeDead {
		t.Errorf("Prove(another login) = %v %q, want dead", e[1].Outcome, e[1].Answer)
	}
	if err := t.backend.Remove(t.Context(), []broker.GrantID{c.grant.ID}); err != nil {
		t.Error(err)
	}
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeAlive {
		t.Errorf("Prove after Remove = %v %q, want alive", e.Outcome, e.Answer)
	}
	if _, err := there.Exec(t.Context(), "ROLLBACK PREPARED 'the agent''s text'"); err != nil {
		t.Fatal(err)
	}
	t.sever(c.grant)
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
		t.Errorf("Prove after the DBA's statement = %v %q, want dead", e.Outcome, e.Answer)
	}
}
