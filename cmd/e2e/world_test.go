package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/apitest"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

// bound limits a request in Vault, and the broker's wait for a mint. It is short, because a mint in progress when the
// broker was killed is waited for as long as both together.
const bound = 2 * time.Second

// newEnv starts everything except the broker.
func newEnv(t *testing.T, c dev.Config) *dev.Env {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c.External, c.MaxRequestDuration = true, bound
	env, err := dev.Start(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(env.Close)
	return env
}

// need skips the test where a real server is missing, or fails it where PAWL_REQUIRE demands the server.
func need(t *testing.T, postgres bool) {
	t.Helper()
	parts.NeedVault(t)
	if postgres {
		parts.NeedPostgreSQL(t)
	}
}

// world is a broker with a ledger of its own, in an environment that other tests may have used before.
type world struct {
	t      *testing.T
	env    *dev.Env
	config wire.Config
	file   string // of config
	oracle oracle
	before left // by other tests
}

func newWorld(t *testing.T, env *dev.Env, change func(*wire.Config)) *world {
	t.Helper()
	dir, err := os.MkdirTemp(os.Getenv(envKeep), "pawl-e2e-") // t.TempDir is too long for the path of a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if os.Getenv(envKeep) == "" {
			_ = os.RemoveAll(dir) // a temporary directory
		}
		_ = os.Remove(filepath.Join(dir, "ledger.db.reserve")) // 64 MB without content
	})
	w := &world{t: t, env: env, config: env.Config, file: filepath.Join(dir, "pawl.yaml"), oracle: newOracle(t, env)}
	w.config.Ledger, w.config.Listen.Socket = filepath.Join(dir, "ledger.db"), filepath.Join(dir, "admin.sock")
	w.config.Listen.Agents, w.config.Listen.Operators, w.config.Operators = freeAddress(t), "", nil
	w.config.Vault.MintTimeout, w.config.SweepEvery = bound, -1
	if change != nil {
		change(&w.config)
	}
	raw, err := yaml.Marshal(w.config)
	if err == nil {
		err = os.WriteFile(w.file, raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	w.before = w.oracle.left()
	return w
}

// envKeep names a directory that keeps ledgers and logs, and all secrets that were handed out in the file "secrets".
// .ci/run searches the ledgers and logs for these secrets.
const envKeep = "PAWL_E2E_KEEP"

// keepSecret records a secret that must not be found anywhere. Of a private key it records the lines of the key itself.
func keepSecret(secret string) error {
	dir := os.Getenv(envKeep)
	if dir == "" {
		return nil
	}
	f, err := os.OpenFile(filepath.Join(dir, "secrets"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	for line := range strings.Lines(secret) {
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "-----") {
			continue
		}
		if _, err := io.WriteString(f, line+"\n"); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return f.Close()
}

// keptLog gives a writer that keeps the log of a broker with that configuration file. Without envKeep it discards the
// log.
func keptLog(t *testing.T, config string) io.Writer {
	t.Helper()
	if os.Getenv(envKeep) == "" {
		return io.Discard
	}
	f, err := os.OpenFile(filepath.Join(filepath.Dir(config), "broker.log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // the writes have been made
	return f
}

// freeAddress gives an address that a broker can use again after it was killed.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // it has no connections
	return l.Addr().String()
}

// here starts the broker in this process. Its log is shown when the test fails.
func (w *world) here(log *slog.Logger, change func(*engine.Config)) *wire.Server {
	w.t.Helper()
	s, err := w.start(log, wire.Hooks{Engine: change})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// start is like here, for a broker that may fail to start.
func (w *world) start(log *slog.Logger, h wire.Hooks) (*wire.Server, error) {
	w.t.Helper()
	if log == nil {
		said := &logBuffer{}
		log = slog.New(slog.NewTextHandler(io.MultiWriter(said, keptLog(w.t, w.file)), nil))
		w.t.Cleanup(func() {
			if w.t.Failed() {
				w.t.Logf("the broker's log:\n%s", said)
			}
		})
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	if h.Handler == nil {
		h.Handler = document().For(w.t)
	}
	s, err := wire.StartWith(ctx, w.config, log, h)
	if err != nil {
		return nil, err
	}
	w.t.Cleanup(s.Close)
	return s, nil
}

// post sends requests that the SDK would not send, over a new connection.
func (w *world) post(ctx context.Context, name, to string, in, out any) error {
	w.t.Helper()
	c, err := client.New(client.Config{Address: "https://" + w.config.Listen.Agents, Source: w.env.Identities.Source(dev.Agent(name)), ServerID: dev.BrokerID})
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	return c.Call(ctx, http.MethodPost, to, nil, in, out)
}

// logBuffer collects a log. Safe for concurrent use.
type logBuffer struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func (w *world) agent(name string) *agent.Client {
	w.t.Helper()
	return newAgent(w.t, agent.Config{Address: "https://" + w.config.Listen.Agents, Source: w.env.Identities.Source(dev.Agent(name)), ServerID: dev.BrokerID})
}

func newAgent(t *testing.T, config agent.Config) *agent.Client {
	t.Helper()
	c, err := agent.New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // it always succeeds
	return c
}

func (w *world) operator() *operator.Client {
	w.t.Helper()
	c, err := operator.New(operator.Config{Address: "unix:" + w.config.Listen.Socket, Patience: -1})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(c.Close)
	return c
}

// document is the OpenAPI document, with which every answer of every broker is compared.
var document = sync.OnceValue(func() *apitest.Document {
	d, err := apitest.Read()
	if err != nil {
		panic(err)
	}
	return d
})

// grants reads every grant of the ledger over the operators' socket.
func (w *world) grants() []api.GrantRecord {
	w.t.Helper()
	grants, err := w.readGrants()
	if err != nil {
		w.t.Fatal(err)
	}
	return grants
}

// readGrants is grants where the broker may be killed meanwhile.
func (w *world) readGrants() (grants []api.GrantRecord, err error) {
	o := w.operator()
	chains, err := o.Chains(w.t.Context(), true)
	if err != nil {
		return nil, err
	}
	for _, c := range chains {
		v, err := o.Chain(w.t.Context(), c.Chain.ID)
		if err != nil {
			return nil, err
		}
		grants = append(grants, v.Grants...)
	}
	return grants, nil
}

// allClosed waits until every grant in the ledger is closed.
func (w *world) allClosed(d time.Duration) {
	w.t.Helper()
	var open []string
	if !within(d, func() bool {
		open = nil
		for _, g := range w.grants() {
			if g.State != string(broker.StateClosed) {
				open = append(open, g.ID+" "+g.State+" "+g.Ending)
			}
		}
		return len(open) == 0
	}) {
		w.t.Errorf("after %v these grants are not closed: %v", d, open)
	}
}

// known checks that the ledger has an open grant for every live lease and role. The grants were read before: the secrets
// of those that were closed by then must be dead.
func (w *world) known(grants []api.GrantRecord) {
	w.t.Helper()
	found := w.oracle.left().without(w.before)
	open, minting := map[string]bool{}, 0
	leases := map[string]bool{}
	for _, g := range grants {
		if g.State == string(broker.StateClosed) {
			continue
		}
		open[g.ID], leases[g.Lease] = true, true
		if g.Lease == "" && g.State == string(broker.StateHandle) {
			minting++ // its token is recorded, and the lease belongs to that token
		}
	}
	for _, role := range found.roles {
		if id := grantOf(role); !open[id] {
			w.t.Errorf("role %s is alive, but the ledger has no open grant for it", role)
		}
	}
	for _, lease := range found.leases {
		if !leases[lease] {
			minting--
		}
	}
	if minting < 0 {
		w.t.Errorf("%v are alive, but the ledger knows fewer", found.leases)
	}
}

// grantOf gives the grant of a database role: pawl-<grant>-<random>.
func grantOf(role string) string {
	id, _, _ := strings.Cut(strings.TrimPrefix(role, "pawl-"), "-")
	return id
}

// take takes a step on the table orders.
func take(ctx context.Context, d *agent.Delegation, ttl time.Duration) (*agent.Step, login, error) {
	step, err := d.Begin(ctx, agent.Call{Tool: "db.read", Args: agent.Args{"tables": []string{"orders"}}, TTL: ttl})
	if err != nil {
		return nil, login{}, err
	}
	s := step.Secret()
	if err := keepSecret(s.Field("password")); err != nil {
		return nil, login{}, err
	}
	return step, login{s.Field("username"), s.Field("password"), s.Field("host"), s.Field("port"), s.Field("database")}, nil
}

// mustRefuse checks the kind of a refusal.
func mustRefuse(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s = %v, want %v", what, err, want)
	}
}
