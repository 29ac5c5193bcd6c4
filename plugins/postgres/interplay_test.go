package postgres_test

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
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
	if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", g.Lease.Ref); err != nil {
		t.Errorf("end_logins after the adoption = %v, want nil", sqlState(err))
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

// TestStandbyBalanced lets the address of a standby lead to two servers by turns. The proof says so, and the sessions
// at the standby end nevertheless.
func TestStandbyBalanced(tt *testing.T) {
	r := newReplica(tt)
	var balanced atomic.Bool
	var n atomic.Int64
	address := forward(tt, func() string {
		if balanced.Load() && n.Add(1)%2 == 0 {
			return r.server.Address()
		}
		return r.standby.Address()
	})
	host, port, _ := strings.Cut(address, ":")
	r.backend = r.newBackend(postgres.Config{Standbys: []string{
		fmt.Sprintf("host=%s port=%s dbname=%s sslmode=disable", host, port, r.name)}})
	c := r.mint(`{"tables":["orders"]}`)
	r.settles("a connection of the revoker at the standby", func() bool {
		var n int
		return r.there.QueryRow(r.Context(), revokerSessions).Scan(&n) == nil && n > 0
	})
	conn := r.loginThere(c)
	balanced.Store(true)
	const want = "leads to several servers"
	if err := r.backend.CheckStandbys(r.Context()); err == nil || !strings.Contains(err.Error(), want) {
		r.Errorf("CheckStandbys = %v, want an error with %q", err, want)
	}
	if err := r.backend.Sever(r.Context(), []broker.Grant{c.grant}); err != nil && strings.Contains(err.Error(), want) {
		r.Errorf("Sever = %v, want it to end the sessions", err)
	}
	if !r.sessionEnded(conn) {
		r.Error("the session at the standby is open after Sever")
	}
	if e := r.prove(c.grant)[0]; e.Outcome != broker.OutcomeUnknown || !strings.Contains(e.Answer, want) {
		r.Errorf("Prove = %v %q, want unknown, with %q", e.Outcome, e.Answer, want)
	}
}

// TestUpgradeThenFailover runs the script in a database of version 2, and promotes its standby after that.
func TestUpgradeThenFailover(tt *testing.T) {
	r := newReplica(tt)
	c := r.mint(`{"tables":["orders"]}`)
	c.grant.State, c.grant.Lease.Ref = broker.StateIssued, c.User
	conn := r.cursor(c)
	r.exec(`CREATE OR REPLACE FUNCTION pawl.version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 2';
		UPDATE pawl.logins SET server = NULL, timeline = NULL`)
	r.setup()
	r.exec("CREATE TABLE upgraded ()")
	r.settles("the upgrade at the standby", func() bool {
		var n int
		return r.there.QueryRow(r.Context(), "SELECT count(*) FROM upgraded").Scan(&n) == nil
	})
	r.execThere("SELECT pg_promote()")
	host, port, _ := strings.Cut(r.standby.Address(), ":")
	r.vault = pool(tt, r.standby.DSNFor("pawl_vault", vaultPassword, r.name))
	r.creds = &serviceLogins{vault: r.vault, ttl: time.Hour}
	r.backend = r.newBackend(postgres.Config{Credentials: r.creds,
		DSN: fmt.Sprintf("host=%s port=%s dbname=%s sslmode=disable", host, port, r.name)})
	r.sever(c.grant)
	r.run(conn, "FETCH c")
	if e := r.prove(c.grant)[0]; e.Outcome != broker.OutcomeUnknown {
		r.Errorf("Prove while the agent reads at the first server = %v %q, want unknown", e.Outcome, e.Answer)
	}
}

// TestStandbyStaysFull proves an end while the sessions of another agent hold all connections of a standby.
func TestStandbyStaysFull(tt *testing.T) {
	r := newReplicaOf(targetOn(tt, parts.OwnPostgreSQL(tt, parts.PostgresConfig{NoSync: true, MaxConnections: 30})))
	clock := &clock{now: time.Now()}
	r.backend.Close()
	r.backend = r.newBackend(postgres.Config{CollectEvery: -1, Standbys: []string{r.dsn()}, Now: clock.Now})
	r.ends(r.mint(`{"tables":["orders"]}`).grant)
	c, other := r.mint(`{"tables":["orders"]}`), r.mint(`{"tables":["t1"]}`)
	r.loginThere(other)
	r.settles("filling the standby", func() bool {
		conn, err := r.tryThere(other)
		if err == nil {
			r.Cleanup(func() { _ = conn.Close(context.WithoutCancel(r.Context())) })
		}
		return sqlState(err) == "53300"
	})
	clock.add(2 * time.Minute)
	r.ends(c.grant)
}

// TestFindRenamed looks for what works without knowing the grants, as after a failover. A login that was renamed works.
func TestFindRenamed(tt *testing.T) {
	t := newTarget(tt)
	c := t.mint(`{"tables":["orders"]}`)
	t.exec(`ALTER ROLE "` + c.User + `" RENAME TO "renamed_` + t.name + `"`)
	if !t.find()[c.grant.ID] {
		t.Error("Find does not return a login that was renamed")
	}
	t.sever(c.grant)
	if t.find()[c.grant.ID] {
		t.Error("Find returns a renamed login after Sever")
	}
	t.exec(`DROP ROLE "renamed_` + t.name + `"`)
}

// TestStandbyMoves lets the name of a standby lead to another standby while the backend's connection stays with the
// first. The agent reads at the other one, and the grant must not be called dead.
func TestStandbyMoves(tt *testing.T) {
	r := newReplica(tt)
	other := &replica{target: r.target, standby: parts.OwnStandby(tt, r.server)}
	other.there = pool(tt, other.standby.DSN(r.name))
	var moved atomic.Bool
	address := forward(tt, func() string {
		if moved.Load() {
			return other.standby.Address()
		}
		return r.standby.Address()
	})
	clock := &clock{now: time.Now()}
	host, port, _ := strings.Cut(address, ":")
	r.backend.Close()
	r.backend = r.newBackend(postgres.Config{CollectEvery: -1, Now: clock.Now, Standbys: []string{
		fmt.Sprintf("host=%s port=%s dbname=%s sslmode=disable", host, port, r.name)}})
	r.ends(r.mint(`{"tables":["orders"]}`).grant)
	c := r.mint(`{"tables":["orders"]}`)
	moved.Store(true)
	clock.add(2 * time.Minute)
	reader := other.loginThere(c)
	r.run(reader, "BEGIN", "DECLARE c CURSOR FOR SELECT o.id FROM orders o, generate_series(1, 1000)", "FETCH c")
	if err := r.backend.Sever(r.Context(), []broker.Grant{c.grant}); err != nil {
		r.Logf("Sever = %v", err)
	}
	other.replay()
	r.replay()
	r.run(reader, "FETCH c")
	if e := r.prove(c.grant)[0]; e.Outcome != broker.OutcomeUnknown || !strings.Contains(e.Answer, "several servers") {
		r.Errorf("Prove while the agent reads at the other standby = %v %q, want unknown", e.Outcome, e.Answer)
	}
}

// TestTwoPrimaries lets the name in dsn lead to a promoted standby while the first server lives on, so that the broker
// has connections to both. Each server is severed alone. A proof may not join what one server shows to what the other
// has recorded: the login works at the other one.
func TestTwoPrimaries(tt *testing.T) {
	for name, severed := range map[string]func(*replica, string){
		"severed at the new server":   func(r *replica, sql string) { r.execThere(sql) },
		"severed at the first server": func(r *replica, sql string) { r.exec(sql) },
	} {
		tt.Run(name, func(tt *testing.T) {
			r := newReplica(tt)
			var moved atomic.Bool
			address := forward(tt, func() string {
				if moved.Load() {
					return r.standby.Address()
				}
				return r.server.Address()
			})
			clock := &clock{now: time.Now()}
			r.backend = r.backendWith(address, clock.Now)
			c := r.mint(`{"tables":["orders"]}`)
			c.grant.State, c.grant.Lease.Ref = broker.StateIssued, c.User
			r.replay()
			prove := func() { // over up to four connections
				each(4, 4, func(int) {
					found, err := r.backend.Prove(r.Context(), []broker.Grant{c.grant})
					if err == nil && found[0].Outcome == broker.OutcomeDead {
						r.Errorf("Prove = dead %q, and the login works at the other server", found[0].Answer)
					}
				})
			}
			prove()
			r.exec(`SELECT pg_terminate_backend(pid) FROM (SELECT a.pid FROM pg_stat_activity a
				JOIN pg_auth_members m ON m.member = a.usesysid WHERE m.roleid = 'pawl_revoker'::regrole LIMIT 2) a`)
			r.execThere("SELECT pg_promote()")
			moved.Store(true)
			severed(r, "SELECT pawl.sever(ARRAY['"+string(c.grant.ID)+"'])")
			for range 50 {
				clock.add(10 * time.Second) // what was seen of the name before is too old
				if prove(); r.Failed() {
					break
				}
			}
		})
	}
}
