package postgres_test

import (
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
)

// TestMovedServer points the backend at another server while a login lives at the first one. Nothing that the new
// server shows makes the login dead.
func TestMovedServer(tt *testing.T) {
	old := targetOn(tt, parts.OwnPostgreSQL(tt, parts.PostgresConfig{NoSync: true}))
	t := targetOn(tt, parts.OwnPostgreSQL(tt, parts.PostgresConfig{NoSync: true}))
	c := old.mint(`{"tables":["orders"]}`)
	c.grant.State, c.grant.Lease.Ref = broker.StateIssued, c.User
	conn := old.cursor(c)
	unknown := func(when string) {
		t.Helper()
		if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeUnknown || !strings.Contains(e.Answer, "no record") {
			t.Errorf("Prove at the new server, %s = %v %q, want unknown", when, e.Outcome, e.Answer)
		}
	}
	unknown("before Sever")
	t.sever(c.grant)
	unknown("after Sever")
	// Vault's connection was moved too. The lease must not count as revoked.
	if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", c.User); sqlState(err) != "02000" {
		t.Errorf("end_logins at the new server = %v, want 02000", sqlState(err))
	}
	// A dump of the old database, restored at the new server, has the old records.
	t.exec("DELETE FROM pawl.logins")
	rows, err := old.root.Query(t.Context(), "SELECT grant_id, name, role, server FROM pawl.logins")
	if err != nil {
		t.Fatal(err)
	}
	for rows.Next() {
		values, err := rows.Values()
		if err != nil {
			t.Fatal(err)
		}
		t.exec("INSERT INTO pawl.logins (grant_id, name, role, server) VALUES ($1, $2, $3, $4)", values...)
	}
	unknown("with the records of the old one")
	if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", c.User); sqlState(err) != "02000" {
		t.Errorf("end_logins with the records of the old server = %v, want 02000", sqlState(err))
	}

	if e := old.prove(c.grant)[0]; e.Outcome != broker.OutcomeAlive {
		t.Errorf("Prove at the old server = %v %q, want alive", e.Outcome, e.Answer)
	}
	old.sever(c.grant)
	for range 2 { // Vault repeats a revocation with an unknown outcome
		if _, err := old.vault.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", c.User); err != nil {
			t.Errorf("end_logins at the old server = %v, want nil", sqlState(err))
		}
	}
	if e := old.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead || !old.sessionEnded(conn) {
		t.Errorf("Prove at the old server after Sever = %v %q, want dead", e.Outcome, e.Answer)
	}
}

// TestUpgrade runs the script in a database of version 2, which did not record the server of a login.
func TestUpgrade(tt *testing.T) {
	t := newTarget(tt)
	c := t.mint(`{"tables":["orders"]}`)
	c.grant.State, c.grant.Lease.Ref = broker.StateIssued, c.User
	conn := t.cursor(c)
	t.exec(`CREATE OR REPLACE FUNCTION pawl.version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 2';
		UPDATE pawl.logins SET server = NULL`)
	if err := t.backend.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "run its setup script") {
		t.Errorf("Check before the upgrade = %v, want an error that says what to do", err)
	}
	t.setup()
	if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", c.User); err != nil {
		t.Errorf("end_logins after the upgrade = %v, want nil", sqlState(err))
	}
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead || !t.sessionEnded(conn) {
		t.Errorf("Prove after the upgrade = %v %q, want dead", e.Outcome, e.Answer)
	}
}
