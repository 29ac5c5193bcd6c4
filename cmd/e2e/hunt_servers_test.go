package e2e_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

// withStandby makes a standby of the row's server for this row alone, and starts a broker that knows it or not.
func (s *shop) withStandby(named bool) (standby *parts.PostgresServer, there *pgxpool.Pool, l stolen) {
	s.Helper()
	standby = parts.OwnStandby(s.T, s.server)
	b := s.backend()
	if named {
		b.Standbys = []string{s.dsnOf(standby)}
	}
	s.run("", b)
	l = s.buy()
	s.until("the standby has the login", l.at(standby.Address()).logsIn)
	return standby, s.pool(standby.DSN(s.name)), l
}

func (h *hunt) execAt(pool *pgxpool.Pool, sql string) {
	h.Helper()
	if _, err := pool.Exec(h.Context(), sql); err != nil {
		h.Fatalf("%.80s: %v", sql, err)
	}
}

// bothOf is the address of two servers of which the primary counts.
func (s *shop) bothOf(a, b *parts.PostgresServer) string {
	_, first, _ := strings.Cut(a.Address(), ":")
	_, second, _ := strings.Cut(b.Address(), ":")
	return fmt.Sprintf("host=127.0.0.1,127.0.0.1 port=%s,%s dbname=%s sslmode=disable target_session_attrs=read-write", first, second, s.name)
}

// ownServer is a server of this row alone.
func (h *hunt) ownServer() *parts.PostgresServer {
	h.Helper()
	return parts.OwnPostgreSQL(h.T, parts.PostgresConfig{NoSync: true, Settings: map[string]string{"wal_keep_size": "256MB"}})
}

var huntServers = []huntRow{
	{plugin: "postgres", name: "standby that does not replay", end: broker.ClosureClosed,
		why: "the end of the login is in the standby's log and not in its catalog",
		set: func(h *hunt) quarry {
			_, there, l := h.shopAt(h.db()).withStandby(true)
			address := there.Config().ConnConfig.Port
			at := l.at(fmt.Sprintf("127.0.0.1:%d", address))
			return quarry{ways: map[string]func() bool{"a login at the standby": at.logsIn, "a cursor there": at.withCursor()},
				change: func() { h.execAt(there, "SELECT pg_wal_replay_pause()") },
				mend:   func() { h.execAt(there, "SELECT pg_wal_replay_resume()") }}
		}},
	{plugin: "postgres", name: "two standbys behind one address", unnamed: true, end: broker.ClosureUnknown,
		why: "the address of the standby is a balancer's: the broker looks at one of two servers each time",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.db())
			second := parts.OwnStandby(h.T, s.server)
			b := s.backend()
			_, port, _ := net.SplitHostPort(h.balancer(h.reads().Address(), second.Address()))
			b.Standbys = []string{fmt.Sprintf("host=127.0.0.1 port=%s dbname=%s sslmode=disable", port, s.name)}
			s.run("", b)
			l := s.buy()
			ways := map[string]func() bool{}
			for name, server := range map[string]*parts.PostgresServer{"first": h.reads(), "second": second} {
				there := l.at(server.Address())
				h.until("a standby has the login", there.logsIn)
				ways["SET ROLE at the "+name], ways["a cursor at the "+name] = there.asGroup(), there.withCursor()
			}
			return quarry{ways: ways}
		}},
	{plugin: "postgres", name: "promoted standby", end: broker.ClosureUnknown,
		why: "the standby follows nobody any more, so that no end of a login reaches it",
		set: func(h *hunt) quarry {
			standby, there, l := h.shopAt(h.db()).withStandby(true)
			return quarry{ways: map[string]func() bool{"a login at the standby": l.at(standby.Address()).logsIn},
				change: func() { h.execAt(there, "SELECT pg_promote()") }}
		}},
	{plugin: "postgres", name: "failover, the old primary lives on", unnamed: true, end: broker.ClosureClosed,
		why: "the broker follows the new primary of its dsn, and the old one takes logins still",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.ownServer())
			standby := parts.OwnStandby(h.T, s.server)
			b := s.backend()
			b.DSN = s.bothOf(s.server, standby)
			s.run("", b)
			l := s.buy().at(s.server.Address())
			h.until("the standby has the login", l.at(standby.Address()).logsIn)
			return quarry{ways: map[string]func() bool{"a login at the old primary": l.logsIn, "a session there": l.session(reads)},
				change: func() {
					s.exec("ALTER SYSTEM SET default_transaction_read_only = on")
					s.exec("SELECT pg_reload_conf()")
					h.execAt(h.pool(standby.DSN(s.name)), "SELECT pg_promote()")
					s.connect(standby.Address())
				},
				mend: func() {
					h.must(s.server.Kill())
					h.execAt(h.pool(standby.DSN(s.name)), "SELECT pawl.adopt_logins()")
				}}
		}},
	{plugin: "postgres", name: "moved to another server", end: broker.ClosureUnknown,
		why: "the configuration and Vault point at a new server, and the login was made at the old one",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.db())
			l := s.bought()
			return quarry{ways: map[string]func() bool{"a login": l.logsIn, "a session": l.session(reads)},
				change: func() {
					next := &shop{hunt: h, server: h.db2(), name: s.name, root: h.pool(h.db2().DSN("postgres"))}
					next.exec(`CREATE DATABASE "` + s.name + `"`)
					next.root = h.pool(h.db2().DSN(s.name))
					next.exec("CREATE TABLE orders (id serial PRIMARY KEY, note text)")
					next.prepare()
					next.connect(next.server.Address())
					s.broker("", map[string]wire.Backend{"shop": next.backend()})
				}}
		}},
	{plugin: "postgres", name: "moved to a copy of the data directory", unnamed: true, end: broker.ClosureUnknown,
		why: "the new server is a promoted copy, with the same system identifier and the same records, and the old one lives on",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.ownServer())
			standby, there, l := s.withStandby(false)
			return quarry{ways: map[string]func() bool{"a login at the old server": l.logsIn, "a session there": l.session(reads)},
				change: func() {
					h.execAt(there, "SELECT pg_promote()")
					next := &shop{hunt: h, server: standby, name: s.name}
					next.connect(standby.Address())
					s.broker("", map[string]wire.Backend{"shop": next.backend()})
				}}
		}},
	{plugin: "postgres", name: "server down at the revocation", end: broker.ClosureClosed,
		why: "the server comes back with all logins after the revocation was acknowledged",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.ownServer())
			l := s.bought()
			down := false
			works := func() bool { return down || l.logsIn() } // it will work again
			return quarry{ways: map[string]func() bool{"a login": works},
				change: func() { h.must(s.server.Kill()); down = true },
				mend:   func() { h.must(s.server.Start(h.Context())); down = false }}
		}},
	{plugin: "postgres", name: "synchronous standby is gone", end: broker.ClosureClosed,
		why: "a commit waits for a standby that is not there, and until then nobody sees the end of the login",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.ownServer())
			l := s.bought()
			return quarry{ways: map[string]func() bool{"a login": l.logsIn, "a session": l.session(reads)},
				change: func() {
					s.exec("ALTER SYSTEM SET synchronous_standby_names = 'gone'")
					s.exec("ALTER SYSTEM SET synchronous_commit = 'on'")
					s.exec("SELECT pg_reload_conf()")
				}}
		}},
	{plugin: "postgres", name: "server process that does not run", unnamed: true, end: broker.ClosureClosed,
		why: "the system has stopped the process of a session, which takes the signal to end only when it runs again",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.db())
			l := s.bought()
			var process int
			l.session(reads)
			if err := s.root.QueryRow(h.Context(), "SELECT pid FROM pg_stat_activity WHERE usename = $1", l.user).Scan(&process); err != nil {
				h.Fatal(err)
			}
			server, err := os.FindProcess(process)
			if err != nil {
				h.Fatal(err)
			}
			h.Cleanup(func() { _ = server.Signal(syscall.SIGCONT) }) // it has ended by then
			there := func() bool { return s.count("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", process) > 0 }
			return quarry{ways: map[string]func() bool{"a session": there},
				change: func() { h.must(server.Signal(syscall.SIGSTOP)) },
				mend:   func() { h.must(server.Signal(syscall.SIGCONT)) }}
		}},
}

// balancer leads to servers by turns, as a reader endpoint does.
func (h *hunt) balancer(servers ...string) string {
	h.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	h.must(err)
	h.Cleanup(func() { _ = listener.Close() }) // nothing was written
	go func() {
		for turn := 0; ; turn++ {
			from, err := listener.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("tcp", servers[turn%len(servers)])
			if err != nil {
				_ = from.Close() // that is the answer
				continue
			}
			go func() { _, _ = io.Copy(to, from); _ = to.Close() }()
			go func() { _, _ = io.Copy(from, to); _ = from.Close() }()
		}
	}()
	return listener.Addr().String()
}

func (h *hunt) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}
