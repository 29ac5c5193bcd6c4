package dev

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/cmd/wire"
	"github.com/pawlsec/pawl/plugins/postgres"
	"github.com/pawlsec/pawl/plugins/vault"
)

const vaultLogin = "pawl_vault"

// setupPostgres makes the database of a small shop, and grants the rights that agents may get.
func (e *Env) setupPostgres(ctx context.Context) (err error) {
	if e.Database, err = e.Postgres.CreateDatabase(ctx); err != nil {
		return err
	}
	conn, err := pgx.Connect(ctx, e.Database)
	if err != nil {
		return err
	}
	defer conn.Close(ctx) //nolint:errcheck // the work is committed by then
	if _, err := conn.Exec(ctx, `
		CREATE TABLE orders (id serial PRIMARY KEY, item text NOT NULL, price numeric NOT NULL);
		CREATE TABLE customers (id serial PRIMARY KEY, name text NOT NULL);
		INSERT INTO orders (item, price) VALUES ('ratchet', 12.50), ('pawl', 3.20), ('spring', 0.80);
		INSERT INTO customers (name) VALUES ('Ada'), ('Grace');`); err != nil {
		return err
	}
	return postgres.Setup(ctx, conn, postgres.SetupConfig{VaultPassword: e.vaultPassword(), Tables: []postgres.Grantable{
		{Table: "orders", Verbs: []string{"select", "insert", "update", "delete"}},
		{Table: "customers", Verbs: []string{"select"}},
	}})
}

// vaultPassword returns the password of pawl_vault. It is made once; rotate-root replaces it.
func (e *Env) vaultPassword() string {
	if e.password == "" {
		e.password = rand.Text()
	}
	return e.password
}

func (e *Env) shopDSN() string {
	host, port, _ := strings.Cut(e.Postgres.Address(), ":")
	return fmt.Sprintf("host=%s port=%s dbname=%s sslmode=disable", host, port, e.databaseName())
}

func (e *Env) databaseName() string {
	u, err := url.Parse(e.Database)
	if err != nil {
		panic("dev: the DSN of parts.PostgresServer does not parse")
	}
	return strings.TrimPrefix(u.Path, "/")
}

// setupVault sets up a fresh Vault for the broker: first the mounts, as an operator of Vault would, and then
// the writes of `pawl vault plan`.
func (e *Env) setupVault(ctx context.Context) error {
	mounts, err := e.mounts()
	if err != nil {
		return err
	}
	for _, w := range mounts {
		if err := e.write(ctx, w); err != nil {
			return err
		}
	}
	bundle := e.Identities.Bundle()
	var authorities strings.Builder
	for _, cert := range bundle.X509Authorities() {
		if err := pem.Encode(&authorities, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}); err != nil {
			return err
		}
	}
	running, err := wire.LoadPolicy(e.Config.Policy)
	if err != nil {
		return err
	}
	tools := running.Current().Tools()
	writes, err := wire.Writes(tools, e.Config.Backends)
	if err != nil {
		return err
	}
	for _, w := range writes {
		if err := e.write(ctx, w); err != nil {
			return err
		}
	}
	reads, err := wire.Reads(tools, e.Config.Backends)
	if err != nil {
		return err
	}
	_, err = vault.Setup(ctx, e.admin(), vault.SetupConfig{BrokerID: BrokerID, TrustPEM: authorities.String(),
		Tools: wire.Access(tools, e.Config.Backends), Reads: reads})
	return err
}

// write makes one write, and retries it: tests limit Vault's requests to two seconds, which a mount sometimes
// exceeds on a busy machine.
func (e *Env) write(ctx context.Context, w vault.Write) (err error) {
	w.Exists = true
	for range 3 {
		if err = e.admin().Write(ctx, w); err == nil {
			return nil
		}
	}
	return err
}

func (e *Env) admin() vault.Admin {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(e.Vault.CAPEM())
	return vault.Admin{Address: e.Vault.Address(), Roots: roots, Token: e.Vault.RootToken()}
}

func (e *Env) mounts() ([]vault.Write, error) {
	post := func(path string, data map[string]any) vault.Write {
		return vault.Write{Method: "POST", Path: path, Data: data}
	}
	writes := []vault.Write{
		post("sys/mounts/secret", map[string]any{"type": "kv", "options": map[string]any{"version": "2"}}),
		post("secret/data/notes", map[string]any{"data": map[string]any{"note": "kept in a drawer"}}),
		post("sys/policies/acl/dev-notes", map[string]any{"policy": `path "secret/data/notes" { capabilities = ["read"] }`}),
		post("sys/mounts/pki", map[string]any{"type": "pki"}),
		post("pki/root/generate/internal",
			map[string]any{"common_name": "Pawl development", "key_type": "ec", "ttl": "24h"}),
		post("pki/roles/pawl-client", map[string]any{"allowed_domains": "agents.pawl.dev", "allow_subdomains": true,
			"client_flag": true, "server_flag": false, "key_type": "ec", "key_bits": 256,
			"generate_lease": true, "max_ttl": "5m"}),
	}
	writes = append(writes,
		post("sys/mounts/transit", map[string]any{"type": "transit"}),
		post("transit/keys/pawl-tokens", map[string]any{"type": "ecdsa-p256"}),
		post("sys/mounts/ssh", map[string]any{"type": "ssh"}),
		post("ssh/config/ca", map[string]any{"generate_signing_key": true, "key_type": "ssh-ed25519"}),
		post("ssh/roles/pawl-uptime", map[string]any{"key_type": "ca",
			"allow_user_certificates": true, "allowed_users": "pawl",
			"allowed_critical_options": "force-command,source-address",
			"allowed_extensions":       "", "default_extensions": map[string]any{},
			"allow_user_key_ids": true, "max_ttl": "5m"}),
	)
	if e.Postgres == nil {
		return writes, nil
	}
	writes = append(writes, post("sys/mounts/database", map[string]any{"type": "database"}))
	setup := postgres.VaultSetup{Mount: "database", Connection: "shop",
		Address: e.Postgres.Address(), Database: e.databaseName(),
		SSLMode: "disable", Tools: map[string]time.Duration{"pawl-db-read": 0, "pawl-db-admin": 0},
		Service: map[postgres.Purpose]string{postgres.Shaper: "pawl-shaper", postgres.Revoker: "pawl-revoker"}}
	database, err := setup.Writes()
	if err != nil {
		return nil, err
	}
	for _, w := range database {
		if w.Data["username"] == vaultLogin {
			w.Data["password"] = e.vaultPassword()
		}
		writes = append(writes, post(w.Path.String(), w.Data))
	}
	return append(writes, post("database/rotate-root/shop", map[string]any{})), nil
}
