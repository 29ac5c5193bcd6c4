package postgres_test

import (
	"testing"

	"github.com/pawlsec/pawl/broker"
)

// TestAdoptLostLogin has a login that the server before a failover made and that the new primary never saw. Once a DBA
// has said that the first server has stopped for good, the login is dead, and not before.
func TestAdoptLostLogin(tt *testing.T) {
	t := newTarget(tt)
	lost := func() broker.Grant {
		c := t.mint(`{"tables":["orders"]}`)
		c.grant.State, c.grant.Lease.Ref = broker.StateIssued, c.User
		t.exec(`DROP ROLE "` + c.User + `"`)
		t.exec("DELETE FROM pawl.logins WHERE name = $1", c.User)
		return c.grant
	}
	g, later := lost(), lost()
	t.sever(g)
	if e := t.prove(g)[0]; e.Outcome != broker.OutcomeUnknown {
		t.Errorf("Prove before the adoption = %v %q, want unknown", e.Outcome, e.Answer)
	}
	t.exec("SELECT pawl.adopt_logins()")
	if e := t.prove(g)[0]; e.Outcome != broker.OutcomeDead {
		t.Errorf("Prove after the adoption = %v %q, want dead", e.Outcome, e.Answer)
	}
	t.sever(later)
	if e := t.prove(later)[0]; e.Outcome != broker.OutcomeUnknown {
		t.Errorf("Prove of a login that was not barred at the adoption = %v %q, want unknown", e.Outcome, e.Answer)
	}
}
