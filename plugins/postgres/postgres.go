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
	"net/url"
	"regexp"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pawlsec/pawl/broker"
)

// Purpose is the purpose of one of the broker's own credentials.
type Purpose string

// The purposes; each is a group role in bootstrap.sql.
const (
	Shaper  Purpose = "shaper"  // makes shapes
	Revoker Purpose = "revoker" // severs, inspects and removes agents' logins
)

// Credentials gets the broker's own credentials from the Vault roles that [VaultSetup.Writes] defines. Safe for
// concurrent use. The revoker's credential should live for an hour or more: severing works with Vault down for as long
// as it lives.
type Credentials interface {
	Credential(ctx context.Context, p Purpose) (username, password string, expires time.Time, err error)
}

// Config names the database and the source of the broker's own credentials.
type Config struct {
	// DSN is the database's address without user and password, such as
	// "host=db.internal port=5432 dbname=app sslmode=verify-full". Required.
	DSN string
	// Credentials is the source of the broker's own credentials. Required.
	Credentials Credentials
	// Now is the clock for evidence and for the expiry of credentials. Nil is time.Now.
	Now func() time.Time
	// CollectEvery is how often the backend removes shapes that were unused for a day, and logins that Vault failed to
	// end. Zero is 10 minutes, negative is never.
	CollectEvery time.Duration
	// Log receives the failures of background work. Nil discards them.
	Log *slog.Logger
}

// schemaVersion is the value that pawl.version() of bootstrap.sql returns.
const schemaVersion = 2

// maintainEvery is how often the broker's own credentials are checked.
const maintainEvery = 30 * time.Second

// Backend is one database. It implements [broker.Backend], [broker.Severer], [broker.Prover],
// [broker.Finder] and [broker.Remover]. Safe for concurrent use.
type Backend struct {
	cfg      Config
	address  *pgxpool.Config
	database string
	// Severing has its own connections, so that it never queues behind preparing. One of them is always open, since
	// agents can take all others that the server has.
	shaper, revoker *service

	stop context.CancelFunc
	done sync.WaitGroup

	// mu guards shapes.
	mu     sync.Mutex
	shapes map[string]time.Time // when each shape was last seen in the database
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
	b := &Backend{cfg: cfg, address: address, database: address.ConnConfig.Database, shapes: map[string]time.Time{}}
	b.shaper = newService(Shaper, cfg, address)
	b.revoker = newService(Revoker, cfg, address)
	ctx, stop := context.WithCancel(context.Background())
	b.stop = stop
	b.done.Go(func() { b.maintain(ctx) })
	b.done.Go(func() { b.revoker.keepOpen(ctx) })
	return b, nil
}

// parseAddress refuses a DSN with a password, since Credentials provides it. It ignores a password that pgx finds in
// the environment (PGPASSWORD, a password file): that one belongs to another program.
func parseAddress(dsn string) (*pgxpool.Config, error) {
	if dsn == "" {
		return nil, errors.New("postgres: DSN is required")
	}
	address, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, errors.New("postgres: DSN does not parse") // pgx's own text quotes the DSN
	}
	if holdsPassword(dsn) {
		return nil, errors.New("postgres: DSN must not contain a password")
	}
	address.ConnConfig.Password = ""
	if !isIdentifier(address.ConnConfig.Database) {
		return nil, errors.New("postgres: DSN must name a database, with at most 63 bytes")
	}
	if address.ConnConfig.ConnectTimeout == 0 {
		address.ConnConfig.ConnectTimeout = 5 * time.Second
	}
	address.MaxConns = 4
	return address, nil
}

var passwordKey = regexp.MustCompile(`(?i)(^|\s)password\s*=`)

// holdsPassword reports whether a DSN of either form contains a password.
func holdsPassword(dsn string) bool {
	if u, err := url.Parse(dsn); err == nil && (u.Scheme == "postgres" || u.Scheme == "postgresql") {
		_, has := u.User.Password()
		return has || u.Query().Has("password")
	}
	return passwordKey.MatchString(dsn)
}

// Close stops the background work, closes the connections, and waits for both.
func (b *Backend) Close() {
	b.stop()
	b.done.Wait()
	b.shaper.close()
	b.revoker.close()
}

// Check reports whether the backend can log in to the database for both purposes, and whether the database was set up
// for this version.
func (b *Backend) Check(ctx context.Context) error {
	for _, s := range []*service{b.shaper, b.revoker} {
		var version int
		if err := s.query(ctx, "SELECT pawl.version()", nil, &version); err != nil {
			return fmt.Errorf("reading the schema version of database %q as %s: %w", b.database, s.purpose, err)
		}
		if version != schemaVersion {
			return fmt.Errorf("database %q has schema version %d, and this build needs %d: run its setup script there again", b.database, version, schemaVersion)
		}
	}
	return nil
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
} = (*Backend)(nil)
