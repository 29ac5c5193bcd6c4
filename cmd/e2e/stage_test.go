package e2e_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/attest/workload"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/broker/server"
)

// domain is the trust domain of a stage's agents, and of the example bundles.
const domain = "acme.example"

// stage is all of Pawl without its backends: a signed bundle in the real policy engine, the engine, the server with
// real SVIDs on both sides, and the SDK. One target in memory replaces Vault and every backend of the bundle.
type stage struct {
	t          *testing.T
	target     *brokertest.Target
	identities *workload.Server
	address    string       // of the agents' listener
	socket     string       // of the operators'
	canaries   atomic.Int32 // alarms about them
}

func newStage(t *testing.T, dir fs.FS) *stage {
	t.Helper()
	s := &stage{t: t, target: brokertest.NewTarget()}
	var err error
	if s.identities, err = workload.New(workload.Config{TrustDomain: domain}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.identities.Close() }) // there are no sockets to fail
	running := signed(t, dir)
	backends := map[string]broker.Backend{}
	for _, tool := range running.Current().Tools() {
		backends[tool.Backend] = s.target
	}
	b, err := engine.New(engine.Config{Ledger: brokertest.NewMemory(), Policy: running.Policy, Vault: brokertest.NewVault(s.target), Backends: backends,
		Now: time.Now, Random: rand.Reader, SweepEvery: -1, Alarm: func(op string, err error) {
			if op == "canary" {
				s.canaries.Add(1)
				return
			}
			t.Errorf("alarm: %s: %v", op, err)
		}})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	s.serve(b)
	return s
}

// signed builds, signs and verifies the bundle of an author's directory.
func signed(t *testing.T, dir fs.FS) *policy.Running {
	t.Helper()
	source, err := policy.Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	private, public, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := policy.Sign(source, private)
	if err != nil {
		t.Fatal(err)
	}
	running, err := policy.NewRunning(jws, policy.Trust{Keys: []jose.JSONWebKey{public}, Need: 1})
	if err != nil {
		t.Fatal(err)
	}
	return running
}

func (s *stage) serve(b *engine.Engine) {
	t := s.t
	a, err := attest.New(attest.Config{TrustDomains: []string{domain}, Source: s.identities.Source(s.identities.ID("/pawl"))})
	if err != nil {
		t.Fatal(err)
	}
	srv, err := server.New(server.Config{Broker: b, Identify: a.Identify, Now: time.Now,
		Operator: func(*http.Request) (broker.Operator, error) { return broker.Operator{Name: "ana"}, nil }})
	if err != nil {
		t.Fatal(err)
	}
	agents, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "pawl-e2e-") // t.TempDir is too long for the path of a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a temporary directory
	s.socket = filepath.Join(dir, "o.sock")
	operators, err := net.Listen("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	s.address = "https://" + agents.Addr().String()
	documented := document().For(t)
	s.run(attest.Server(documented(srv.Agents()), attest.Limits{}), attest.Listener(agents, a.ServerTLS(), attest.Limits{}))
	s.run(&http.Server{Handler: documented(srv.Operators()), ReadHeaderTimeout: time.Minute}, operators)
	t.Cleanup(srv.Close) // before the other clean-ups: it ends the streams
}

func (s *stage) run(h *http.Server, l net.Listener) {
	var done sync.WaitGroup
	done.Go(func() {
		if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.t.Errorf("serving: %v", err)
		}
	})
	s.t.Cleanup(func() { _ = h.Close(); done.Wait() }) // all clients are closed by then
}

func (s *stage) agent(path string) *agent.Client {
	s.t.Helper()
	c, err := agent.New(agent.Config{Address: s.address, Source: s.identities.Source(s.identities.ID(path)), ServerID: s.identities.ID("/pawl")})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() }) // it always succeeds
	return c
}

// post sends requests that the SDK would not send: with the caller's SVID and any body.
func (s *stage) post(path, to string, in, out any) error {
	s.t.Helper()
	c, err := client.New(client.Config{Address: s.address, Source: s.identities.Source(s.identities.ID(path)), ServerID: s.identities.ID("/pawl")})
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	return c.Call(s.t.Context(), http.MethodPost, to, nil, in, out)
}

// asks requests a step as the holder of a delegation, without the SDK. The SDK would refuse by itself after a
// revocation; this is the broker's own answer.
func (s *stage) asks(d *agent.Delegation, tool string, args agent.Args) error {
	s.t.Helper()
	raw, err := json.Marshal(args)
	if err != nil {
		s.t.Fatal(err)
	}
	path := strings.TrimPrefix(d.Info().Holder, "spiffe://"+domain)
	return s.post(path, "/v1/delegations/"+string(d.ID())+"/steps", api.StepRequest{Tool: tool, Args: raw}, new(api.Issued))
}

func (s *stage) operator() *operator.Client {
	s.t.Helper()
	c, err := operator.New(operator.Config{Address: "unix:" + s.socket})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	return c
}

func (s *stage) open(path string, c agent.Chain) *agent.Delegation {
	s.t.Helper()
	if c.Task == "" {
		c.Task = "a task"
	}
	d, err := s.agent(path).Open(s.t.Context(), c)
	if err != nil {
		s.t.Fatalf("Open by %s = %v", path, err)
	}
	return d
}

// share delegates rights, and the receiver joins.
func (s *stage) share(from *agent.Delegation, to string, part agent.Share) *agent.Delegation {
	s.t.Helper()
	id, err := from.Delegate(s.t.Context(), s.identities.ID(to).String(), part)
	if err != nil {
		s.t.Fatalf("Delegate to %s = %v", to, err)
	}
	d, err := s.agent(to).Join(s.t.Context(), id)
	if err != nil {
		s.t.Fatalf("Join by %s = %v", to, err)
	}
	return d
}

// holding is an open step, with a copy of its secret as a thief would make it.
type holding struct {
	step   *agent.Step
	secret []byte
}

func (s *stage) hold(d *agent.Delegation, tool string, args agent.Args) holding {
	s.t.Helper()
	step, err := d.Begin(s.t.Context(), agent.Call{Tool: tool, Args: args})
	if err != nil {
		s.t.Fatalf("Begin(%s, %v) = %v, want a secret", tool, args, err)
	}
	h := holding{step, step.Secret().JSON()}
	if !s.target.Login(h.secret) {
		s.t.Fatalf("the secret of %s does not work", tool)
	}
	return h
}

// do takes a step and closes it.
func (s *stage) do(d *agent.Delegation, tool string, args agent.Args) {
	s.t.Helper()
	if err := d.Step(s.t.Context(), agent.Call{Tool: tool, Args: args}, func(context.Context, *agent.Secret) error { return nil }); err != nil {
		s.t.Fatalf("Step(%s, %v) = %v", tool, args, err)
	}
}

// closed follows a revocation to its final closure, and fails unless that is CLOSED with the given number of dead
// grants.
func (s *stage) closed(revocation string, dead int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	var rv api.Revocation
	if err := s.operator().Follow(ctx, revocation, func(now api.Revocation) error { rv = now; return nil }); err != nil {
		s.t.Fatalf("following revocation %q: %v", revocation, err)
	}
	if rv.Closure != string(broker.ClosureClosed) || rv.Dead != dead || rv.Grants != dead {
		s.t.Errorf("revocation = %s with %d of %d dead, want CLOSED with %d", rv.Closure, rv.Dead, rv.Grants, dead)
	}
}

// refusal returns err as a problem, and fails unless it has the kind and the code.
func refusal(t *testing.T, what string, err error, kind api.Kind, code broker.Code) *agent.Error {
	t.Helper()
	var p *agent.Error
	if !errors.As(err, &p) || p.Kind != kind || p.Code != api.Code(code) {
		t.Fatalf("%s = %v, want %s with code %q", what, err, kind, code)
	}
	return p
}

// authors gives an author's directory with the files.
func authors(files map[string]string) fs.FS {
	dir := fstest.MapFS{}
	for name, text := range files {
		dir[name] = &fstest.MapFile{Data: bytes.TrimSpace([]byte(text))}
	}
	return dir
}

func rights(tools ...string) (all []agent.Right) {
	for _, tool := range tools {
		all = append(all, agent.Right{Tool: tool, Use: true, Delegate: true})
	}
	return all
}
