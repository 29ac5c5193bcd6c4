package e2e_test

import (
	"fmt"
	"net"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
)

// through starts a pooler in front of the server, takes a step, and gives the secret for the pooler. The broker knows
// nothing of it.
func (s *shop) through(c parts.PoolerConfig) stolen {
	s.Helper()
	c.Server = s.server
	return s.bought().at(parts.OwnPooler(s.T, c).Address())
}

var huntPooled = []huntRow{
	{plugin: "postgres", name: "PgBouncer, a pool of sessions", end: broker.ClosureClosed,
		why: "the agent's connection ends at the pooler, and the server sees the pooler's",
		set: func(h *hunt) quarry {
			l := h.shopAt(h.db()).through(parts.PoolerConfig{Program: "pgbouncer"})
			return quarry{ways: map[string]func() bool{"a login": l.logsIn, "a session": l.session(reads),
				"a session with rights of the group": l.asGroup(), "a login at the server": l.at(h.db().Address()).logsIn}}
		}},
	{plugin: "postgres", name: "PgBouncer, a pool of transactions", end: broker.ClosureClosed,
		why: "the pooler keeps a connection of the login after the agent has gone, and gives it to the next client",
		set: func(h *hunt) quarry {
			l := h.shopAt(h.db()).through(parts.PoolerConfig{Program: "pgbouncer", Settings: []string{"pool_mode = transaction",
				"server_reset_query_always = 0", "query_wait_timeout = 2", "server_login_retry = 1"}})
			return quarry{ways: map[string]func() bool{"a login": l.logsIn, "a session": l.session(reads)}}
		}},
	{plugin: "postgres", name: "pgpool", end: broker.ClosureClosed,
		why: "the pooler checks no password itself and keeps connections for later clients",
		set: func(h *hunt) quarry {
			l := h.shopAt(h.db()).through(parts.PoolerConfig{Program: "pgpool", Settings: []string{
				"failover_on_backend_error = off", "connection_cache = on"}})
			return quarry{ways: map[string]func() bool{"a login": l.logsIn, "a session": l.session(reads)}}
		}},
	{plugin: "postgres", name: "forwarder to a standby", end: broker.ClosureClosed,
		why: "the secret's address leads to a standby, which does not hear of the end of a session",
		set: func(h *hunt) quarry {
			s := h.shopAt(h.db())
			b := s.backend()
			b.Standbys = []string{s.dsnOf(h.reads())}
			host, port, _ := net.SplitHostPort(h.reads().Address())
			s.run(fmt.Sprintf(", host: %s, port: %q", host, port), b)
			l := s.buy()
			h.until("the standby has the login", l.logsIn)
			return quarry{ways: map[string]func() bool{"a login": l.logsIn, "SET ROLE": l.asGroup(), "a cursor": l.withCursor()}}
		}},
}
