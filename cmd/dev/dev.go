// Package dev runs everything Pawl needs on one machine: a SPIFFE Workload API, a real Vault, a
// real PostgreSQL where there is one, and the broker on an embedded ledger. `pawl dev`, the
// demonstration and the tests of the whole stand on it.
package dev

import (
	"context"
	"crypto/rand"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/attest/workload"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

//go:embed bundle
var bundle embed.FS

// TrustDomain is the development trust domain.
const TrustDomain = "pawl.dev"

// Config says what to run.
type Config struct {
	// Log gets what the broker logs. Nil: nothing.
	Log *slog.Logger
	// Progress is told what is being started, one line each, and how builds go. Nil: nobody.
	Progress io.Writer
	// NoPostgres leaves PostgreSQL out even where there is one.
	NoPostgres bool
	// ForgetfulVault keeps Vault's storage in memory: it cannot be started again.
	ForgetfulVault bool
	// MaxConnections of PostgreSQL; zero: 300.
	MaxConnections int
	// Agents and Operators are the addresses to listen on; empty: free ports of the loopback.
	Agents, Operators string
	// External leaves the broker itself to another process, which reads ConfigFile.
	External bool
	// SVIDTTL is the life of SVIDs; zero: 5 minutes.
	SVIDTTL time.Duration
	// MaxRequestDuration is Vault's, and the broker's mint_bound; zero: 10 s.
	MaxRequestDuration time.Duration
	// RevokeRetryBase is what Vault's waits between its tries at a revocation grow from; zero: Vault's own, 10 s.
	RevokeRetryBase time.Duration
}

// Env is the running environment.
type Env struct {
	Dir        string                // of everything that is on disk; removed by Close
	ConfigFile string                // what `pawl server` would be started with
	Config     wire.Config           // the same, read
	Identities *workload.Server      // who is who
	Vault      *parts.VaultServer    // with its root token
	Postgres   *parts.PostgresServer // nil without one
	Database   string                // its database's superuser DSN; empty without one
	Broker     *wire.Server          // nil when External

	password string // of Vault's own database login, until it is rotated
	progress io.Writer
	closers  []func()
}

// BrokerID, OperatorID and the agents are who takes part.
var (
	BrokerID   = spiffeid.RequireFromString("spiffe://" + TrustDomain + "/pawl")
	OperatorID = spiffeid.RequireFromString("spiffe://" + TrustDomain + "/operator")
)

// Agent is the SPIFFE ID of a development agent.
func Agent(name string) spiffeid.ID {
	return spiffeid.RequireFromString("spiffe://" + TrustDomain + "/agent/" + name)
}

// Start brings everything up. ctx bounds the start.
func Start(ctx context.Context, c Config) (e *Env, err error) {
	e = &Env{progress: c.Progress}
	if e.progress == nil {
		e.progress = io.Discard
	}
	defer func() {
		if err != nil {
			e.Close()
		}
	}()
	if e.Dir, err = os.MkdirTemp("", "pawl-"); err != nil {
		return e, err
	}
	e.later(func() { _ = os.RemoveAll(e.Dir) }) // a temporary directory
	if c.MaxRequestDuration == 0 {
		c.MaxRequestDuration = 10 * time.Second
	}
	if err := e.identities(c); err != nil {
		return e, err
	}
	if err := e.servers(ctx, c); err != nil {
		return e, err
	}
	if err := e.configure(c); err != nil {
		return e, err
	}
	e.say("configuring Vault")
	if err := e.setupVault(ctx); err != nil {
		return e, err
	}
	if c.External {
		return e, nil
	}
	e.say("starting the broker")
	log := c.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if e.Broker, err = wire.Start(ctx, e.Config, log); err != nil {
		return e, err
	}
	e.later(e.Broker.Close)
	return e, e.ready(ctx)
}

func (e *Env) later(f func()) { e.closers = append(e.closers, f) }

func (e *Env) say(what string) { fmt.Fprintln(e.progress, "pawl: "+what) }

// Close ends everything, what was started last first.
func (e *Env) Close() {
	for len(e.closers) > 0 {
		last := e.closers[len(e.closers)-1]
		e.closers = e.closers[:len(e.closers)-1]
		last()
	}
}

// StopBroker ends the broker alone.
func (e *Env) StopBroker() {
	if e.Broker != nil {
		e.Broker.Close()
	}
}

func (e *Env) identities(c Config) (err error) {
	if e.Identities, err = workload.New(workload.Config{TrustDomain: TrustDomain, SVIDTTL: c.SVIDTTL}); err != nil {
		return err
	}
	e.later(func() { _ = e.Identities.Close() }) // its sockets end with it
	return nil
}

func (e *Env) servers(ctx context.Context, c Config) (err error) {
	e.say("starting Vault")
	if e.Vault, err = parts.Vault(ctx, parts.VaultConfig{Persistent: !c.ForgetfulVault, MaxRequestDuration: c.MaxRequestDuration,
		RevokeRetryBase: c.RevokeRetryBase, Binaries: parts.Binaries{Progress: e.progress}}); err != nil {
		return fmt.Errorf("starting Vault: %w", err)
	}
	e.later(func() { _ = e.Vault.Close() }) // a server of ours, gone with us
	if c.NoPostgres {
		return nil
	}
	e.say("starting PostgreSQL")
	connections := c.MaxConnections
	if connections == 0 {
		connections = 300
	}
	e.Postgres, err = parts.PostgreSQL(ctx, parts.PostgresConfig{MaxConnections: connections, NoSync: true})
	if errors.Is(err, parts.ErrMissing) {
		e.say(err.Error() + ": database tools are left out")
		return nil
	}
	if err != nil {
		return fmt.Errorf("starting PostgreSQL: %w", err)
	}
	e.later(func() { _ = e.Postgres.Close() }) // a server of ours, gone with us
	return e.setupPostgres(ctx)
}

// configure writes the policy, signed by a key made now, and the broker's configuration.
func (e *Env) configure(c Config) error {
	if err := e.signPolicy(); err != nil {
		return err
	}
	if err := os.WriteFile(e.path("vault-ca.pem"), e.Vault.CAPEM(), 0o600); err != nil {
		return err
	}
	address, err := e.Identities.Socket(BrokerID)
	if err != nil {
		return err
	}
	backends := map[string]wire.Backend{"pki": {Plugin: "pki"}, "notes": {Plugin: "kv"}, "vault": {Plugin: "token"},
		"tokens": {Plugin: "jwt", Issuer: "https://" + TrustDomain}, "hosts": {Plugin: "ssh", KRL: e.path("revoked.krl")}}
	if e.Postgres != nil {
		backends["shop"] = wire.Backend{Plugin: "postgres", DSN: e.shopDSN()}
	}
	e.Config = wire.Config{
		TrustDomains: []string{TrustDomain}, WorkloadAPI: address, JWTAudience: "pawl",
		Listen:    wire.Listen{Agents: orLoopback(c.Agents), Operators: orLoopback(c.Operators), Socket: e.path("admin.sock")},
		Operators: []string{OperatorID.String()}, Ledger: e.path("ledger.db"),
		Policy:   wire.Policy{Bundle: e.path("policy.jws"), Keys: e.path("policy-keys.json")},
		Vault:    wire.Vault{Address: e.Vault.Address(), CA: e.path("vault-ca.pem"), MintBound: c.MaxRequestDuration},
		Backends: backends,
	}
	raw, err := yaml.Marshal(e.Config)
	if err != nil {
		return err
	}
	e.ConfigFile = e.path("pawl.yaml")
	if err := os.WriteFile(e.ConfigFile, raw, 0o600); err != nil {
		return err
	}
	_, err = wire.ReadConfig(e.ConfigFile)
	return err
}

func orLoopback(address string) string {
	if address == "" {
		return "127.0.0.1:0"
	}
	return address
}

func (e *Env) path(name string) string { return filepath.Join(e.Dir, name) }

// signPolicy lays the authors' directory out, without the database tools where there is no
// database, and signs it.
func (e *Env) signPolicy() error {
	dir := e.path("policy")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	files := map[string][]string{"bundle.yaml": {"bundle.yaml"}, "tools.yaml": {"tools.yaml"}, "dev.cedar": {"dev.cedar"}}
	if e.Postgres != nil {
		files["tools.yaml"] = append(files["tools.yaml"], "tools-postgres.yaml")
		files["postgres.cedar"] = []string{"postgres.cedar"}
	}
	for name, sources := range files {
		var text []byte
		for _, source := range sources {
			raw, err := bundle.ReadFile("bundle/" + source)
			if err != nil {
				return err
			}
			text = append(text, raw...)
		}
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return err
		}
	}
	source, err := policy.Build(os.DirFS(dir))
	if err != nil {
		return err
	}
	private, public, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	jws, err := policy.Sign(source, private)
	if err != nil {
		return err
	}
	keys, err := json.Marshal(map[string]any{"keys": []any{public}})
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(e.path("policy.jws"), jws, 0o600), os.WriteFile(e.path("policy-keys.json"), keys, 0o600))
}

// ready waits until the broker is logged in to Vault.
func (e *Env) ready(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := e.Broker.Vault.Ready()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the broker is not logged in to Vault: %w", err)
		case <-tick.C:
		}
	}
}
