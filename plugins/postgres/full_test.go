package postgres_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
)

// fill opens sessions of agents until the server has room for none. It returns them and the grants.
func (t *target) fill() (conns []*pgx.Conn, grants []broker.Grant) {
	t.Helper()
	// An ended or refused session takes a connection for a moment longer. So wait for these, and count the others.
	t.awaitNone("SELECT count(*) FROM pg_stat_activity WHERE usename LIKE 'pawl-gr%'")
	const room = `SELECT current_setting('max_connections')::int
			- current_setting('superuser_reserved_connections')::int - count(*)
		FROM pg_stat_activity WHERE backend_type = 'client backend' AND state IS NOT NULL`
	c := t.mint(`{"tables":["orders"]}`)
	for t.count(room) > 0 {
		conn, err := pgx.Connect(t.Context(), c.URL)
		if err != nil && sqlState(err) != "53300" {
			t.Fatalf("logging in until the server is full = %v, want 53300", sqlState(err))
		}
		if err == nil {
			conns = append(conns, conn)
		}
	}
	t.Cleanup(func() {
		for _, conn := range conns {
			_ = conn.Close(context.WithoutCancel(t.Context())) // most were severed
		}
	})
	return conns, []broker.Grant{c.grant}
}

const revokerSessions = `SELECT count(*) FROM pg_stat_activity a JOIN pg_auth_members m ON m.member = a.usesysid
	JOIN pg_roles g ON g.oid = m.roleid WHERE g.rolname = 'pawl_revoker'`

// TestServerFull severs while agents hold every connection that the server has, and Vault hangs.
func TestServerFull(tt *testing.T) {
	t := targetOn(tt, parts.OwnPostgreSQL(tt, parts.PostgresConfig{NoSync: true, MaxConnections: 30}))
	var clock atomic.Int64
	clock.Store(time.Now().UnixNano())
	t.backend.Close()
	t.backend = t.newBackend(configNow(func() time.Time { return time.Unix(0, clock.Load()) }))
	t.await(revokerSessions, 1)
	t.mint(`{"tables":["orders"]}`)

	conns, grants := t.fill()
	t.creds.set(func(s *serviceLogins) { s.hangs = true })
	t.within(5*time.Second, "Sever on a full server", func(ctx context.Context) error {
		return t.backend.Sever(ctx, grants)
	})
	for i, conn := range conns {
		if !t.sessionEnded(conn) {
			t.Errorf("session %d of %d is open after Sever", i, len(conns))
		}
	}

	// After half of its life the credential is replaced. The connection of the old one stays until there is another.
	t.creds.set(func(s *serviceLogins) { s.hangs = false })
	_, grants = t.fill()
	clock.Add(int64(40 * time.Minute))
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	made := len(t.creds.names())
	if err := t.backend.Renew(ctx); err == nil {
		t.Error("Renew on a full server = nil, want an error")
	}
	_ = t.backend.Renew(ctx) // the same
	if n := len(t.creds.names()) - made; n != 1 {
		t.Errorf("credentials fetched in two attempts = %d, want 1", n)
	}
	t.within(5*time.Second, "Sever after a renewal on a full server", func(ctx context.Context) error {
		return t.backend.Sever(ctx, grants)
	})
	if err := t.backend.Renew(t.Context()); err != nil {
		t.Errorf("Renew on a server with room = %v, want nil", err)
	}
	if n := len(t.creds.names()) - made; n != 1 {
		t.Errorf("credentials fetched = %d, want 1", n)
	}

	// Another broker starts while the server is full. It gets the first connection that becomes free.
	conns, grants = t.fill()
	t.creds.set(func(s *serviceLogins) { s.made = nil })
	late := t.newBackend(configNow(nil))
	var severing sync.WaitGroup
	severing.Go(func() {
		t.within(20*time.Second, "Sever by a late broker", func(ctx context.Context) error {
			return late.Sever(ctx, grants)
		})
	})
	for len(t.creds.names()) == 0 {
		t.await("SELECT 1", 1)
	}
	_ = conns[0].Close(t.Context())
	severing.Wait()
}

// TestRevokerReconnects terminates the revoker's idle session. The backend opens another one without being called.
func TestRevokerReconnects(tt *testing.T) {
	t := targetOn(tt, parts.OwnPostgreSQL(tt, parts.PostgresConfig{NoSync: true}))
	t.await(revokerSessions, 1)
	t.exec(`SELECT pg_terminate_backend(a.pid, 5000) FROM pg_stat_activity a JOIN pg_auth_members m
		ON m.member = a.usesysid JOIN pg_roles g ON g.oid = m.roleid WHERE g.rolname = 'pawl_revoker'`)
	t.await(revokerSessions, 1)
}
