package wire_test

import (
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/attest/workload"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api/apitest"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/cmd/wire"
)

// site has a trust domain of its own and the configuration of a broker. Its Vault is down.
type site struct {
	t          *testing.T
	dir        string
	identities *workload.Server
	given      atomic.Value // []string, the paths of the SPIFFE IDs that the Workload API gives the broker; nil: /pawl
	behind     atomic.Int64 // nanoseconds by which the clock of identities is late
	config     wire.Config
	public     jose.JSONWebKey // verifies the broker's signatures
	private    jose.JSONWebKey // of the platform, and of the broker's signatures
}

func newSite(t *testing.T, domain string) *site {
	t.Helper()
	s := &site{t: t}
	var err error
	if s.dir, err = os.MkdirTemp("", "pawl"); err != nil { // t.TempDir is too long for a socket's path
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(s.dir) }) // a temporary directory
	s.identities, err = workload.New(workload.Config{TrustDomain: domain,
		Now: func() time.Time { return time.Now().Add(-time.Duration(s.behind.Load())) },
		Identify: func(workload.Peer) (ids []spiffeid.ID) {
			paths, _ := s.given.Load().([]string)
			if paths == nil {
				paths = []string{"/pawl"}
			}
			for _, path := range paths {
				ids = append(ids, spiffeid.RequireFromPath(s.identities.ID("/pawl").TrustDomain(), path))
			}
			return ids
		}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.identities.Close() }) // its sockets end with it
	private, public, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s.public, s.private = public, private
	authority := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.identities.Bundle().X509Authorities()[0].Raw})
	s.config = wire.Config{
		TrustDomains: []string{domain}, WorkloadAPI: "unix://" + s.path("workload.sock"),
		Listen: wire.Listen{Agents: freeAddress(t), Socket: s.path("admin.sock")}, Ledger: s.path("ledger.db"),
		Policy: wire.Policy{Bundle: s.bundle(nil),
			Keys: s.file("keys.json", jose.JSONWebKeySet{Keys: []jose.JSONWebKey{public}})},
		Vault:      wire.Vault{Address: "https://127.0.0.1:1", CA: s.file("ca.pem", authority)},
		Backends:   map[string]wire.Backend{"notes": {Plugin: "kv"}},
		SweepEvery: -1, SigningKey: s.file("signing.key", private),
	}
	return s
}

// bundle signs a bundle, writes it, and returns its path. The files replace those of the same name, or are added.
func (s *site) bundle(files map[string]string) string {
	s.t.Helper()
	dir := fstest.MapFS{
		"bundle.yaml": {Data: []byte("{name: site, version: 1}")},
		"tools.yaml": {Data: []byte("tools:\n  - {name: notes.read, backend: notes, narrowing: none, " +
			"vault: {policy: pawl-notes, path: secret/notes}}\n" +
			"  - {name: keys.root, backend: notes, narrowing: none, canary: true, vault: {policy: pawl-keys, path: secret/keys}}\n")},
		"main.cedar": {Data: []byte("@id(\"all\")\n@any(\"action tool\")\n" +
			"permit (principal in TrustDomain::\"" + s.identities.ID("/pawl").TrustDomain().Name() + "\", action, resource);\n")},
	}
	for name, text := range files {
		dir[name] = &fstest.MapFile{Data: []byte(text)}
	}
	source, err := policy.Build(dir)
	if err != nil {
		s.t.Fatal(err)
	}
	signed, err := policy.Sign(source, s.private)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.file("policy.jws", signed)
}

// freeAddress returns an address with a free port, which a broker can listen on more than once.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // it has no connection
	return l.Addr().String()
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

// file writes bytes unchanged and every other value as JSON. It returns the path.
func (s *site) file(name string, v any) string {
	s.t.Helper()
	raw, is := v.([]byte)
	if !is {
		var err error
		if raw, err = json.Marshal(v); err != nil {
			s.t.Fatal(err)
		}
	}
	if err := os.WriteFile(s.path(name), raw, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return s.path(name)
}

// identify starts the Workload API.
func (s *site) identify() {
	s.t.Helper()
	if _, err := s.identities.Listen(s.path("workload.sock")); err != nil {
		s.t.Fatal(err)
	}
}

// document is the OpenAPI document, with which the answers of every site are compared.
var document = sync.OnceValues(apitest.Read)

func (s *site) start() *wire.Server {
	s.t.Helper()
	return s.startLogging(io.Discard)
}

// startLogging is start with a log.
func (s *site) startLogging(to io.Writer) *wire.Server {
	s.t.Helper()
	d, err := document()
	if err != nil {
		s.t.Fatal(err)
	}
	w, err := wire.StartWith(s.t.Context(), s.config, slog.New(slog.NewTextHandler(to, nil)),
		wire.Hooks{Handler: d.For(s.t)})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(w.Close)
	return w
}

// open opens a chain of the agent in the engine, without the listener.
func (s *site) open(w *wire.Server, labels map[string]string) broker.Delegation {
	s.t.Helper()
	caller := broker.Caller{ID: s.identities.ID("/agent"), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	root, err := w.Broker.Open(s.t.Context(), caller, broker.OpenRequest{Task: "t", Labels: labels,
		Rights: []broker.Right{{Tool: "notes.read", Use: true}}})
	if err != nil {
		s.t.Fatal(err)
	}
	return root
}

// operator is a client of the local socket.
func (s *site) operator() *operator.Client {
	s.t.Helper()
	c, err := operator.New(operator.Config{Address: "unix:" + s.config.Listen.Socket})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	return c
}

// agent is the agent's client over the network, with a valid SVID.
func (s *site) agent() *agent.Client {
	s.t.Helper()
	c, err := agent.New(agent.Config{Address: "https://" + s.config.Listen.Agents,
		Source: s.identities.Source(s.identities.ID("/agent")), ServerID: s.identities.ID("/pawl")})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() }) // it always succeeds
	return c
}

// within waits until ok, and fails the test after d.
func within(t *testing.T, d time.Duration, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(d); !ok(); {
		select {
		case <-end:
			t.Fatalf("after %v still not: %s", d, what)
		case <-tick.C:
		}
	}
}
