package postgres_test

import (
	"net"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/plugins/postgres"
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

// TestSilentHost has a tool whose host accepts connections and never answers. The proof of other tools' grants must not
// wait for it each time.
func TestSilentHost(tt *testing.T) {
	t := newTarget(tt)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close() //nolint:errcheck // nothing was written
	t.backend = t.newBackend(postgres.Config{CollectEvery: -1})
	silent := toolAt(listener.Addr().String())
	silent.Name = "silent"
	if err := t.backend.Load(silent); err != nil {
		t.Fatal(err)
	}
	at := t.mint(`{"tables":["orders"]}`).grant
	at.Tool = silent.Name
	other := t.mint(`{"tables":["orders"]}`).grant
	t.sever(at, other)
	t.prove(at, other) // waits for the answer once
	began := time.Now()
	for range 5 {
		e := t.prove(at, other)
		if e[0].Outcome != broker.OutcomeUnknown || e[1].Outcome != broker.OutcomeDead {
			t.Errorf("Prove = %v %q, %v %q, want unknown and dead", e[0].Outcome, e[0].Answer, e[1].Outcome, e[1].Answer)
		}
	}
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("5 proofs beside a host that does not answer took %s, want none to wait for it", took)
	}
}
