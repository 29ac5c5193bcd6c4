package postgres

import (
	"context"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// server is one server that a DSN names.
type server struct {
	host string
	port uint16
}

func (s server) String() string { return net.JoinHostPort(s.host, strconv.Itoa(int(s.port))) }

// servers are the servers that a DSN names. One of them is the primary, and the others are its standbys. A standby can
// refuse a login that the primary made a moment ago, and a client that was refused asks no other server. So the
// server that was reached last stands first: for the broker's connections and in secrets.
type servers struct {
	named []server // in the order of the DSN

	mu        sync.Mutex // guards first and addresses
	first     int        // index of the server that stands first
	addresses map[string][]string
}

// serversOf returns the servers of an address. If there are several, connections to the address go to the primary.
// If there is one, it is written to even where the database is read only by default, since its logins must end there.
func serversOf(address *pgxpool.Config) *servers {
	s := &servers{named: []server{{address.ConnConfig.Host, address.ConnConfig.Port}}, addresses: map[string][]string{}}
	for _, f := range address.ConnConfig.Fallbacks { // one for each server and way to use TLS
		if one := (server{f.Host, f.Port}); !slices.Contains(s.named, one) {
			s.named = append(s.named, one)
		}
	}
	if len(s.named) == 1 {
		address.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			_, err := conn.Exec(ctx, "SET default_transaction_read_only = off", pgx.QueryExecModeSimpleProtocol)
			return err
		}
		return s
	}
	if address.ConnConfig.ValidateConnect == nil {
		address.ConnConfig.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	lookUp := address.ConnConfig.LookupFunc
	address.ConnConfig.LookupFunc = func(ctx context.Context, host string) ([]string, error) {
		found, err := lookUp(ctx, host)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.addresses[host] = found
		return found, err
	}
	address.BeforeConnect = func(_ context.Context, config *pgx.ConnConfig) error { s.order(config); return nil }
	address.AfterConnect = func(_ context.Context, conn *pgx.Conn) error {
		s.reached(conn.PgConn().Conn().RemoteAddr())
		return nil
	}
	return s
}

// inOrder returns the servers, beginning with the one that was reached last.
func (s *servers) inOrder() []server {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append(slices.Clone(s.named[s.first:]), s.named[:s.first]...)
}

// order changes the order in which a connection asks the servers.
func (s *servers) order(config *pgx.ConnConfig) {
	all := append([]*pgconn.FallbackConfig{
		{Host: config.Host, Port: config.Port, TLSConfig: config.TLSConfig}}, config.Fallbacks...)
	config.Fallbacks = nil
	for _, one := range s.inOrder() {
		for _, f := range all {
			if (server{f.Host, f.Port}) == one {
				config.Fallbacks = append(config.Fallbacks, f)
			}
		}
	}
	f := config.Fallbacks[0]
	config.Host, config.Port, config.TLSConfig = f.Host, f.Port, f.TLSConfig
	config.Fallbacks = config.Fallbacks[1:]
}

// reached puts the server at an address first.
func (s *servers) reached(address net.Addr) {
	tcp, ok := address.(*net.TCPAddr)
	if !ok {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, one := range s.named {
		if int(one.port) == tcp.Port && slices.Contains(s.addresses[one.host], tcp.IP.String()) {
			s.first = i
			return
		}
	}
}

const maxAttempts = 4 // of one call. Every function in schema pawl is safe to call again

// next puts the server after the given one first, unless another caller has done so, after a credential was refused.
// It reports whether to try again with that credential. Another connection can have been refused by another server, so
// that is not one try for each.
func (s *servers) next(refused server, try int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.named[s.first] == refused {
		s.first = (s.first + 1) % len(s.named)
	}
	return len(s.named) > 1 && try < maxAttempts-1
}

// onSocket reports whether a server is reached through the directory of a Unix socket.
func (s *servers) onSocket() bool {
	return slices.ContainsFunc(s.named, func(one server) bool { return strings.HasPrefix(one.host, "/") })
}
