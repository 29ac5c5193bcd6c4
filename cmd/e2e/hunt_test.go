package e2e_test

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	pawl "github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
	"github.com/pawlsec/pawl/plugins/vault"
)

// TestHunt looks for a false CLOSED. Each row is a way in which a target differs from what the broker sees. It takes a
// step at a real server, checks with the raw secret that the secret works, and revokes the chain. While anything works
// the closure may not be CLOSED. A row whose secret did not work before the revocation fails, since it tests nothing.
func TestHunt(t *testing.T) {
	need(t, true)
	g := newGround(t)
	todo := make(chan int, len(huntRows()))
	for _, i := range mathrand.New(mathrand.NewPCG(1, 1)).Perm(cap(todo)) { // those that wait beside those that work
		todo <- i
	}
	close(todo)
	var workers sync.WaitGroup
	for range huntAtOnce {
		workers.Go(func() {
			for i := range todo {
				row := huntRows()[i]
				t.Run(row.plugin+"/"+row.name, func(t *testing.T) {
					start, outcome := time.Now(), "failed"
					defer func() { g.add(huntResult{row, outcome, time.Since(start)}) }()
					h := &hunt{T: t, ground: g, id: fmt.Sprintf("hunt%d", i)}
					outcome = h.chase(row, row.set(h))
				})
			}
		})
	}
	workers.Wait()
	t.Logf("what the rows show:\n%s", g.table())
}

// TestHuntIsComplete counts the rows of the hunt.
func TestHuntIsComplete(t *testing.T) {
	least := map[string]int{"postgres": 16, "pki": 8, "ssh": 6, "jwt": 4, "token": 4, "kv": 2}
	have, found, names := map[string]int{}, 0, map[string]bool{}
	for _, row := range huntRows() {
		have[row.plugin]++
		if row.unnamed {
			found++
		}
		if row.why == "" || row.end == "" || names[row.plugin+row.name] {
			t.Errorf("row %s/%s lacks a reason or an end, or is there twice", row.plugin, row.name)
		}
		names[row.plugin+row.name] = true
	}
	for plugin, n := range least {
		if have[plugin] < n {
			t.Errorf("%d rows are about %s, want at least %d", have[plugin], plugin, n)
		}
	}
	if found < 3 {
		t.Errorf("%d rows are of a kind that no page named, want at least 3", found)
	}
}

func huntRows() []huntRow {
	return slices.Concat(huntPostgres, huntPooled, huntServers, huntCertificates, huntHosts, huntTokens, huntVaultTokens,
		huntStatic)
}

// huntRow is a way in which a target differs from what the broker sees.
type huntRow struct {
	plugin, name string
	why          string // the difference
	unnamed      bool   // no page of the product named it before
	// end is the closure once nothing works any more, or the closure that remains if something works without end.
	end broker.Closure
	set func(h *hunt) quarry
}

// quarry is a secret that a row took, and the ways in which it works.
type quarry struct {
	// ways report whether something works with the raw secret or with what was obtained by it. All work at first.
	ways map[string]func() bool
	// change happens between the step and the revocation. At least one way works after it. Nil: nothing happens.
	change func()
	// mend ends what the broker cannot end. Something works right before it. Nil: nothing of the kind.
	mend func()
}

// The times of a chase.
const (
	huntHold     = time.Second      // how long a closure must hold
	huntPatience = 90 * time.Second // for the row's end
)

// huntAtOnce is the number of rows at a time. Most of a row is waiting.
const huntAtOnce = 10

func (h *hunt) working(q quarry) (all []string) {
	for _, name := range slices.Sorted(maps.Keys(q.ways)) {
		if q.ways[name]() {
			all = append(all, name)
		}
	}
	return all
}

// chase revokes the chain of a quarry and watches the closure until the row's end. It returns what it saw.
func (h *hunt) chase(row huntRow, q quarry) string {
	h.Helper()
	var works []string
	if !within(5*time.Second, func() bool {
		works = h.working(q)
		return len(works) == len(q.ways) && len(works) > 0
	}) {
		h.Fatalf("before the revocation only %q of %d ways work, so the row tests nothing", works, len(q.ways))
	}
	if q.change != nil {
		q.change()
		if len(h.working(q)) == 0 {
			h.Fatal("nothing works after the change, so the row tests nothing")
		}
	}
	rv, err := h.w.operator().Revoke(h.Context(), pawl.RevokeRequest{Selector: "chain:" + h.chain, Reason: "hunt"})
	if err != nil {
		h.Fatal(err)
	}
	w := watch{hunt: h, quarry: q, id: rv.ID}
	hold := time.Now().Add(huntHold)
	within(huntHold, func() bool { w.look(); return w.closure == broker.ClosureClosed })
	w.mark()
	if q.mend != nil {
		// The broker goes on to end sessions, so that not every login gets as far as its first query.
		if !within(5*time.Second, func() bool { w.look(); return len(w.works) > 0 }) {
			h.Fatal("nothing works before the mend, so the row tests nothing")
		}
		q.mend()
	}
	ended := within(huntPatience, func() bool {
		w.look()
		return w.closure == row.end && time.Now().After(hold) && (row.end != broker.ClosureClosed || len(w.works) == 0)
	})
	if !ended {
		h.Fatalf("after %v the closure is %s, and %q work; want %s; evidence %s", huntPatience, w.closure, w.works, row.end,
			h.evidence())
	}
	within(huntHold, func() bool { w.look(); return false }) // nothing comes back
	w.mark()
	return strings.Join(w.seen, ", ")
}

// watch samples the closure of a revocation, with the oracle before and after.
type watch struct {
	*hunt
	quarry
	id      string
	closure broker.Closure
	works   []string // after the closure was read
	seen    []string // what was seen, once for each state
}

func (w *watch) look() {
	w.Helper()
	before := w.working(w.quarry)
	rv, err := w.w.operator().Revocation(w.Context(), w.id)
	if err != nil {
		w.Fatal(err)
	}
	w.closure, w.works = broker.Closure(rv.Closure), w.working(w.quarry)
	if w.closure == broker.ClosureClosed && len(w.works) > 0 {
		w.Fatalf("FALSE CLOSED: %q worked before the closure was read, and %q after; evidence %s", before, w.works, w.evidence())
	}
}

// mark records the present state for the table.
func (w *watch) mark() {
	state := string(w.closure) + " and nothing works"
	if len(w.works) > 0 {
		state = string(w.closure) + " while " + strings.Join(w.works, " and ") + " work"
	}
	if !slices.Contains(w.seen, state) {
		w.seen = append(w.seen, state)
	}
}

// evidence returns the last evidence of each grant.
func (h *hunt) evidence() (all []string) {
	for _, g := range h.w.grants() {
		if n := len(g.Evidence); n > 0 {
			all = append(all, fmt.Sprintf("%s %q", g.Evidence[n-1].Outcome, g.Evidence[n-1].Answer))
		}
	}
	return all
}

// ground is what the rows share.
type ground struct {
	env   *dev.Env
	root  *api.Client // of Vault
	setup sync.Mutex  // one setup of a database at a time: they alter the same roles
	// The servers start when a row wants them.
	primary, second, standby func() (*parts.PostgresServer, error)

	mu      sync.Mutex // guards results
	results []huntResult
}

type huntResult struct {
	row     huntRow
	outcome string
	took    time.Duration
}

func newGround(t *testing.T) *ground {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	env, err := dev.Start(ctx, dev.Config{External: true, NoPostgres: true, ForgetfulVault: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(env.Close)
	root, err := env.Vault.Client()
	if err != nil {
		t.Fatal(err)
	}
	g := &ground{env: env, root: root}
	shared := func(start func(context.Context) (*parts.PostgresServer, error)) func() (*parts.PostgresServer, error) {
		return sync.OnceValues(func() (*parts.PostgresServer, error) {
			server, err := start(t.Context())
			if err == nil {
				t.Cleanup(func() { _ = server.Close() }) // the rows have ended
			}
			return server, err
		})
	}
	server := func(settings map[string]string) func(context.Context) (*parts.PostgresServer, error) {
		return func(ctx context.Context) (*parts.PostgresServer, error) {
			return parts.PostgreSQL(ctx, parts.PostgresConfig{NoSync: true, MaxConnections: 200, Settings: settings})
		}
	}
	g.primary = shared(server(map[string]string{"max_prepared_transactions": "20", "max_wal_senders": "20", "wal_keep_size": "1GB"}))
	g.second = shared(server(nil))
	g.standby = shared(func(ctx context.Context) (*parts.PostgresServer, error) {
		primary, err := g.primary()
		if err != nil {
			return nil, err
		}
		return primary.Standby(ctx)
	})
	return g
}

// started returns a shared server.
func (h *hunt) started(start func() (*parts.PostgresServer, error)) *parts.PostgresServer {
	h.Helper()
	server, err := start()
	h.must(err)
	return server
}

func (h *hunt) db() *parts.PostgresServer    { h.Helper(); return h.started(h.primary) }
func (h *hunt) db2() *parts.PostgresServer   { h.Helper(); return h.started(h.second) }
func (h *hunt) reads() *parts.PostgresServer { h.Helper(); return h.started(h.standby) } // a standby of db

func (g *ground) add(r huntResult) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.results = append(g.results, r)
}

// table lists the results by plugin.
func (g *ground) table() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	slices.SortStableFunc(g.results, func(a, b huntResult) int { return cmp.Compare(a.row.plugin, b.row.plugin) })
	var text strings.Builder
	out := tabwriter.NewWriter(&text, 0, 1, 2, ' ', 0)
	for _, r := range g.results {
		mark := ""
		if r.row.unnamed {
			mark = "*"
		}
		fmt.Fprintf(out, "%s\t%s%s\t%.1fs\t%s\n", r.row.plugin, r.row.name, mark, r.took.Seconds(), r.outcome)
	}
	fmt.Fprintf(out, "%d rows; * named by no page before\t\t\t\n", len(g.results))
	_ = out.Flush() // to memory
	return text.String()
}

// hunt is one row at work. Its id names its mounts, roles and files.
type hunt struct {
	*testing.T
	*ground
	id    string
	w     *world // the last that was started
	stop  func() // ends the broker of w
	chain string // of the last step
}

// write writes to Vault as root.
func (h *hunt) write(path string, data map[string]any) *api.Secret {
	h.Helper()
	s, err := h.root.Logical().WriteWithContext(h.Context(), path, data)
	if err != nil {
		h.Fatalf("writing %s: %v", path, err)
	}
	return s
}

const huntPolicy = `@id("hunt") @any("tool")
permit (principal in AgentGroup::"spiffe://pawl.dev/agent",
  action in [Action::"open", Action::"delegate", Action::"use"], resource);`

// broker starts a broker with the tools and backends. Its rights in Vault are its own, by a role in its name. A second
// call with no tools starts another process on the same ledger, with other backends.
func (h *hunt) broker(tools string, backends map[string]wire.Backend) {
	h.Helper()
	if h.w != nil {
		h.stop()
		h.w.config.Backends = backends
		h.stop = h.w.here(nil, nil).Close
		return
	}
	dir := h.TempDir()
	files := h.signedFiles(dir, authors(map[string]string{"bundle.yaml": "name: " + h.id + "\nversion: 1", "dev.cedar": huntPolicy,
		"tools.yaml": "tools:\n" + strings.ReplaceAll(tools, "ID", h.id)}))
	running, err := wire.LoadPolicy(files)
	if err != nil {
		h.Fatal(err)
	}
	declared := running.Current().Tools()
	writes, err := wire.Writes(declared, backends)
	if err != nil {
		h.Fatal(err)
	}
	for _, w := range writes {
		h.write(w.Path, w.Data)
	}
	reads, err := wire.Reads(declared, backends)
	if err != nil {
		h.Fatal(err)
	}
	h.vaultRole(wire.Access(declared, backends), reads)
	h.w = newWorld(h.T, h.env, func(c *wire.Config) {
		c.Policy, c.Backends, c.Vault.Role, c.Vault.MintTimeout = files, backends, h.id, 10*time.Second
	})
	h.stop = h.w.here(nil, nil).Close
}

// signedFiles signs a bundle and writes it into a directory, with its key.
func (h *hunt) signedFiles(dir string, author fs.FS) wire.Policy {
	h.Helper()
	files := wire.Policy{Bundle: filepath.Join(dir, "policy.jws"), Keys: filepath.Join(dir, "policy-keys.json")}
	source, err := policy.Build(author)
	if err != nil {
		h.Fatal(err)
	}
	private, public, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		h.Fatal(err)
	}
	jws, err := policy.Sign(source, private)
	if err != nil {
		h.Fatal(err)
	}
	keys, err := json.Marshal(map[string]any{"keys": []any{public}})
	if err = errors.Join(err, os.WriteFile(files.Bundle, jws, 0o600), os.WriteFile(files.Keys, keys, 0o600)); err != nil {
		h.Fatal(err)
	}
	return files
}

// vaultRole makes the role by which the broker of this row logs in to Vault.
func (h *hunt) vaultRole(access []vault.Access, reads []vault.ReadAccess) {
	h.Helper()
	previous, err := h.root.Logical().ReadWithContext(h.Context(), "auth/cert/certs/pawl-broker")
	if err != nil || previous == nil {
		h.Fatalf("reading the role of the environment: %v", err)
	}
	trust, _ := previous.Data["certificate"].(string)
	plan, err := vault.SetupConfig{BrokerID: dev.BrokerID, TrustPEM: trust, Tools: access, Reads: reads, Role: h.id}.Plan()
	if err != nil {
		h.Fatal(err)
	}
	for _, w := range plan {
		if !w.Exists { // the auth method is there
			h.write(w.Path, w.Data)
		}
	}
}

// take takes a step in a chain of its own, and returns the members of its secret.
func (h *hunt) take(args agent.Args, ttl time.Duration) map[string]string {
	h.Helper()
	d, err := h.w.agent("hunter").Open(h.Context(), agent.Chain{Task: "hunt", Rights: rights("hunt")})
	if err != nil {
		h.Fatal(err)
	}
	step, err := d.Begin(h.Context(), agent.Call{Tool: "hunt", Args: args, TTL: ttl})
	if err != nil {
		h.Fatalf("Begin(%v) = %v", args, err)
	}
	h.chain = string(d.Info().Chain)
	var raw map[string]any
	if err := json.Unmarshal(step.Secret().JSON(), &raw); err != nil {
		h.Fatal("the secret is not JSON")
	}
	members := map[string]string{}
	for name, value := range raw {
		switch value := value.(type) {
		case string, float64: // a port is a number
			members[name] = fmt.Sprint(value)
		}
	}
	for _, name := range []string{"password", "token", "wrapping_token", "private_key"} {
		if members[name] != "" && keepSecret(members[name]) != nil {
			h.Fatal("keeping a secret")
		}
	}
	return members
}

// until waits until ok.
func (h *hunt) until(what string, ok func() bool) {
	h.Helper()
	if !within(30*time.Second, ok) {
		h.Fatalf("%s did not come true", what)
	}
}
