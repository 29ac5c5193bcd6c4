package engine_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/store/bolt"
)

// oldWorld is a broker on a ledger file, with a Vault and targets in memory. Make it inside a synctest bubble.
type oldWorld struct {
	whole
	t      *testing.T
	path   string
	ledger *bolt.Ledger
	vault  *brokertest.Vault
	target *brokertest.Target
	signer *signer
	policy *oldPolicy
	now    func() time.Time
}

// oldWorldConfig is the configuration of an oldWorld.
type oldWorldConfig struct {
	path     string                                             // of the ledger; its file is made when there is none
	start    time.Time                                          // by the broker's clock
	zone     func() *time.Location                              // of the broker's clock; nil: UTC
	vault    func(*oldWorld, signingVault) broker.Vault         // wraps the Vault
	survived bool                                               // Vault has made tokens for an earlier process
	backend  func(name string, b severingProver) broker.Backend // wraps each backend; nil: no wrapping
}

const (
	oldMintTimeout = 2 * time.Second
	oldMintBound   = 5 * time.Second
)

// newOldWorld opens the ledger and makes a broker on it, without Resume. The test's end stops both.
func newOldWorld(t *testing.T, c oldWorldConfig) *oldWorld {
	t.Helper()
	ledger, err := bolt.Open(bolt.Config{Path: c.path, Reserve: -1})
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	w := &oldWorld{t: t, path: c.path, ledger: ledger, target: brokertest.NewTarget(), policy: newOldPolicy(),
		now: func() time.Time {
			zone := time.UTC
			if c.zone != nil {
				zone = c.zone()
			}
			return c.start.Add(time.Since(begun)).In(zone)
		}}
	w.signer = &signer{now: w.now, accepts: map[broker.GrantID]bool{}}
	w.vault = brokertest.NewVault(w.target)
	if c.survived {
		w.vault = w.vault.Restarted() // none of its accessors are in the ledger
	}
	if w.Engine, err = engine.New(engine.Config{Ledger: ledger, Policy: func() broker.Policy { return w.policy },
		Vault:    c.vault(w, signingVault{w.vault, w.signer}),
		Backends: w.backends(c.backend), Now: w.now,
		Random:      &fixedRandom{source: rand.NewChaCha8(sha256.Sum256([]byte(c.start.String())))},
		MintTimeout: oldMintTimeout, MintBound: oldMintBound, SweepEvery: -1, Workers: 1}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.Stop()
		w.must(ledger.Close())
	})
	return w
}

// severingProver is the interface of every backend of an oldWorld.
type severingProver interface {
	broker.Backend
	broker.Severer
	broker.Prover
}

// backends returns four backends, so that four per-backend workers run. The secrets of "target" and "legacy" have
// leases, those of "keeper" are static, and those of "signer" are tokens without a lease.
func (w *oldWorld) backends(wrap func(string, severingProver) broker.Backend) map[string]broker.Backend {
	made := map[string]broker.Backend{"target": w.target}
	for name, b := range map[string]severingProver{"target": w.target, "legacy": hidden{w.target},
		"keeper": rotated{hidden{w.target}, w.now}, "signer": w.signer} {
		if made[name] = b; wrap != nil {
			made[name] = wrap(name, b)
		}
	}
	return made
}

func (w *oldWorld) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// entries returns the audit log after a revision.
func (w *oldWorld) entries(after uint64) []broker.Entry {
	w.t.Helper()
	list, err := w.ledger.Entries(ctx, broker.Revision(after), 100000)
	w.must(err)
	return list
}

// hidden is a backend without the optional interfaces that another backend of the same target has.
type hidden struct{ severingProver }

// rotated hands out static secrets.
type rotated struct {
	severingProver
	now func() time.Time
}

func (r rotated) Prove(_ context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	found := make([]broker.Evidence, len(grants))
	for i := range found {
		found[i] = broker.Evidence{At: r.now(), Check: "keeper: read the version", Outcome: broker.OutcomeStatic,
			Answer: "it can only be rotated"}
	}
	return found, nil
}

// signer gives tokens that a status list ends. A verifier that does not read the list accepts them until they expire.
type signer struct {
	now func() time.Time

	mu      sync.Mutex // guards accepts
	accepts map[broker.GrantID]bool
}

func (s *signer) Load(broker.Tool) error { return nil }

func (s *signer) Prepare(_ context.Context, _ broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	return broker.Mint{Path: brokertest.Path("signer/" + string(g.ID)), TTL: 5 * time.Minute,
		Finish: func(map[string]any, time.Time) (broker.Finished, error) {
			return broker.Finished{Secret: broker.NewSecret([]byte(`{"token":"signed"}`)), Ref: "jti-" + string(g.ID),
				Expires: g.Expires, Outlives: g.Expires.Add(30 * time.Second)}, nil
		}}, string(g.ID), nil
}

func (s *signer) sign(id broker.GrantID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accepts[id] = true
}

// Sever implements [broker.Severer].
func (s *signer) Sever(_ context.Context, grants []broker.Grant) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range grants {
		delete(s.accepts, g.ID)
	}
	return nil
}

// Prove implements [broker.Prover].
func (s *signer) Prove(_ context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found := make([]broker.Evidence, len(grants))
	for i, g := range grants {
		found[i] = broker.Evidence{At: s.now(), Check: "signer: read the status list", Outcome: broker.OutcomeDead,
			Answer: "listed as revoked", Listed: true}
		if s.accepts[g.ID] {
			found[i].Outcome, found[i].Answer, found[i].Listed = broker.OutcomeAlive, "not listed", false
		}
	}
	return found, nil
}

// signingVault mints the signer's tokens, which have no lease, and leaves the rest to the Vault in memory.
type signingVault struct {
	*brokertest.Vault
	signer *signer
}

func (v signingVault) Mint(ctx context.Context, h broker.Handle, m broker.Mint) (broker.Lease, broker.Secret, error) {
	if m.Path.Segments()[0] != "signer" {
		return v.Vault.Mint(ctx, h, m)
	}
	v.signer.sign(broker.GrantID(m.Path.Segments()[1]))
	done, err := m.Finish(nil, time.Time{})
	return broker.Lease{Ref: done.Ref, Expires: done.Expires, Outlives: done.Outlives}, done.Secret, err
}

// oldPolicy allows every request, except where a chain's labels forbid it.
type oldPolicy struct {
	*brokertest.Policy

	mu   sync.Mutex // guards last
	last broker.Question
}

func newOldPolicy() *oldPolicy {
	p := &oldPolicy{Policy: &brokertest.Policy{Tools: map[broker.ToolName]broker.Tool{}}}
	table := map[string]broker.Parameter{"table": {Kind: "string"}}
	for _, t := range []broker.Tool{
		{Name: "db.read", Backend: "target", Narrowing: broker.NarrowNative, Path: brokertest.Path("database/creds/reader"), Arguments: table},
		{Name: "db.write", Backend: "target", Narrowing: broker.NarrowNative, Path: brokertest.Path("database/creds/writer"), Arguments: table},
		{Name: "deploy", Backend: "target", Narrowing: broker.NarrowProxy, Path: brokertest.Path("target/creds")},
		{Name: "mainframe", Backend: "legacy", Narrowing: broker.NarrowProxy, Path: brokertest.Path("mainframe/creds/batch")},
		{Name: "note", Backend: "keeper", Narrowing: broker.NarrowNone, Path: brokertest.Path("kv/notes")},
		{Name: "token", Backend: "signer", Narrowing: broker.NarrowNative, Path: brokertest.Path("identity/oidc")},
		{Name: "every", Backend: "target", Narrowing: broker.NarrowNative, Path: brokertest.Path("target/creds"),
			Arguments: everyParameter()},
		{Name: "trap", Backend: "target", Canary: true},
	} {
		t.TTL, t.Policy = broker.MaxTTL, "pawl-tool-"+string(t.Name)
		p.Tools[t.Name] = t
	}
	p.Answer = p.decide
	return p
}

// Digest implements [broker.Policy].
func (p *oldPolicy) Digest() string {
	return "sha256:6f1ed002ab5595859014ebf0951522d9c7e4b2f4ac0c2f2b4e7f0d4e9a3c8b71"
}

func (p *oldPolicy) decide(q broker.Question) broker.Decision {
	p.mu.Lock()
	p.last = q
	p.mu.Unlock()
	if q.Action == broker.ActionReport {
		consequence, _ := broker.ParseConsequence(q.Chain.Labels["on_breach"])
		return broker.Decision{Policies: []string{"on-breach"}, Consequence: consequence}
	}
	if q.Chain.Labels["mode"] == "read" && q.Tool.Name == "db.write" && q.Action == broker.ActionUse {
		return broker.Decision{Policies: []string{"read-only"}, Remedy: "ask data-platform@example.org"}
	}
	return broker.Decision{Allow: true, Policies: []string{"agents-of-the-shop", "by-day"},
		Domains: []string{"example.org", "partner.example"}}
}

// asked returns the question that policy answered last.
func (p *oldPolicy) asked() broker.Question {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last
}

// fixedRandom gives the same bytes in every run. It is safe for concurrent use.
type fixedRandom struct {
	mu     sync.Mutex // guards source
	source *rand.ChaCha8
}

func (r *fixedRandom) Read(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.source.Read(b)
}

// named returns a caller. Its identity expires after every chain of the ledger.
func named(id spiffeid.ID) broker.Caller {
	return broker.Caller{ID: id, Proof: broker.ProofX509, NotAfter: brokertest.Epoch.Add(100 * 24 * time.Hour)}
}

func agent(name string) spiffeid.ID {
	return spiffeid.RequireFromString("spiffe://example.org/" + name)
}

// holderOf returns the delegation's holder as a caller.
func holderOf(d broker.Delegation) broker.Caller { return named(d.Holder) }

// everyConstraint has each kind of constraint, as JSON, and a value that it allows.
var everyConstraint = map[string]struct {
	wire  string
	value args.Value
}{
	"exact_text":   {`{"exact":"naïve \"quoted\" <tag>"}`, args.String(`naïve "quoted" <tag>`)},
	"exact_number": {`{"exact":-9007199254740993}`, args.Int(-9007199254740993)},
	"exact_truth":  {`{"exact":true}`, args.Bool(true)},
	"exact_list":   {`{"exact":["b","a"]}`, args.List("b", "a")},
	"one_of":       {`{"one_of":["orders","users"]}`, args.String("users")},
	"one_number":   {`{"one_of":[1,2,3]}`, args.Int(2)},
	"not_one_of":   {`{"not_one_of":["root"]}`, args.String("deploy")},
	"span":         {`{"range":{"max":9223372036854775807,"min":1}}`, args.Int(9223372036854775807)},
	"at_most":      {`{"range":{"max":-1}}`, args.Int(-2)},
	"prefix":       {`{"prefix":"feature/"}`, args.String("feature/x")},
	"glob":         {`{"glob":"web-*"}`, args.String("web-17")},
	"cidr":         {`{"cidr":"10.0.0.0/8"}`, args.String("10.1.0.0/16")},
	"cidr6":        {`{"cidr":"2001:db8::/32"}`, args.String("2001:db8::1")},
	"subset":       {`{"subset":["id","name","mail"]}`, args.List("name", "id")},
	"subpath":      {`{"subpath":"/srv/data"}`, args.String("/srv/data/2026")},
	"url": {`{"url":{"scheme":"https","host":"*.example.org","port":8443,"path":"/v1"}}`,
		args.String("https://api.example.org:8443/v1/users?limit=3")},
	"shell": {`{"shell":{"command":["systemctl",["restart","status"]],"words":["web-*"]}}`,
		args.String("systemctl status web-1 web-2")},
	"all": {`{"all":[{"prefix":"web-"},{"not_one_of":["web-0"]}]}`, args.String("web-9")},
}

// argsOf makes a step's arguments.
func argsOf(values map[string]args.Value) args.Args {
	a, err := args.New(values)
	if err != nil {
		panic("the test's own arguments: " + err.Error())
	}
	return a
}

// table makes the argument of the database tools.
func table(name string) args.Args {
	return argsOf(map[string]args.Value{"table": args.String(name)})
}

func everyParameter() map[string]broker.Parameter {
	all := map[string]broker.Parameter{"free": {Kind: "boolean"}}
	for name, c := range everyConstraint {
		all[name] = broker.Parameter{Kind: c.value.Kind(), Required: true}
	}
	return all
}

// copyFile copies a file and returns its content.
func copyFile(t *testing.T, from, to string) []byte {
	t.Helper()
	b, err := os.ReadFile(from)
	if err := errors.Join(err, os.WriteFile(to, b, 0o600)); err != nil {
		t.Fatal(err)
	}
	return b
}
