package main

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing/fstest"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/cmd/bench/plain"
	"github.com/pawlsec/pawl/cmd/bench/process"
	"github.com/pawlsec/pawl/cmd/bench/profiled"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
	"github.com/pawlsec/pawl/plugins/postgres"
	"github.com/pawlsec/pawl/plugins/vault"
)

// world is the real servers: those of `pawl dev`, with the broker in a process of its own. The bundle's secrets live
// long enough to be measured. Vault also has the roles that a platform team without Pawl would make.
type world struct {
	env      *dev.Env
	program  string // pawl
	config   string // of the broker
	broker   *process.Broker
	vaultPID int
	operator *operator.Client
	listener string      // address of the operators' listener
	limits   wire.Limits // of the broker
	admin    vault.Admin
	direct   *plain.Vault // with the root token
	closers  []func()
}

// secretTTL is the life of the secrets of both sides. No secret expires while it is measured.
const secretTTL = 14 * time.Minute

func newWorld(ctx context.Context, b *bench) (*world, error) {
	return openWorld(ctx, b, b.dir, dev.Config{MaxConnections: 1300,
		PostgresSettings: map[string]string{"max_prepared_transactions": "5"}}, noLimits)
}

// noLimits are for the measurements of one agent's speed.
var noLimits = wire.Limits{Requests: 1_000_000, Streams: 1_000_000, LedgerPerDay: 1 << 50, Connections: 10_000, Refusals: 1_000_000}

// openWorld starts the servers as in the configuration, and the broker with its files in dir.
func openWorld(ctx context.Context, b *bench, dir string, c dev.Config, limits wire.Limits) (w *world, err error) {
	w = &world{program: filepath.Join(b.root, "build", "pawl"), limits: limits}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	build := exec.CommandContext(ctx, "go", "build", "-o", w.program, "./cmd/pawl")
	build.Dir, build.Stderr = b.root, os.Stderr
	if err := build.Run(); err != nil {
		return w, fmt.Errorf("building pawl: %w", err)
	}
	c.External, c.ForgetfulVault, c.SVIDTTL, c.Progress = true, true, 4*time.Hour, os.Stderr
	if w.env, err = dev.Start(ctx, c); err != nil {
		return w, err
	}
	w.later(w.env.Close)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(w.env.Vault.CAPEM())
	w.admin = vault.Admin{Address: w.env.Vault.Address(), Roots: roots, Token: w.env.Vault.RootToken()}
	w.direct = plain.NewVault(w.env.Vault.Address(), roots, w.env.Vault.RootToken())
	if err := w.teachVault(ctx); err != nil {
		return w, err
	}
	if err := w.configure(ctx, dir); err != nil {
		return w, err
	}
	program := []string{w.program}
	if b.profileBroker != "" && b.world == nil {
		self, err := os.Executable()
		if err != nil {
			return w, err
		}
		program = []string{self, profiled.Command, b.profileBroker}
	}
	if w.broker, err = process.StartBroker(ctx, program, w.config, filepath.Join(b.root, "build", "bench-broker.log")); err != nil {
		return w, err
	}
	w.later(func() { _ = w.broker.Stop() }) // its files are removed with the rest
	address := strings.TrimPrefix(w.env.Vault.Address(), "https://")
	if w.vaultPID, err = process.ChildWith(address); err != nil {
		b.report.LeaveOut("CPU time of Vault", err)
	}
	if w.operator, err = operator.New(operator.Config{Address: "unix:" + w.env.Config.Listen.Socket}); err != nil {
		return w, err
	}
	w.later(w.operator.Close)
	return w, w.ready(ctx)
}

func (w *world) later(f func()) { w.closers = append(w.closers, f) }

func (w *world) close() {
	for i := len(w.closers) - 1; i >= 0; i-- {
		w.closers[i]()
	}
	w.closers = nil
}

// tools are those of the development bundle, with a longer life of the secrets.
const tools = `tools:
  - {name: tls.call, backend: pki, narrowing: native, ttl: 14m,
     arguments: {name: {kind: string, required: true}}, settings: {arg.name: common_name},
     vault: {policy: pawl-tool-tls-call, path: pki/pawl-client}}
  - {name: tls.ask, backend: pki, narrowing: native, ttl: 14m, arguments: {name: {kind: string, required: true}},
     settings: {arg.name: common_name, revocation: ocsp}, vault: {policy: pawl-tool-tls-ask, path: pki/pawl-client}}
  - {name: notes.read, backend: notes, narrowing: none, ttl: 14m,
     vault: {policy: pawl-tool-notes-read, path: secret/notes}}
  - {name: api.call, backend: tokens, narrowing: native, ttl: 14m,
     arguments: {audience: {kind: string, required: true}}, settings: {arg.audience: audience, scope: read},
     vault: {policy: pawl-tool-api-call, path: transit/pawl-tokens}}
  - {name: host.uptime, backend: hosts, narrowing: native, ttl: 14m,
     settings: {principal: pawl, force_command: uptime},
     vault: {policy: pawl-tool-host-uptime, path: ssh/pawl-uptime}}
`

const databaseTools = `  - {name: db.read, backend: shop, narrowing: native, ttl: 14m,
     arguments: {tables: {kind: list, required: true, constraint: {subset: [orders, customers]}}},
     settings: {verbs: select, sslmode: disable, idle_timeout: 1h},
     vault: {policy: pawl-tool-db-read, path: database/pawl-bench-read}}
`

const cedarText = `@id("agents-work")
@any("tool")
permit (
  principal in AgentGroup::"spiffe://pawl.dev/agent",
  action in [Action::"open", Action::"delegate", Action::"use"],
  resource
);
`

// configure signs the bundle and writes the broker's configuration, its ledger below dir.
func (w *world) configure(ctx context.Context, dir string) error {
	text := tools
	if w.env.Postgres != nil {
		text += databaseTools
	}
	source, err := policy.Build(fstest.MapFS{
		"bundle.yaml": {Data: []byte("name: pawl-bench\nversion: 1\n")},
		"tools.yaml":  {Data: []byte(text)},
		"bench.cedar": {Data: []byte(cedarText)},
	})
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
	c := w.env.Config
	c.Policy = wire.Policy{Bundle: filepath.Join(dir, "policy.jws"), Keys: filepath.Join(dir, "keys.json")}
	c.Ledger, c.Limits = filepath.Join(dir, "ledger.db"), w.limits
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	w.listener = free.Addr().String()
	c.Listen.Operators = w.listener
	_ = free.Close() // the broker takes it
	w.config = filepath.Join(dir, "pawl.yaml")
	raw, err := yaml.Marshal(c)
	if err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(c.Policy.Bundle, jws, 0o600), os.WriteFile(c.Policy.Keys, keys, 0o600),
		os.WriteFile(w.config, raw, 0o600)); err != nil {
		return err
	}
	running, err := wire.LoadPolicy(c.Policy)
	if err != nil {
		return err
	}
	list := running.Current().Tools()
	var trust strings.Builder
	for _, cert := range w.env.Identities.Bundle().X509Authorities() {
		if err := pem.Encode(&trust, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}); err != nil {
			return err
		}
	}
	reads, err := wire.Reads(list, c.Backends)
	if err != nil {
		return err
	}
	_, err = vault.Setup(ctx, w.admin, vault.SetupConfig{BrokerID: dev.BrokerID, TrustPEM: trust.String(),
		Tools: wire.Access(list, c.Backends), Reads: reads})
	return err
}

// bestRevocation has the statements that a platform team with PostgreSQL experience writes for Vault.
var bestRevocation = []string{
	`ALTER ROLE "{{name}}" NOLOGIN`,
	`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{{name}}'`,
	`DROP OWNED BY "{{name}}" CASCADE`,
	`DROP ROLE IF EXISTS "{{name}}"`,
}

// teachVault raises the TTLs of our roles and makes the roles of a Vault without Pawl: the same database over a
// connection of its own, one role with the engine's default revocation statements and one with the best.
func (w *world) teachVault(ctx context.Context) error {
	ttl := fmt.Sprintf("%ds", int(secretTTL.Seconds()))
	writes := []vault.Write{
		{Method: "POST", Path: "pki/config/crl", Data: map[string]any{"auto_rebuild": true, "expiry": "24h", "auto_rebuild_grace_period": "12h"}},
		{Method: "POST", Path: "pki/roles/plain", Data: map[string]any{"allowed_domains": "agents.pawl.dev", "allow_subdomains": true,
			"client_flag": true, "server_flag": false, "key_type": "ec", "key_bits": 256, "generate_lease": true, "max_ttl": "20m"}},
		{Method: "POST", Path: "pki/roles/pawl-client", Data: map[string]any{"allowed_domains": "agents.pawl.dev", "allow_subdomains": true,
			"client_flag": true, "server_flag": false, "key_type": "ec", "key_bits": 256, "generate_lease": true, "max_ttl": "20m"}},
		{Method: "POST", Path: "ssh/roles/pawl-uptime", Data: map[string]any{"key_type": "ca", "allow_user_certificates": true, "allowed_users": "pawl",
			"allowed_critical_options": "force-command,source-address", "allowed_extensions": "", "default_extensions": map[string]any{},
			"allow_user_key_ids": true, "max_ttl": "20m"}},
		{Method: "POST", Path: "sys/policies/acl/bench-direct", Data: map[string]any{"policy": `
			path "secret/data/*" { capabilities = ["read"] }
			path "transit/sign/*" { capabilities = ["update"] }
			path "pki/issue/*" { capabilities = ["update"] }
			path "ssh/sign/*" { capabilities = ["update"] }
			path "plain/creds/*" { capabilities = ["read"] }`}},
	}
	if w.env.Postgres != nil {
		if err := w.prepareDatabase(ctx); err != nil {
			return err
		}
		setup := postgres.VaultSetup{Mount: "database", Connection: "shop", Tools: map[string]time.Duration{"pawl-bench-read": secretTTL}}
		roles, err := setup.Writes()
		if err != nil {
			return err
		}
		role := roles[1]
		writes = append(writes,
			vault.Write{Method: "POST", Path: "database/config/shop", Data: map[string]any{"plugin_name": "postgresql-database-plugin",
				"allowed_roles": []string{"*"}}},
			vault.Write{Method: "POST", Path: role.Path.String(), Data: role.Data},
			vault.Write{Method: "POST", Path: "sys/mounts/plain", Data: map[string]any{"type": "database"}},
			vault.Write{Method: "POST", Path: "plain/config/shop", Data: map[string]any{"plugin_name": "postgresql-database-plugin",
				"connection_url": fmt.Sprintf("postgresql://{{username}}:{{password}}@%s/%s?sslmode=disable", w.env.Postgres.Address(), w.database()),
				"username":       "postgres", "password": w.env.Postgres.Password(), "password_authentication": "scram-sha-256",
				"allowed_roles": []string{"default", "best"}, "max_open_connections": 16}})
		for name, revocation := range map[string][]string{"default": {}, "best": bestRevocation} {
			writes = append(writes, vault.Write{Method: "POST", Path: "plain/roles/" + name, Data: map[string]any{"db_name": "shop",
				"default_ttl": ttl, "max_ttl": ttl, "revocation_statements": revocation,
				"creation_statements": []string{`CREATE ROLE "{{name}}" WITH LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE bench_reader`}}})
		}
	}
	for _, write := range writes {
		if err := w.admin.Write(ctx, write); err != nil {
			return fmt.Errorf("writing Vault's %s: %w", write.Path, err)
		}
	}
	return nil
}

// prepareDatabase makes the group role for the logins of a Vault without Pawl. Granting rights to each login alone
// fails when several logins are made at once.
func (w *world) prepareDatabase(ctx context.Context) error {
	return w.superuser(ctx, `CREATE ROLE bench_reader; GRANT SELECT ON orders TO bench_reader;
		INSERT INTO orders (item, price) SELECT 'part ' || n, n FROM generate_series(1, 20000) n`)
}

// superuser executes statements in the database.
func (w *world) superuser(ctx context.Context, statements ...string) error {
	conn, err := pgx.Connect(ctx, w.env.Database)
	if err != nil {
		return err
	}
	defer conn.Close(ctx) //nolint:errcheck // the work is committed by then
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) database() string {
	u, err := url.Parse(w.env.Database)
	if err != nil {
		panic("bench: the DSN that dev made does not parse")
	}
	return strings.TrimPrefix(u.Path, "/")
}

// agent returns a client with its own identity and connections.
func (w *world) agent(name string) (*agent.Client, error) {
	return agent.New(agent.Config{Address: "https://" + w.broker.Agents, Source: w.env.Identities.Source(dev.Agent(name)), ServerID: dev.BrokerID})
}

// ready waits until the broker takes a step: then it is logged in to Vault.
func (w *world) ready(ctx context.Context) error {
	c, err := w.agent("first")
	if err != nil {
		return err
	}
	defer c.Close() //nolint:errcheck // it always succeeds
	d, err := c.Open(ctx, agent.Chain{Task: "first", Rights: []agent.Right{{Tool: "notes.read", Use: true}}})
	if err != nil {
		return err
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(30 * time.Second); ; {
		_, err := d.Begin(ctx, agent.Call{Tool: "notes.read"})
		if err == nil || time.Now().After(end) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// revoke revokes chains and waits until each revocation has its final closure.
func (w *world) revoke(ctx context.Context, chains []string) error {
	return each(8, len(chains), func(i int) error {
		rv, err := w.operator.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + chains[i], Reason: "bench: end of a round"})
		if err != nil {
			return err
		}
		return w.settled(ctx, rv.ID)
	})
}

func (w *world) settled(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	return w.operator.Follow(ctx, id, func(api.Revocation) error { return nil })
}
