package postgres_test

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// link forwards connections to a server. While it is frozen the connections stay open and nothing is forwarded.
type link struct {
	listener net.Listener
	ctx      context.Context // of the test

	mu   sync.Mutex // guards open
	open chan struct{}
}

func newLink(tt *testing.T, address string) *link {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tt.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	l := &link{listener: listener, ctx: ctx, open: make(chan struct{})}
	l.thaw()
	var all sync.WaitGroup
	tt.Cleanup(func() { stop(); _ = listener.Close(); all.Wait() })
	all.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", address)
			if err != nil {
				_ = client.Close()
				continue
			}
			context.AfterFunc(ctx, func() { _, _ = client.Close(), server.Close() })
			all.Go(func() { l.forward(client, server) })
			all.Go(func() { l.forward(server, client) })
		}
	})
	return l
}

func (l *link) thaw() { close(l.open) }

func (l *link) freeze() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open = make(chan struct{})
}

func (l *link) forward(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	for buffer := make([]byte, 4096); ; {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		l.mu.Lock()
		open := l.open
		l.mu.Unlock()
		select {
		case <-open:
		case <-l.ctx.Done():
			return
		}
		if _, err = to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func (l *link) dsn(database string) string {
	host, port, _ := net.SplitHostPort(l.listener.Addr().String())
	return fmt.Sprintf("host=%s port=%s dbname=%s sslmode=disable", host, port, database)
}

// settles repeats f, as the engine does, until it reports true.
func (t *target) settles(what string, f func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: not after a minute", what)
		}
	}
}

// ends repeats what the engine does until the grants are dead.
func (t *target) ends(gs ...broker.Grant) {
	t.Helper()
	t.settles("severing and proving", func() bool {
		if t.backend.Sever(t.Context(), gs) != nil {
			return false
		}
		for _, e := range t.prove(gs...) {
			if e.Outcome != broker.OutcomeDead {
				return false
			}
		}
		return true
	})
}

// TestStandbyHangs freezes the connection to a standby. No grant is dead, and the logins at the primary end in time.
func TestStandbyHangs(tt *testing.T) {
	r := newReplica(tt)
	link := newLink(tt, r.standby.Address())
	r.backend = r.newBackend(postgres.Config{Standbys: []string{link.dsn(r.name)}})
	r.ends(r.mint(`{"tables":["orders"]}`).grant)
	all := []credential{r.mint(`{"tables":["orders"]}`), r.mint(`{"tables":["t1"]}`), r.mint(`{"tables":["t2"]}`)}
	conn := r.loginThere(all[0])
	link.freeze()
	for i, c := range all {
		ctx, cancel := context.WithTimeout(r.Context(), 15*time.Second)
		if err := r.backend.Sever(ctx, []broker.Grant{c.grant}); err == nil || ctx.Err() != nil {
			r.Errorf("Sever %d beside a standby that hangs = %v, %v, want an error in time", i, err, ctx.Err())
		}
		e, err := r.backend.Prove(ctx, []broker.Grant{c.grant})
		if err != nil || e[0].Outcome != broker.OutcomeUnknown {
			r.Errorf("Prove %d beside a standby that hangs = %v, %v, want unknown", i, e, err)
		}
		cancel()
		if !r.refusesLogin(c) {
			r.Errorf("login %d works at the primary", i)
		}
	}
	link.thaw()
	r.ends(all[0].grant, all[1].grant, all[2].grant)
	if !r.sessionEnded(conn) {
		r.Error("the session at the standby is open after Sever")
	}
}

// TestPrimaryHangs freezes the connection to the primary. The sessions at the standby end nevertheless.
func TestPrimaryHangs(tt *testing.T) {
	r := newReplica(tt)
	link := newLink(tt, r.server.Address())
	r.backend = r.newBackend(postgres.Config{DSN: link.dsn(r.name), Standbys: []string{r.dsn()}})
	r.ends(r.mint(`{"tables":["orders"]}`).grant)
	c := r.mint(`{"tables":["orders"]}`)
	conn := r.loginThere(c)
	link.freeze()
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	if err := r.backend.Sever(ctx, []broker.Grant{c.grant}); err == nil {
		r.Error("Sever while the primary hangs = nil, want an error")
	}
	if !r.sessionEnded(conn) {
		r.Error("the session at the standby is open after Sever")
	}
	link.thaw()
	r.ends(c.grant)
}

// TestStandbyDelayed has a standby that is always some seconds behind, and a primary that always writes.
func TestStandbyDelayed(tt *testing.T) {
	r := newReplica(tt)
	r.ends(r.mint(`{"tables":["orders"]}`).grant)
	r.execThere("ALTER SYSTEM SET recovery_min_apply_delay = '5s'")
	r.execThere("SELECT pg_reload_conf()")
	issued, failed := r.mint(`{"tables":["orders"]}`).grant, newGrant(`{"tables":["orders"]}`)
	if err := r.backend.Sever(r.Context(), []broker.Grant{issued, failed}); err != nil {
		r.Logf("Sever beside a standby that is behind = %v", err)
	}
	r.settles("proving beside a standby that is always behind", func() bool {
		r.exec("INSERT INTO items VALUES (1)")
		e := r.prove(issued, failed)
		return e[0].Outcome == broker.OutcomeDead && e[1].Outcome == broker.OutcomeDead
	})
}

// TestStandbyIsPrimary lists all servers as standbys: which one is the primary changes.
func TestStandbyIsPrimary(tt *testing.T) {
	r := newReplica(tt)
	host, port, _ := net.SplitHostPort(r.server.Address())
	r.backend = r.newBackend(postgres.Config{Standbys: []string{
		fmt.Sprintf("host=%s port=%s dbname=%s sslmode=disable", host, port, r.name), r.dsn()}})
	c := r.mint(`{"tables":["orders"]}`)
	here, there := r.login(c), r.loginThere(c)
	if e := r.prove(c.grant)[0]; e.Outcome != broker.OutcomeAlive {
		r.Errorf("Prove before Sever = %v %q, want alive", e.Outcome, e.Answer)
	}
	r.ends(c.grant)
	if !r.sessionEnded(here) || !r.sessionEnded(there) {
		r.Error("a session is open after Sever")
	}
}

// TestStandbyFull severs while agents hold all connections of a standby.
func TestStandbyFull(tt *testing.T) {
	r := newReplicaOf(targetOn(tt, parts.OwnPostgreSQL(tt, parts.PostgresConfig{NoSync: true, MaxConnections: 30})))
	r.settles("a connection of the revoker at the standby", func() bool {
		var n int
		return r.there.QueryRow(r.Context(), revokerSessions).Scan(&n) == nil && n > 0
	})
	c := r.mint(`{"tables":["orders"]}`)
	conns := []*pgx.Conn{r.loginThere(c)}
	r.settles("filling the standby", func() bool {
		conn, err := r.tryThere(c)
		if err == nil {
			r.Cleanup(func() { _ = conn.Close(context.WithoutCancel(r.Context())) })
			conns = append(conns, conn)
		}
		return sqlState(err) == "53300"
	})
	r.within(20*time.Second, "Sever beside a full standby", func(ctx context.Context) error {
		return r.backend.Sever(ctx, []broker.Grant{c.grant})
	})
	for i, conn := range conns {
		if !r.sessionEnded(conn) {
			r.Errorf("session %d of %d is open after Sever", i, len(conns))
		}
	}
}
