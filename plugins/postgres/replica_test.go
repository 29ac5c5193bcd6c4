package postgres_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// replica is a target with a hot standby at which agents read.
type replica struct {
	*target
	standby *parts.PostgresServer
	there   *pgxpool.Pool // the superuser at the standby
}

func newReplica(tt *testing.T) *replica { return newReplicaOf(ownTarget(tt)) }

func newReplicaOf(t *target) *replica {
	r := &replica{target: t, standby: parts.OwnStandby(t, t.server)}
	r.there = pool(t.T, r.standby.DSN(t.name))
	t.backend.Close()
	t.backend = t.newBackend(postgres.Config{Standbys: []string{r.dsn()}})
	return r
}

func (r *replica) dsn() string {
	host, port, _ := strings.Cut(r.standby.Address(), ":")
	return fmt.Sprintf("host=%s port=%s dbname=%s sslmode=disable", host, port, r.name)
}

// loginThere opens a session with the raw secret at the standby, once the standby has the login.
func (r *replica) loginThere(c credential) *pgx.Conn {
	r.Helper()
	r.replay()
	conn, err := r.tryThere(c)
	if err != nil {
		r.Fatalf("logging in at the standby = %v", sqlState(err))
	}
	r.Cleanup(func() { _ = conn.Close(context.WithoutCancel(r.Context())) })
	return conn
}

func (r *replica) tryThere(c credential) (*pgx.Conn, error) {
	config, err := pgx.ParseConfig(c.URL)
	if err != nil {
		r.Fatal("the URL of a secret does not parse")
	}
	config.Host = "127.0.0.1"
	if _, err := fmt.Sscanf(r.standby.Address(), "127.0.0.1:%d", &config.Port); err != nil {
		r.Fatal(err)
	}
	return pgx.ConnectConfig(r.Context(), config)
}

// replay waits until the standby has everything that the primary has.
func (r *replica) replay() {
	r.Helper()
	var at string
	if err := r.root.QueryRow(r.Context(), "SELECT pg_current_wal_flush_lsn()::text").Scan(&at); err != nil {
		r.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(r.Context(), 20*time.Second)
	defer cancel()
	for done := false; !done; {
		if err := r.there.QueryRow(ctx, "SELECT pg_last_wal_replay_lsn() >= $1::pg_lsn", at).Scan(&done); err != nil {
			r.Fatalf("the standby does not reach %s: %v", at, err)
		}
	}
}

func (r *replica) execThere(sql string) {
	r.Helper()
	if _, err := r.there.Exec(r.Context(), sql); err != nil {
		r.Fatalf("%s at the standby = %v", sql, err)
	}
}

// TestStandby severs a login with sessions at a hot standby. PostgreSQL itself ends none of these sessions, not even
// when the login is dropped.
func TestStandby(tt *testing.T) {
	r := newReplica(tt)
	c := r.mint(`{"tables":["orders"]}`)
	reader, asGroup := r.loginThere(c), r.loginThere(c)
	r.run(reader, "BEGIN", "DECLARE c CURSOR FOR SELECT o.id FROM orders o, generate_series(1, 1000)", "FETCH c")
	r.run(asGroup, `SET ROLE "pawl-shape-`+strings.Split(c.User, "-")[2]+`"`, "SELECT FROM orders")
	if _, err := r.vault.Exec(r.Context(), "SELECT pawl.end_logins(ARRAY[$1])", c.User); err != nil {
		r.Fatal(err)
	}
	r.replay()
	r.run(reader, "FETCH c")
	r.run(asGroup, "SELECT FROM orders")
	if e := r.prove(c.grant)[0]; e.Outcome != broker.OutcomeAlive || !strings.Contains(e.Answer, "standby") {
		r.Errorf("Prove with sessions at the standby = %v %q, want alive, at the standby", e.Outcome, e.Answer)
	}
	if found := r.find(); !found[c.grant.ID] {
		r.Errorf("Find() = %v, want %s", found, c.grant.ID)
	}
	if err := r.backend.CheckStandbys(r.Context()); err != nil {
		r.Errorf("CheckStandbys = %v, want nil", err)
	}
	var starting int
	if err := r.there.QueryRow(r.Context(), "SELECT cardinality(starting) FROM pawl.cut('{}')").Scan(&starting); err != nil {
		r.Fatal(err)
	}
	if starting != 0 {
		r.Errorf("processes that are starting up at the idle standby = %d, want 0", starting)
	}
	r.sever(c.grant)
	if !r.sessionEnded(reader) || !r.sessionEnded(asGroup) {
		r.Error("a session at the standby is open after Sever")
	}
	if _, err := r.tryThere(c); !strings.HasPrefix(sqlState(err), "28") {
		r.Errorf("logging in at the standby after Sever = %v, want class 28", sqlState(err))
	}
	if e := r.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
		r.Errorf("Prove after Sever = %v %q, want dead", e.Outcome, e.Answer)
	}
}

// TestStandbyBehind severs while the standby does not replay, and while it is down. The login is not dead.
func TestStandbyBehind(tt *testing.T) {
	r := newReplica(tt)
	c, other := r.mint(`{"tables":["orders"]}`), r.mint(`{"tables":["orders"]}`)
	conn := r.loginThere(c)
	r.execThere("SELECT pg_wal_replay_pause()")
	late := r.mint(`{"tables":["orders"]}`)
	err := r.backend.Sever(r.Context(), []broker.Grant{c.grant, late.grant})
	if err == nil || !strings.Contains(err.Error(), r.standby.Address()) {
		r.Errorf("Sever while the standby does not replay = %v, want an error with its address", err)
	}
	if !r.refusesLogin(c) {
		r.Error("the login works at the primary after Sever")
	}
	if !r.sessionEnded(conn) {
		r.Error("the session at the standby is open after Sever")
	}
	if again, err := r.tryThere(c); err != nil {
		r.Fatalf("logging in at the standby = %v: it refuses the login although it does not replay", sqlState(err))
	} else {
		r.run(again, "SELECT FROM orders")
	}
	for name, c := range map[string]credential{"a known login": c, "a login that the standby never saw": late} {
		if e := r.prove(c.grant)[0]; e.Outcome == broker.OutcomeDead {
			r.Errorf("Prove(%s) while the standby does not replay = %v %q, want not dead", name, e.Outcome, e.Answer)
		}
	}
	r.execThere("SELECT pg_wal_replay_resume()")
	r.ends(c.grant, late.grant)

	if err := r.standby.Stop(); err != nil {
		r.Fatal(err)
	}
	if err := r.backend.Sever(r.Context(), []broker.Grant{other.grant}); err == nil {
		r.Error("Sever while the standby is down = nil, want an error")
	}
	if e := r.prove(other.grant)[0]; e.Outcome != broker.OutcomeUnknown || !r.refusesLogin(other) {
		r.Errorf("Prove while the standby is down = %v %q, want unknown", e.Outcome, e.Answer)
	}
	if err := r.standby.Start(r.Context()); err != nil {
		r.Fatal(err)
	}
	r.ends(other.grant)
}

// TestStandbyPromoted promotes the standby. It does not follow the primary any more, so nothing that the primary
// commits ends a login there.
func TestStandbyPromoted(tt *testing.T) {
	r := newReplica(tt)
	c := r.mint(`{"tables":["orders"]}`)
	r.replay()
	r.execThere("SELECT pg_promote()")
	if err := r.backend.Sever(r.Context(), []broker.Grant{c.grant}); err == nil {
		r.Error("Sever beside a promoted standby = nil, want an error")
	}
	if conn, err := r.tryThere(c); err != nil {
		r.Fatalf("logging in at the promoted standby = %v, so this test checks nothing", sqlState(err))
	} else {
		_ = conn.Close(r.Context())
	}
	if err := r.backend.CheckStandbys(r.Context()); err == nil || !strings.Contains(err.Error(), "does not follow") {
		r.Errorf("CheckStandbys with a promoted one = %v, want an error", err)
	}
	if e := r.prove(c.grant)[0]; e.Outcome == broker.OutcomeDead {
		r.Errorf("Prove beside a promoted standby = %v %q, want not dead", e.Outcome, e.Answer)
	}
}
