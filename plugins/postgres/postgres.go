// Package postgres hands out PostgreSQL logins that can do exactly what a step asked for, cuts
// them in bulk at the database, and proves them dead.
//
// A distinct set of tables, verbs, row filter and limits is a shape. Its rights are given once, to
// a group role named after the hash of the shape; a credential is a login that is a member of
// that group and holds nothing itself. The login's name, pawl-<grant>-<shape>-<random>, is drawn by
// Vault from the display name of the step's token; the function in the database that Vault's one
// creation statement calls takes the shape from it. So Vault needs no role for each shape, and the
// broker no right to write statements into Vault.
//
// bootstrap.sql says what the database holds for this and who may call what.
package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"regexp"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pawlsec/pawl/broker"
)

// Purpose is what a credential of the broker's own is for.
type Purpose string

// The purposes; each is a group role in bootstrap.sql.
const (
	Shaper  Purpose = "shaper"  // makes shapes
	Revoker Purpose = "revoker" // severs, inspects and removes agents' logins
)

// Credentials gets the broker's own credentials, from the Vault roles that [VaultSetup.Writes]
// names. Safe for concurrent use. The revoker's should live for an hour or more: for as long as it
// lives, severing works with Vault down.
type Credentials interface {
	Credential(ctx context.Context, p Purpose) (username, password string, expires time.Time, err error)
}

// Config says which database, and how to get in.
type Config struct {
	// DSN is the database's address without user and password, such as
	// "host=db.internal port=5432 dbname=app sslmode=verify-full". Required.
	DSN string
	// Credentials is where the broker's own credentials come from. Required.
	Credentials Credentials
	// Now is the clock of evidence and of credentials' ends. Nil is time.Now.
	Now func() time.Time
	// CollectEvery is how often shapes that nobody used for a day, and logins that Vault failed to end,
	// are cleared away. Zero is 10 minutes, negative is never.
	CollectEvery time.Duration
	// Log gets what goes wrong in the background. Nil discards it.
	Log *slog.Logger
}

// maintainEvery is how often the broker's own credentials are checked.
const maintainEvery = 30 * time.Second

// Backend is one database. It implements [broker.Backend], [broker.Severer], [broker.Prover],
// [broker.Finder] and [broker.Remover]. Safe for concurrent use.
type Backend struct {
	cfg      Config
	address  *pgxpool.Config
	database string
	// Severing has connections of its own, so that it never queues behind preparing.
	shaper, revoker *service

	stop context.CancelFunc
	done sync.WaitGroup

	// mu guards known.
	mu    sync.Mutex
	known map[string]time.Time // shapes found in the database, and when
}

// New checks the configuration and starts to look after the revoker's credential. It does not need
// the database to be up; [Backend.Check] does. Close it after use.
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
	b := &Backend{cfg: cfg, address: address, database: address.ConnConfig.Database, known: map[string]time.Time{}}
	b.shaper = newService(Shaper, cfg, address)
	b.revoker = newService(Revoker, cfg, address)
	ctx, stop := context.WithCancel(context.Background())
	b.stop = stop
	b.done.Go(func() { b.look(ctx) })
	return b, nil
}

// parseAddress refuses a DSN with a password: who to be is Credentials' to say. One that pgx finds
// in the environment (PGPASSWORD, a password file) is somebody else's, and is not used.
func parseAddress(dsn string) (*pgxpool.Config, error) {
	if dsn == "" {
		return nil, errors.New("postgres: DSN is required")
	}
	address, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, errors.New("postgres: DSN cannot be read") // pgx's text quotes it
	}
	if holdsPassword(dsn) {
		return nil, errors.New("postgres: DSN must not hold a password")
	}
	address.ConnConfig.Password = ""
	if !isName(address.ConnConfig.Database) {
		return nil, errors.New("postgres: DSN must name a database")
	}
	if address.ConnConfig.ConnectTimeout == 0 {
		address.ConnConfig.ConnectTimeout = 5 * time.Second
	}
	address.MaxConns = 4
	return address, nil
}

var passwordKey = regexp.MustCompile(`(?i)(^|\s)password\s*=`)

// holdsPassword reports whether a DSN of either form has a password in its own text.
func holdsPassword(dsn string) bool {
	if u, err := url.Parse(dsn); err == nil && (u.Scheme == "postgres" || u.Scheme == "postgresql") {
		_, has := u.User.Password()
		return has || u.Query().Has("password")
	}
	return passwordKey.MatchString(dsn)
}

// Close ends the background work and the connections, and waits for both.
func (b *Backend) Close() {
	b.stop()
	b.done.Wait()
	b.shaper.close()
	b.revoker.close()
}

// Check reports whether the database can be reached for both purposes and was set up for this
// version.
func (b *Backend) Check(ctx context.Context) error {
	for _, s := range []*service{b.shaper, b.revoker} {
		var version int
		if err := s.query(ctx, "SELECT pawl.version()", nil, &version); err != nil {
			return fmt.Errorf("asking database %q as %s: %w", b.database, s.purpose, err)
		}
		if version != schemaVersion {
			return fmt.Errorf("database %q is set up in version %d, want %d", b.database, version, schemaVersion)
		}
	}
	return nil
}

// look keeps the broker's credentials from running out, and collects.
func (b *Backend) look(ctx context.Context) {
	tick := time.NewTicker(maintainEvery)
	defer tick.Stop()
	collected := b.cfg.Now()
	for {
		for _, s := range []*service{b.revoker, b.shaper} {
			if err := s.keep(ctx); err != nil && ctx.Err() == nil {
				b.cfg.Log.Warn("renewing a credential", "database", b.database, "purpose", s.purpose, "err", err)
			}
		}
		if b.cfg.CollectEvery > 0 && b.cfg.Now().Sub(collected) >= b.cfg.CollectEvery {
			collected = b.cfg.Now()
			if err := b.collect(ctx, 24*time.Hour); err != nil && ctx.Err() == nil {
				b.cfg.Log.Warn("collecting", "database", b.database, "err", err)
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
} = (*Backend)(nil)
