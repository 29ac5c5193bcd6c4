package e2e_test

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// shop is a database of a row, set up for Pawl.
type shop struct {
	*hunt
	server *parts.PostgresServer
	name   string
	root   *pgxpool.Pool // the superuser
}

const (
	huntPassword = "the password of pawl_vault in the hunt"
	// logins are members of the group of their shape; MORE is further settings.
	shopTool = `
  - name: hunt
    backend: shop
    narrowing: native
    ttl: 5m
    arguments: {tables: {kind: list, required: true}}
    settings: {verbs: "select,insert", sslmode: disable, connections: "20" MORE}
    vault: {policy: pawl-tool-ID, path: ID/pawl-db}`
)

// shopAt makes a database at a server, and the mount of Vault's database engine that makes its logins.
func (h *hunt) shopAt(server *parts.PostgresServer) *shop {
	h.Helper()
	dsn, err := server.CreateDatabase(h.Context())
	if err != nil {
		h.Fatal(err)
	}
	s := &shop{hunt: h, server: server, root: h.pool(dsn)}
	s.name = s.root.Config().ConnConfig.Database
	s.exec("CREATE TABLE orders (id serial PRIMARY KEY, note text); INSERT INTO orders (note) VALUES ('one'), ('two')")
	s.prepare()
	s.connect(server.Address())
	return s
}

func (h *hunt) pool(dsn string) *pgxpool.Pool {
	h.Helper()
	pool, err := pgxpool.New(h.Context(), dsn)
	if err != nil {
		h.Fatal("a pool does not open")
	}
	h.Cleanup(pool.Close)
	return pool
}

// prepare runs Pawl's setup.
func (s *shop) prepare() {
	s.Helper()
	s.setup.Lock()
	defer s.setup.Unlock()
	conn, err := s.root.Acquire(s.Context())
	if err != nil {
		s.Fatal("connecting as the superuser")
	}
	defer conn.Release()
	if err := postgres.Setup(s.Context(), conn.Conn(), postgres.SetupConfig{VaultPassword: huntPassword, Tables: []postgres.Grantable{
		{Table: "orders", Verbs: []string{"select", "insert"}}}}); err != nil {
		s.Fatal(err)
	}
}

// connect points Vault's connection at an address.
func (s *shop) connect(address string) {
	s.Helper()
	writes, err := postgres.VaultSetup{Mount: s.id, Connection: "shop", Address: address, Database: s.name, SSLMode: "disable",
		Tools:   map[string]time.Duration{"pawl-db": 5 * time.Minute},
		Service: map[postgres.Purpose]string{postgres.Shaper: "pawl-shaper", postgres.Revoker: "pawl-revoker"}}.Writes()
	if err != nil {
		s.Fatal(err)
	}
	if s.w == nil {
		s.write("sys/mounts/"+s.id, map[string]any{"type": "database"})
	}
	for _, w := range writes {
		if w.Data["username"] == "pawl_vault" {
			w.Data["password"] = huntPassword
		}
		s.write(w.Path.String(), w.Data)
	}
}

func (s *shop) exec(sql string, args ...any) {
	s.Helper()
	if _, err := s.root.Exec(s.Context(), sql, args...); err != nil {
		s.Fatalf("%.80s: %v", sql, err)
	}
}

func (s *shop) count(sql string, args ...any) (n int) {
	s.Helper()
	if err := s.root.QueryRow(s.Context(), sql, args...).Scan(&n); err != nil {
		s.Fatalf("%.80s: %v", sql, err)
	}
	return n
}

// dsnOf is the address of the database at a server, in the form of the configuration.
func (s *shop) dsnOf(server *parts.PostgresServer) string {
	host, port, _ := strings.Cut(server.Address(), ":")
	return fmt.Sprintf("host=%s port=%s dbname=%s sslmode=disable", host, port, s.name)
}

func (s *shop) backend() wire.Backend {
	return wire.Backend{Plugin: "postgres", DSN: s.dsnOf(s.server), Mount: s.id}
}

// run starts the broker. more is further settings of the tool.
func (s *shop) run(more string, b wire.Backend) {
	s.Helper()
	s.broker(strings.ReplaceAll(shopTool, "MORE", more), map[string]wire.Backend{"shop": b})
}

// buy takes a step that may read and insert.
func (s *shop) buy() stolen {
	s.Helper()
	m := s.take(agent.Args{"tables": []string{"orders"}}, 0)
	return stolen{s.hunt, m["username"], m["password"], m["host"] + ":" + m["port"], m["database"]}
}

// bought starts the broker and takes a step.
func (s *shop) bought() stolen {
	s.Helper()
	s.run("", s.backend())
	return s.buy()
}

// stolen is the raw secret. It is used with a PostgreSQL client alone.
type stolen struct {
	*hunt
	user, password, address, database string
}

// at gives the secret for another server.
func (l stolen) at(address string) stolen { l.address = address; return l }

// in gives the secret for another database.
func (l stolen) in(database string) stolen { l.database = database; return l }

// as gives the secret for another user name.
func (l stolen) as(user string) stolen { l.user = user; return l }

func (l stolen) open() (*pgx.Conn, error) {
	ctx, cancel := context.WithTimeout(l.Context(), 5*time.Second)
	defer cancel()
	to := url.URL{Scheme: "postgres", User: url.UserPassword(l.user, l.password), Host: l.address, Path: l.database,
		RawQuery: "sslmode=disable&default_query_exec_mode=simple_protocol"}
	return pgx.Connect(ctx, to.String())
}

// logsIn is a way: a new login reads.
func (l stolen) logsIn() bool {
	conn, err := l.open()
	if err != nil {
		return false
	}
	defer conn.Close(context.WithoutCancel(l.Context())) //nolint:errcheck // it was only read
	return l.runs(conn, "SELECT 1")
}

// runs reports whether a statement succeeds in a session.
func (l stolen) runs(conn *pgx.Conn, sql string) bool {
	ctx, cancel := context.WithTimeout(l.Context(), 5*time.Second)
	defer cancel()
	_, err := conn.Exec(ctx, sql)
	return err == nil
}

// session opens a session, runs statements in it, and gives a way: the last of them works again there.
func (l stolen) session(statements ...string) func() bool {
	l.Helper()
	conn, err := l.open()
	if err != nil {
		l.Fatalf("opening a session at %s as %s fails", l.address, l.user) // the error may quote the password
	}
	l.Cleanup(func() { _ = conn.Close(context.WithoutCancel(l.Context())) }) // most were ended by then
	for _, sql := range statements {
		if _, err := conn.Exec(l.Context(), sql); err != nil {
			l.Fatalf("%.80s: %v", sql, err)
		}
	}
	return func() bool { return l.runs(conn, statements[len(statements)-1]) }
}

const reads = "SELECT count(*) FROM orders"

// asGroup is a session that has the rights of the login's group.
func (l stolen) asGroup() func() bool {
	l.Helper()
	return l.session(`SET ROLE "pawl-shape-`+strings.Split(l.user, "-")[2]+`"`, reads)
}

// withCursor is a session with a cursor of a thousand rows and more.
func (l stolen) withCursor() func() bool {
	l.Helper()
	return l.session("BEGIN", "DECLARE c CURSOR FOR SELECT o.id FROM orders o, generate_series(1, 100000)", "FETCH c")
}

var huntPostgres = []huntRow{
	{plugin: "postgres", name: "sessions of all kinds", end: broker.ClosureClosed,
		why: "a cursor, a prepared statement and SET ROLE go on with rights that are gone from the catalog",
		set: func(h *hunt) quarry {
			l := h.shopAt(h.db()).bought()
			return quarry{ways: map[string]func() bool{"a login": l.logsIn, "a cursor": l.withCursor(), "SET ROLE": l.asGroup(),
				"a prepared statement": l.session("PREPARE p AS "+reads, "EXECUTE p")}}
		}},
	{plugin: "postgres", name: "session in another database", end: broker.ClosureClosed,
		why: "the session is in a database that the broker has no connection to",
		set: func(h *hunt) quarry {
			l := h.shopAt(h.db()).bought()
			return quarry{ways: map[string]func() bool{"a login there": l.in("postgres").logsIn,
				"a session there": l.in("postgres").session("CREATE TEMP TABLE kept AS SELECT 1 AS n", "SELECT n FROM kept")}}
		}},
	{plugin: "postgres", name: "prepared transaction", end: broker.ClosureClosed,
		why: "a prepared transaction has no session and no login, keeps its locks, and can be committed",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.db())
			l := s.bought()
			l.session("BEGIN", "INSERT INTO orders (note) VALUES ('later')", fmt.Sprintf("PREPARE TRANSACTION '%s'", h.id))
			return quarry{ways: map[string]func() bool{"a prepared transaction": s.prepared}}
		}},
	{plugin: "postgres", name: "prepared transaction out of reach", end: broker.ClosureClosed,
		why: "the transaction was prepared in a database that the broker may not connect to",
		set: func(h *hunt) quarry {
			s, other := h.shopAt(h.db()), h.otherDatabase(h.db())
			l := s.bought()
			l.in(other.name).session("BEGIN", "SELECT lo_create(0)", fmt.Sprintf("PREPARE TRANSACTION '%s'", h.id))
			other.exec(`REVOKE CONNECT ON DATABASE "` + other.name + `" FROM PUBLIC`)
			return quarry{ways: map[string]func() bool{"a prepared transaction": s.prepared},
				mend: func() { other.exec(fmt.Sprintf("ROLLBACK PREPARED '%s'", h.id)) }}
		}},
	{plugin: "postgres", name: "login locks itself", end: broker.ClosureClosed,
		why: "the agent holds a lock on its own role, so that nobody can alter it",
		set: func(h *hunt) quarry {
			l := h.shopAt(h.db()).bought()
			return quarry{ways: map[string]func() bool{"a login": l.logsIn,
				"a session": l.session("BEGIN", "ALTER ROLE CURRENT_USER SET work_mem = '1MB'", reads)}}
		}},
	{plugin: "postgres", name: "renamed login", unnamed: true, end: broker.ClosureClosed,
		why: "a DBA renamed the role: it is not below the name that the grant has, and its password works on",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.db())
			l := s.bought()
			renamed := l.as("renamed_" + h.id)
			return quarry{ways: map[string]func() bool{"a login": func() bool { return l.logsIn() || renamed.logsIn() },
				"a session": l.session(reads)},
				change: func() { s.exec(fmt.Sprintf(`ALTER ROLE %q RENAME TO %q`, l.user, renamed.user)) }}
		}},
	{plugin: "postgres", name: "prepared transaction of a renamed login", unnamed: true, end: broker.ClosureClosed,
		why: "a prepared transaction belongs to a role whose name is not that of a login any more",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.db())
			l := s.bought()
			l.session("BEGIN", "INSERT INTO orders (note) VALUES ('later')", fmt.Sprintf("PREPARE TRANSACTION '%s'", h.id))
			return quarry{ways: map[string]func() bool{"a prepared transaction": s.prepared},
				change: func() { s.exec(fmt.Sprintf(`ALTER ROLE %q RENAME TO %q`, l.user, "renamed_"+h.id)) },
				mend:   func() { s.exec(fmt.Sprintf("ROLLBACK PREPARED '%s'", h.id)) }}
		}},
	{plugin: "postgres", name: "renamed database", unnamed: true, end: broker.ClosureClosed,
		why: "the database has another name than in the configuration, and the login works there",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.db())
			s.run("", s.backend())
			l := s.buy()
			dba := s.pooled("postgres")
			rename := func(from, to string) {
				s.root.Reset()
				h.until("renaming the database", func() bool {
					_, _ = dba.Exec(h.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", from)
					_, err := dba.Exec(h.Context(), fmt.Sprintf("ALTER DATABASE %q RENAME TO %q", from, to))
					return err == nil
				})
			}
			return quarry{ways: map[string]func() bool{"a login": func() bool { return l.logsIn() || l.in("moved_"+h.id).logsIn() }},
				change: func() { rename(s.name, "moved_"+h.id) }, mend: func() { rename("moved_"+h.id, s.name) }}
		}},
	{plugin: "postgres", name: "lease given up in Vault", unnamed: true, end: broker.ClosureClosed,
		why: "an operator of Vault revoked the lease by force: Vault has no lease, and the login lives",
		set: func(h *hunt) quarry {
			l := h.shopAt(h.db()).bought()
			return quarry{ways: map[string]func() bool{"a login": l.logsIn, "a session": l.session(reads)},
				change: func() { // with a password that is wrong, Vault cannot end the login
					connection := h.id + "/config/shop"
					h.write(connection, map[string]any{"password": "wrong", "verify_connection": false})
					h.write("sys/leases/revoke-force/"+h.id+"/creds/pawl-db", nil)
					h.write(connection, map[string]any{"password": huntPassword})
				}}
		}},
	{plugin: "postgres", name: "records lost", end: broker.ClosureUnknown,
		why: "the rows of the logins are gone, so that nothing shows where they were made",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.db())
			l := s.bought()
			return quarry{ways: map[string]func() bool{"a login": l.logsIn, "a session": l.session(reads)},
				change: func() { s.exec("DELETE FROM pawl.logins") }}
		}},
}

// otherDatabase makes a database without Pawl's schema.
func (h *hunt) otherDatabase(server *parts.PostgresServer) *shop {
	h.Helper()
	dsn, err := server.CreateDatabase(h.Context())
	if err != nil {
		h.Fatal(err)
	}
	s := &shop{hunt: h, server: server, root: h.pool(dsn)}
	s.name = s.root.Config().ConnConfig.Database
	return s
}

// pooled is the superuser in another database of the server.
func (s *shop) pooled(database string) *pgxpool.Pool {
	s.Helper()
	return s.hunt.pool(s.server.DSN(database))
}

// prepared is a way: the row's prepared transaction is there.
func (s *shop) prepared() bool {
	return s.count("SELECT count(*) FROM pg_prepared_xacts WHERE gid = $1", s.id) > 0
}
