package postgres

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"regexp"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
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
	// "host=db.internal port=5432 dbname=app sslmode=verify-full". It may name several servers, of which one is the
	// primary, and the broker follows a failover. Required.
	DSN string
	// Standbys are the DSNs of the hot standbys of that server at which agents can log in, in the form of DSN. Their
	// sessions are ended and counted there. Each has a name that leads to it alone. One that is the primary at present
	// is no mistake. Empty: agents can log in at no standby.
	Standbys []string
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

// keepConnected makes a pool keep one connection. The default would close it after an hour. Opening another one can
// fail, while agents hold all connections that the server has. A credential lives for at most 25 hours.
func keepConnected(address *pgxpool.Config) {
	address.MinConns, address.MaxConnLifetime = 1, 25*time.Hour
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

// nameOf returns the host and port of an address, for messages.
func nameOf(address *pgxpool.Config) string {
	return server{address.ConnConfig.Host, address.ConnConfig.Port}.String()
}
