package postgres_test

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// toolAt is a tool whose secrets name another address than the backend's DSN.
func toolAt(address string) broker.Tool {
	at := tool()
	at.Settings["host"], at.Settings["port"], _ = strings.Cut(address, ":")
	return at
}

// TestHostOfTool gives tools hosts of their own. Secrets may name only servers where the broker ends their sessions,
// whatever the name.
func TestHostOfTool(tt *testing.T) {
	t := ownTarget(tt)
	standby := parts.OwnStandby(tt, t.server)
	other := newTarget(tt).server
	fixed := parts.OwnPooler(tt, parts.PoolerConfig{Program: "pgbouncer", FixedUser: true, Server: t.server})
	through := parts.OwnPooler(tt, parts.PoolerConfig{Program: "pgbouncer", Server: t.server})
	pgpool := parts.OwnPooler(tt, parts.PoolerConfig{Program: "pgpool", Server: t.server})
	_, port, _ := strings.Cut(t.server.Address(), ":")
	closed := closedPort(tt)
	for _, row := range []struct {
		name, host string
		standbys   bool   // the backend names the standby
		want       string // of the refusal; empty: it mints
	}{
		{"another name of the server", "localhost:" + port, false, ""},
		{"a forwarder to the server", forward(tt, t.server.Address), false, ""},
		{"a standby", standby.Address(), false, "is a hot standby that the backend's standbys do not name"},
		{"a standby that is named", standby.Address(), true, ""},
		{"another server", other.Address(), true, "does not let the broker in"},
		{"nobody", closed, false, "does not let the broker in"},
		{"a pooler that logs in as the agent", through.Address(), false, ""},
		{"a pooler with a fixed user", fixed.Address(), false, "logs in as postgres"},
		{"pgpool", pgpool.Address(), false, "pgpool"},
	} {
		cfg := postgres.Config{CollectEvery: -1}
		if row.standbys {
			host, port, _ := strings.Cut(standby.Address(), ":")
			cfg.Standbys = []string{fmt.Sprintf("host=%s port=%s dbname=%s sslmode=disable", host, port, t.name)}
		}
		t.backend = t.newBackend(cfg)
		at := toolAt(row.host)
		if err := t.backend.Load(at); err != nil {
			t.Errorf("%s: Load = %v, want nil: the database need not be up", row.name, err)
		}
		c, err := t.tryMintWith(at, newGrant(`{"tables":["orders"]}`))
		if row.want != "" {
			if broker.KindOf(err) != broker.Unavailable || !strings.Contains(err.Error(), row.want) {
				t.Errorf("%s: minting = %v, want unavailable, with %q", row.name, err, row.want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: minting = %v, want nil", row.name, err)
			continue
		}
		t.sever(c.grant)
		c.grant.Tool = at.Name
		if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
			t.Errorf("%s: Prove after Sever = %v %q, want dead", row.name, e.Outcome, e.Answer)
		}
	}
}

// TestHostPromoted promotes the standby that a tool names as its host. Its sessions are ended by nobody then.
func TestHostPromoted(tt *testing.T) {
	r := newReplica(tt)
	clock := &clock{now: time.Now()}
	r.backend = r.newBackend(postgres.Config{CollectEvery: -1, Standbys: []string{r.dsn()}, Now: clock.Now})
	at := toolAt(r.standby.Address())
	c, err := r.tryMintWith(at, newGrant(`{"tables":["orders"]}`))
	if err != nil {
		r.Fatal(err)
	}
	r.replay()
	r.execThere("SELECT pg_promote()")
	clock.add(2 * time.Minute)
	_, err = r.tryMintWith(at, newGrant(`{"tables":["orders"]}`))
	if err == nil || !strings.Contains(err.Error(), "was promoted") {
		r.Errorf("minting for a promoted standby = %v, want a refusal", err)
	}
	if err := r.backend.Sever(r.Context(), []broker.Grant{c.grant}); err == nil {
		r.Error("Sever beside a promoted standby = nil, want an error")
	}
	c.grant.Tool = at.Name
	if e := r.prove(c.grant)[0]; e.Outcome == broker.OutcomeDead {
		r.Errorf("Prove = %v %q, want not dead", e.Outcome, e.Answer)
	}
}

// clock is a clock that a test moves.
type clock struct {
	mu  sync.Mutex // guards now
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// TestDSNMoves lets the name in DSN lead elsewhere after the mint, while the broker's connections stay with the server.
// The agent reads there, and the grant must not be called dead.
func TestDSNMoves(tt *testing.T) {
	t := ownTarget(tt)
	standby := parts.OwnStandby(tt, t.server)
	fixed := parts.OwnPooler(tt, parts.PoolerConfig{Program: "pgbouncer", FixedUser: true, Server: t.server})
	r := &replica{target: t, standby: standby, there: pool(tt, standby.DSN(t.name))}
	for name, row := range map[string]struct{ to, want, refuses string }{
		"to a pooler":  {fixed.Address(), "logs in as postgres", "logs in as postgres"},
		"to a standby": {standby.Address(), "leads to another server now", "SQLSTATE 25006"},
	} {
		var moved atomic.Bool
		dsn := forward(tt, func() string {
			if moved.Load() {
				return row.to
			}
			return t.server.Address()
		})
		clock := &clock{now: time.Now()}
		t.backend = t.backendWith(dsn, clock.Now)
		c := t.mint(`{"tables":["orders"]}`)
		r.replay()
		moved.Store(true)
		clock.add(time.Minute)
		reader, err := pgx.Connect(t.Context(), c.URL)
		if err != nil {
			t.Fatalf("%s: logging in = %v", name, sqlState(err))
		}
		defer reader.Close(t.Context())
		t.run(reader, "BEGIN", "DECLARE c CURSOR FOR SELECT o.id FROM orders o, generate_series(1, 1000)", "FETCH c")
		// The broker checks its connection once a second. A call at that moment opens another one, which the new place
		// refuses; then no answer says where the name leads now.
		err = t.backend.Sever(t.Context(), []broker.Grant{c.grant})
		moves := row.want
		switch {
		case err == nil:
		case strings.Contains(err.Error(), row.refuses):
			moves = ""
		default:
			t.Fatalf("%s: Sever = %v, want nil, or %q", name, err, row.refuses)
		}
		r.replay()
		t.run(reader, "FETCH c")
		if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeUnknown || !strings.Contains(e.Answer, moves) {
			t.Errorf("%s: Prove while the agent reads = %v %q, want unknown, with %q", name, e.Outcome, e.Answer, moves)
		}
		if _, err := t.tryMint(newGrant(`{"tables":["orders"]}`)); err == nil || !strings.Contains(err.Error(), moves) {
			t.Errorf("%s: minting afterwards = %v, want a refusal with %q", name, err, moves)
		}
	}
}

// TestHostMoves lets the name of a tool's host lead to a standby after the mint. The agent reads there, and the grant
// must not be called dead.
func TestHostMoves(tt *testing.T) {
	t := ownTarget(tt)
	standby := parts.OwnStandby(tt, t.server)
	r := &replica{target: t, standby: standby, there: pool(tt, standby.DSN(t.name))}
	var moved atomic.Bool
	host := forward(tt, func() string {
		if moved.Load() {
			return standby.Address()
		}
		return t.server.Address()
	})
	clock := &clock{now: time.Now()}
	t.backend = t.newBackend(postgres.Config{CollectEvery: -1, Now: clock.Now})
	at := toolAt(host)
	c, err := t.tryMintWith(at, newGrant(`{"tables":["orders"]}`))
	if err != nil {
		t.Fatal(err)
	}
	c.grant.Tool = at.Name
	r.replay()
	moved.Store(true)
	clock.add(2 * time.Minute)
	reader, err := pgx.Connect(t.Context(), c.URL)
	if err != nil {
		t.Fatalf("logging in at the standby = %v", sqlState(err))
	}
	defer reader.Close(t.Context())
	t.run(reader, "BEGIN", "DECLARE c CURSOR FOR SELECT o.id FROM orders o, generate_series(1, 1000)", "FETCH c")
	t.sever(c.grant)
	r.replay()
	t.run(reader, "FETCH c")
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeUnknown || !strings.Contains(e.Answer, host) {
		t.Errorf("Prove while the agent reads at the host = %v %q, want unknown, with the host", e.Outcome, e.Answer)
	}
}

// closedPort returns an address at which nothing listens.
func closedPort(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close() //nolint:errcheck // it was only opened
	return listener.Addr().String()
}
