// Package postgres issues PostgreSQL logins with exactly the rights of a step. It severs them in bulk at the database
// and proves them dead.
//
// A shape is a distinct set of tables, verbs, row filter and limits. Its rights are granted once, to a group role named
// after the hash of the shape. A credential is a login that is a member of the group and holds no rights itself. Vault
// builds the login's name, pawl-<grant>-<shape>-<random>, from the display name of the step's token. Vault's single
// creation statement calls a function in the database, which reads the shape from that name. So Vault needs no role per
// shape, and the broker needs no right to write statements into Vault.
//
// bootstrap.sql defines the objects in the database and who may call which function.
package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pawlsec/pawl/broker"
)

// schemaVersion is the value that pawl.version() of bootstrap.sql returns.
const schemaVersion = 3

// Backend is one database. It implements [broker.Backend], [broker.Severer], [broker.Prover],
// [broker.Finder], [broker.Remover] and [broker.Watcher]. Safe for concurrent use.
type Backend struct {
	cfg      Config
	address  *pgxpool.Config
	servers  *servers
	database string
	// Severing has its own connections, so that it never queues behind preparing. One of them is always open, since
	// agents can take all others that the server has.
	shaper, revoker *service

	watcher watcher
	stop    context.CancelFunc
	done    sync.WaitGroup

	hosts *hosts // that secrets name

	mu     sync.Mutex               // guards shapes and ends
	shapes map[string]time.Time     // when each shape was last seen in the database
	ends   map[broker.GrantID]int64 // see endsOf
}

// New checks the configuration and starts the background work that renews the broker's own credentials. The database
// need not be up; [Backend.Check] needs it. Close the backend after use.
func New(cfg Config) (*Backend, error) {
	if cfg.Credentials == nil {
		return nil, errors.New("postgres: Credentials is required")
	}
	address, err := parseAddress(cfg.DSN)
	if err != nil {
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.CollectEvery == 0 {
		cfg.CollectEvery = 10 * time.Minute
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	b := &Backend{cfg: cfg, address: address, servers: serversOf(address), database: address.ConnConfig.Database,
		shapes: map[string]time.Time{}, ends: map[broker.GrantID]int64{}}
	b.shaper = newService(Shaper, cfg, address, b.servers)
	b.revoker = newService(Revoker, cfg, address, b.servers)
	b.hosts = &hosts{database: b.database, revoker: b.revoker, shaper: b.shaper, known: b.identities, now: cfg.Now, log: cfg.Log,
		answers: map[string]hostAnswer{}, asking: map[string]chan struct{}{}, of: map[broker.ToolName]string{}}
	b.watcher = watcher{b.revoker, b.hosts, make(chan struct{}, 1)}
	if b.revoker.standbys, err = parseStandbys(cfg.Standbys, b.database); err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	b.stop, b.hosts.running = stop, ctx
	b.done.Go(func() { b.maintain(ctx) })
	b.done.Go(func() { b.revoker.keepOpen(ctx) })
	b.done.Go(func() { b.watcher.run(ctx) })
	for i := range b.revoker.standbys {
		b.done.Go(func() { b.revoker.watchStandby(ctx, i) })
	}
	return b, nil
}

// Close stops the background work, closes the connections, and waits for both.
func (b *Backend) Close() {
	b.stop()
	b.done.Wait()
	b.hosts.checks.Wait()
	b.shaper.close()
	b.revoker.close()
}

// Replaced implements [broker.Watcher].
func (b *Backend) Replaced() <-chan struct{} { return b.watcher.replaced }

// Check reports whether the backend can log in to the database for both purposes, and whether the database was set up
// for this version.
func (b *Backend) Check(ctx context.Context) error {
	for _, s := range []*service{b.shaper, b.revoker} {
		var version int
		if err := s.query(ctx, "SELECT pawl.version()", nil, &version); err != nil {
			return fmt.Errorf("reading the schema version of database %q as %s: %w", b.database, s.purpose, err)
		}
		if version != schemaVersion {
			return fmt.Errorf("database %q has schema version %d, and this build needs %d: run its setup script there again",
				b.database, version, schemaVersion)
		}
	}
	return nil
}

// Limits returns what Pawl does not promise in this database, because of the way in which it was set up.
func (b *Backend) Limits(ctx context.Context) ([]string, error) {
	var limits []string
	err := b.shaper.query(ctx, "SELECT array(SELECT * FROM pawl.limits())", nil, &limits)
	if err != nil {
		return nil, fmt.Errorf("reading the limits of database %q: %w", b.database, err)
	}
	return limits, nil
}

// maintain renews the broker's own credentials before they expire, and collects.
func (b *Backend) maintain(ctx context.Context) {
	tick := time.NewTicker(maintainEvery)
	defer tick.Stop()
	collected := b.cfg.Now()
	for {
		for _, s := range []*service{b.revoker, b.shaper} {
			if err := s.renewIfDue(ctx); err != nil && ctx.Err() == nil {
				b.cfg.Log.Warn("renewing a credential failed", "database", b.database, "purpose", s.purpose, "err", err)
			}
		}
		if b.cfg.CollectEvery > 0 && b.cfg.Now().Sub(collected) >= b.cfg.CollectEvery {
			collected = b.cfg.Now()
			if err := b.collect(ctx, 24*time.Hour); err != nil && ctx.Err() == nil {
				b.cfg.Log.Warn("collecting failed", "database", b.database, "err", err)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

var _ interface {
	broker.Backend
	broker.Severer
	broker.Prover
	broker.Finder
	broker.Watcher
} = (*Backend)(nil)
