package postgres

import (
	"context"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	looks    = 4           // connections to one address. Of two servers by turns, or at random, these show both
	looksFor = time.Minute // how long their answer holds
)

// look is the answer of the last connections to a standby's address.
type look struct {
	at  time.Time
	err error
}

// checkOne returns errSeveral if the address of a standby leads to several servers, or to another one than an open
// connection does, which reached a server that was started then.
func (s *service) checkOne(ctx context.Context, i int, pool *pgxpool.Pool, reached time.Time) error {
	s.mu.Lock()
	last, known := s.looks[i]
	s.mu.Unlock()
	now := s.cfg.Now()
	if known && now.Sub(last.at) < looksFor {
		return last.err
	}
	config := pool.Config().ConnConfig
	addresses := []string{config.Host}
	if !strings.HasPrefix(config.Host, "/") {
		var err error
		if addresses, err = net.DefaultResolver.LookupHost(ctx, config.Host); err != nil {
			return err
		}
	}
	for n := range looks * len(addresses) {
		started, err := startOf(ctx, config, addresses[n%len(addresses)])
		if known && classify(err) == serverFull { // agents may fill it for long, and the open connection proves
			return last.err
		}
		if err != nil {
			return err
		}
		if !started.Equal(reached) {
			last = look{now, errSeveral}
			break
		}
		last = look{now, nil}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.looks == nil {
		s.looks = map[int]look{}
	}
	s.looks[i] = last
	return last.err
}

// startOf returns when the server at one address of a host was started. No two servers were started at the same
// microsecond.
func startOf(ctx context.Context, config *pgx.ConnConfig, address string) (started time.Time, err error) {
	config = config.Copy()
	config.LookupFunc = func(context.Context, string) ([]string, error) { return []string{address}, nil }
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return started, err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it was only read
	err = conn.QueryRow(ctx, "SELECT pg_postmaster_start_time()", pgx.QueryExecModeSimpleProtocol).Scan(&started)
	return started, err
}
