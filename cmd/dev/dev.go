// Package dev runs everything that Pawl needs on one machine: a SPIFFE Workload API, a real Vault, a real
// PostgreSQL if it is installed, and the broker with an embedded ledger. `pawl dev`, the demonstration and
// the end-to-end tests use it.
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

// Config selects the parts to run.
type Config struct {
	// Log gets the broker's log. Nil discards it.
	Log *slog.Logger
	// Progress gets a line for each part that is started, and the progress of builds. Nil discards it.
	Progress io.Writer
	// NoPostgres leaves PostgreSQL out even if it is installed.
	NoPostgres bool
	// ForgetfulVault keeps Vault's storage in memory: that Vault cannot be restarted.
	ForgetfulVault bool
	// StandbyVault runs a second node of Vault, and implies ForgetfulVault.
	StandbyVault bool
	// MaxConnections is PostgreSQL's limit. Zero is 300.
	MaxConnections int
	// PostgresSettings are further settings of PostgreSQL. Nil adds none.
	PostgresSettings map[string]string
	// Agents and Operators are the addresses of the listeners. Empty is a free port of the loopback.
	Agents, Operators string
	// External leaves the broker itself to another process, which reads ConfigFile.
	External bool
	// SVIDTTL is the lifetime of SVIDs. Zero is 5 minutes.
	SVIDTTL time.Duration
	// MaxRequestDuration is Vault's max_request_duration, and the broker's mint_bound. Zero is 10 s.
	MaxRequestDuration time.Duration
	// RevokeRetryBase is the start of Vault's exponential backoff between attempts at a revocation. Zero is
	// Vault's own, 10 s.
	RevokeRetryBase time.Duration
}

// Env is the running environment.
type Env struct {
	Dir        string                // has all files; Close removes it
	ConfigFile string                // the configuration of the broker, for `pawl server`
	Config     wire.Config           // the content of ConfigFile
	Identities *workload.Server      // the Workload API
	Vault      *parts.VaultServer    // with its root token
	Postgres   *parts.PostgresServer // nil without PostgreSQL
	Database   string                // superuser's DSN of the database; empty without PostgreSQL
	Broker     *wire.Server          // nil with External

	password   string // of Vault's own database login, until Vault rotates it
	progress   io.Writer
	closeFuncs []func() // in the order of construction; Close runs them in reverse
}

// The SPIFFE IDs of the broker and of the operator.
var (
	BrokerID   = spiffeid.RequireFromString("spiffe://" + TrustDomain + "/pawl")
	OperatorID = spiffeid.RequireFromString("spiffe://" + TrustDomain + "/operator")
)

// Agent returns the SPIFFE ID of a development agent.
func Agent(name string) spiffeid.ID {
	return spiffeid.RequireFromString("spiffe://" + TrustDomain + "/agent/" + name)
}

// Start starts all parts and waits until the broker is logged in to Vault. ctx bounds the start.
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
	e.onClose(func() { _ = os.RemoveAll(e.Dir) }) // a temporary directory
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
	e.report("configuring Vault")
	if err := e.setupVault(ctx); err != nil {
		return e, err
	}
	if c.External {
		return e, nil
	}
	e.report("starting the broker")
	log := c.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if e.Broker, err = wire.Start(ctx, e.Config, log); err != nil {
		return e, err
	}
	e.onClose(e.Broker.Close)
	e.onClose(e.Broker.Drain)
	return e, e.awaitLogin(ctx)
}

func (e *Env) onClose(f func()) { e.closeFuncs = append(e.closeFuncs, f) }

func (e *Env) report(progress string) { fmt.Fprintln(e.progress, "pawl: "+progress) }

// Close stops all parts in the reverse order of their start.
func (e *Env) Close() {
	for len(e.closeFuncs) > 0 {
		last := e.closeFuncs[len(e.closeFuncs)-1]
		e.closeFuncs = e.closeFuncs[:len(e.closeFuncs)-1]
		last()
	}
}

// StopBroker stops only the broker.
func (e *Env) StopBroker() {
	if e.Broker != nil {
		e.Broker.Close()
	}
}

func (e *Env) identities(c Config) (err error) {
	if e.Identities, err = workload.New(workload.Config{TrustDomain: TrustDomain, SVIDTTL: c.SVIDTTL}); err != nil {
		return err
	}
	e.onClose(func() { _ = e.Identities.Close() }) // best effort: it removes its sockets
	return nil
}

func (e *Env) servers(ctx context.Context, c Config) (err error) {
	e.report("starting Vault")
	if e.Vault, err = parts.Vault(ctx, parts.VaultConfig{
		Persistent: !c.ForgetfulVault && !c.StandbyVault, Standby: c.StandbyVault,
		MaxRequestDuration: c.MaxRequestDuration, RevokeRetryBase: c.RevokeRetryBase, Binaries: parts.Binaries{Progress: e.progress}}); err != nil {
		return fmt.Errorf("starting Vault: %w", err)
	}
	e.onClose(func() { _ = e.Vault.Close() }) // best effort: a development server
	if c.NoPostgres {
		return nil
	}
	e.report("starting PostgreSQL")
	connections := c.MaxConnections
	if connections == 0 {
		connections = 300
	}
	e.Postgres, err = parts.PostgreSQL(ctx,
		parts.PostgresConfig{MaxConnections: connections, NoSync: true, Settings: c.PostgresSettings})
	if errors.Is(err, parts.ErrMissing) {
		e.report(err.Error() + ": the database tools are left out")
		return nil
	}
	if err != nil {
		return fmt.Errorf("starting PostgreSQL: %w", err)
	}
	e.onClose(func() { _ = e.Postgres.Close() }) // best effort: a development server
	return e.setupPostgres(ctx)
}

// configure writes the policy, signed by a new key, and the broker's configuration.
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
		"tokens": {Plugin: "jwt", Issuer: "https://" + TrustDomain}, "hosts": {Plugin: "ssh", KRL: e.path("revoked.krl"), KRLInUse: true}}
	if e.Postgres != nil {
		backends["shop"] = wire.Backend{Plugin: "postgres", DSN: e.shopDSN()}
	}
	e.Config = wire.Config{
		TrustDomains: []string{TrustDomain}, WorkloadAPI: address, JWTAudience: "pawl",
		Listen: wire.Listen{Agents: orLoopback(c.Agents), Operators: orLoopback(c.Operators),
			Socket: e.path("admin.sock")},
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

// signPolicy writes the bundle's directory, without the database tools if there is no database, and signs it.
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
	return errors.Join(
		os.WriteFile(e.path("policy.jws"), jws, 0o600),
		os.WriteFile(e.path("policy-keys.json"), keys, 0o600))
}

// awaitLogin waits until the broker is logged in to Vault.
func (e *Env) awaitLogin(ctx context.Context) error {
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
