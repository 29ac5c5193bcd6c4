package postgres

import (
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
)

//go:embed bootstrap.sql
var bootstrap string

// Bootstrap returns the script that [Setup] runs. Platform teams can run it themselves, as a superuser and in one
// transaction.
func Bootstrap() string { return bootstrap }

// BootstrapWithoutSuperuser returns the script for a role with CREATEROLE that owns the database. pawl.limits() returns
// what the result does not promise.
func BootstrapWithoutSuperuser() string {
	lines := strings.SplitAfter(bootstrap, "\n")
	lines = slices.DeleteFunc(lines, func(line string) bool { return strings.HasSuffix(line, "; -- superuser\n") })
	return strings.Replace(strings.Join(lines, ""), "-- no superuser: ", "", -1)
}

// SetupConfig describes how to set up a database.
type SetupConfig struct {
	// VaultPassword is the new password of pawl_vault, the role of Vault's connection. Empty keeps the present one.
	// Vault's rotate-root replaces it with a password that only Vault knows.
	VaultPassword string
	// NoSuperuser is set if the connection is that of a role with CREATEROLE which owns the database, and the tables or
	// the right to grant them.
	NoSuperuser bool
	// Tables lists the tables that agents may get. Setup adds them to those of earlier calls and never withdraws one.
	Tables []Grantable
}

// Grantable is a table and the verbs on it that agents may get.
type Grantable struct {
	Table string   // "schema.table", or "table" in public
	Verbs []string // of select, insert, update, delete
}

// grantSequences lets agents use the sequences of the tables that they may insert into.
const grantSequences = `DO $$ DECLARE statement text; BEGIN
	FOR statement IN SELECT pawl.sequence_grants() LOOP EXECUTE statement; END LOOP; END $$`

// Setup runs bootstrap.sql and the grants of cfg in one transaction. It also grants the sequences that the tables'
// defaults use. The connection must be a superuser's, but see cfg.NoSuperuser. Setup may be repeated.
func Setup(ctx context.Context, conn *pgx.Conn, cfg SetupConfig) error {
	statements := []string{bootstrap}
	if cfg.NoSuperuser {
		statements = []string{BootstrapWithoutSuperuser()}
	}
	if cfg.VaultPassword != "" {
		verifier, err := scramVerifier(cfg.VaultPassword)
		if err != nil {
			return err
		}
		statements = append(statements, fmt.Sprintf("ALTER ROLE pawl_vault PASSWORD '%s'", verifier))
	}
	for _, g := range cfg.Tables {
		t, err := parseTable(g.Table, "public")
		if err != nil {
			return fmt.Errorf("grantable table %q: %w", g.Table, err)
		}
		verbs, err := parseVerbs(g.Verbs)
		if err != nil {
			return fmt.Errorf("grantable table %q: %w", g.Table, err)
		}
		statements = append(statements,
			fmt.Sprintf("GRANT USAGE ON SCHEMA %s TO pawl_maker WITH GRANT OPTION", pgx.Identifier{t[0]}.Sanitize()),
			fmt.Sprintf("GRANT %s ON %s TO pawl_maker WITH GRANT OPTION",
				strings.Join(verbs, ", "), t.sql()))
	}
	statements = append(statements, grantSequences)
	tx, err := conn.Begin(ctx)
	if err != nil {
		return fmt.Errorf("setting up the database: %w", err)
	}
	defer func() { _ = tx.Rollback(ctx) }() // after Commit it does nothing
	for _, sql := range statements {
		if _, err := tx.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			return fmt.Errorf("setting up the database: %w", err)
		}
	}
	if err := tx.Commit(ctx); err != nil {
		return fmt.Errorf("setting up the database: %w", err)
	}
	return nil
}

// scramVerifier returns the SCRAM-SHA-256 verifier of a password (RFC 5803, as PostgreSQL stores it). With it the
// password itself appears in no statement, and so in no log. The password must be printable ASCII: other text would
// need SASLprep.
func scramVerifier(password string) (string, error) {
	for i := 0; i < len(password); i++ {
		if password[i] < ' ' || password[i] > '~' {
			return "", errors.New("the password is not printable ASCII")
		}
	}
	const iterations = 4096
	salt := make([]byte, 16)
	if _, err := rand.Read(salt); err != nil {
		return "", fmt.Errorf("drawing salt: %w", err)
	}
	salted, err := pbkdf2.Key(sha256.New, password, salt, iterations, sha256.Size)
	if err != nil {
		return "", fmt.Errorf("deriving a verifier: %w", err)
	}
	stored := sha256.Sum256(mac(salted, "Client Key"))
	b64 := base64.StdEncoding.EncodeToString
	server := mac(salted, "Server Key")
	return fmt.Sprintf("SCRAM-SHA-256$%d:%s$%s:%s", iterations, b64(salt), b64(stored[:]), b64(server)), nil
}

func mac(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}

// VaultSetup describes the configuration that Vault needs to issue for one database.
type VaultSetup struct {
	Mount      string                   // of the database engine, such as "database"
	Connection string                   // name of the connection in that mount
	Address    string                   // host:port for Vault to connect to
	Database   string                   // name of the database
	SSLMode    string                   // of Vault's connection; empty: verify-full
	Tools      map[string]time.Duration // Vault role of each tool, and the tool's TTL; zero: broker.DefaultTTL
	Service    map[Purpose]string       // Vault role of the broker's own credentials, for both purposes
	ServiceTTL time.Duration            // of those credentials; zero: 4 h, at most 24 h
}

// readWrite lets a login end in a database that is read only by default.
const readWrite = "SET TRANSACTION READ WRITE"

// VaultWrite is one write to Vault.
type VaultWrite struct {
	Path broker.VaultPath
	Data map[string]any
}

// Writes returns the writes to Vault, the connection first. The caller adds the member "password" to that one: the
// password of pawl_vault. After the writes, rotate-root replaces it with a password that only Vault knows. Vault cannot
// renew leases of these roles. It returns an error if a name in v can be no part of a Vault path.
func (v VaultSetup) Writes() ([]VaultWrite, error) {
	sslmode, serviceTTL := v.SSLMode, v.ServiceTTL
	if sslmode == "" {
		sslmode = "verify-full"
	}
	if serviceTTL <= 0 {
		serviceTTL = 4 * time.Hour
	}
	var roles []VaultWrite
	var allowed []string
	var wrong []error
	path := func(kind, name string) broker.VaultPath {
		p, err := broker.VaultPathOf(v.Mount, kind, name)
		wrong = append(wrong, err)
		return p
	}
	role := func(name string, ttl time.Duration, create, end string) {
		seconds := fmt.Sprintf("%ds", int(ttl.Seconds()))
		allowed = append(allowed, name)
		roles = append(roles, VaultWrite{Path: path("roles", name), Data: map[string]any{
			"db_name": v.Connection, "default_ttl": seconds, "max_ttl": seconds,
			"creation_statements": []string{create}, "revocation_statements": []string{readWrite, end},
		}})
	}
	for _, name := range slices.Sorted(maps.Keys(v.Tools)) {
		role(name, leaseTTL(v.Tools[name]), "SELECT pawl.grant_login('{{name}}', '{{password}}', '{{expiration}}')",
			"SELECT pawl.end_logins(ARRAY['{{name}}'])")
	}
	for _, purpose := range slices.Sorted(maps.Keys(v.Service)) {
		role(v.Service[purpose], min(serviceTTL, 24*time.Hour), fmt.Sprintf(
			"SELECT pawl.grant_service_login('{{name}}', '{{password}}', '{{expiration}}', '%s')", purpose),
			"SELECT pawl.end_service_login('{{name}}')")
	}
	connection := VaultWrite{Path: path("config", v.Connection), Data: map[string]any{
		"plugin_name": "postgresql-database-plugin",
		"connection_url": fmt.Sprintf("postgresql://{{username}}:{{password}}@%s/%s?sslmode=%s",
			v.Address, url.PathEscape(v.Database), sslmode),
		"username":                "pawl_vault",
		"password_authentication": "scram-sha-256", // the database never sees the password itself
		"username_template": `{{ printf "pawl-%s-%s" (.DisplayName | replace "token-" "" | replace "://" "-" ` +
			`| replace "/" "-" | truncate 48) (random 8) }}`,
		"allowed_roles":        allowed,
		"max_open_connections": 16,
	}}
	if err := errors.Join(wrong...); err != nil {
		return nil, fmt.Errorf("postgres: setting up Vault: %w", err)
	}
	return append([]VaultWrite{connection}, roles...), nil
}
