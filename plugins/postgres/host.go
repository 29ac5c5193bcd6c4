package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pawlsec/pawl/broker"
)

// seenHost is what the broker saw at a tool's own host.
type seenHost struct {
	wrong string // why no secret may name it; empty: nothing speaks against it
	until time.Time
}

// How long the broker does not look again: at a host that is right, at one that does not let it in, and at a wrong one.
const (
	lookAfterRight   = 5 * time.Minute
	lookAfterNothing = 30 * time.Second
	lookAfterWrong   = 5 * time.Second
)

// checkHost refuses a tool whose own host is seen to be neither the server of DSN nor a listed standby: nobody would
// sever there. A host that does not let the broker in passes, since agents may reach it over other networks.
func (b *Backend) checkHost(ctx context.Context, t broker.Tool, own server) error {
	if b.servers.names(own) {
		return nil
	}
	for _, st := range b.revoker.standbys {
		if nameOf(st.address) == own.String() {
			return nil
		}
	}
	now := b.cfg.Now()
	b.mu.Lock()
	seen, known := b.hosts[own]
	b.mu.Unlock()
	if !known || !now.Before(seen.until) {
		seen = b.lookAt(ctx, own, now)
		b.mu.Lock()
		b.hosts[own] = seen
		b.mu.Unlock()
	}
	if seen.wrong == "" {
		return nil
	}
	return broker.Errorf(broker.Unavailable, "prepare", "tool %s: its host %s %s", t.Name, own, seen.wrong).
		With(broker.CodeBackendDown)
}

func (b *Backend) lookAt(ctx context.Context, own server, now time.Time) seenHost {
	ctx, cancel := context.WithTimeout(ctx, standbyTimeout)
	defer cancel()
	at, err := b.revoker.position(ctx)
	if err != nil {
		return seenHost{until: now}
	}
	there, err := b.revoker.positionAt(ctx, own)
	switch {
	case err != nil:
		return seenHost{until: now.Add(lookAfterNothing)}
	case there.server != at.server:
		return seenHost{"is another server than that of dsn", now.Add(lookAfterWrong)}
	case there.standby:
		return seenHost{"is a hot standby of the server of dsn: list it under standbys", now.Add(lookAfterWrong)}
	case !there.started.Equal(at.started):
		return seenHost{"is a copy of the server of dsn", now.Add(lookAfterWrong)}
	}
	return seenHost{until: now.Add(lookAfterRight)}
}

// positionAt asks a server that is not in the configuration, over TLS as with the servers of DSN.
func (s *service) positionAt(ctx context.Context, at server) (there position, err error) {
	pool, err := s.get(ctx)
	if err != nil {
		return position{}, err
	}
	config := pool.Config().ConnConfig
	var ways []*pgconn.FallbackConfig
	for _, f := range append([]*pgconn.FallbackConfig{
		{Host: config.Host, Port: config.Port, TLSConfig: config.TLSConfig}}, config.Fallbacks...) {
		if f.Host != config.Host || f.Port != config.Port {
			continue
		}
		way := &pgconn.FallbackConfig{Host: at.host, Port: at.port}
		if f.TLSConfig != nil {
			way.TLSConfig = f.TLSConfig.Clone()
			if way.TLSConfig.ServerName != "" {
				way.TLSConfig.ServerName = at.host
			}
		}
		ways = append(ways, way)
	}
	config.Host, config.Port, config.TLSConfig, config.Fallbacks = at.host, at.port, ways[0].TLSConfig, ways[1:]
	config.ValidateConnect = nil
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return position{}, fmt.Errorf("connecting to %s: %w", at, err)
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing is left to be done in it
	row := conn.QueryRow(ctx, positionQuery)
	return there, row.Scan(&there.server, &there.standby, &there.lsn, &there.started)
}
