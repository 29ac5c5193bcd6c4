package server_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/broker/server"
)

// world is the real engine in memory behind real HTTP.
type world struct {
	target            *brokertest.Target
	agents, operators *httptest.Server
}

// withLog is an engine with its ledger's log.
type withLog struct {
	*engine.Engine
	ledger *brokertest.Memory
}

func (e withLog) Entries(ctx context.Context, after broker.Revision, limit int) ([]broker.Entry, error) {
	return e.ledger.Entries(ctx, after, limit)
}

func newWorld(t *testing.T) world {
	t.Helper()
	w := world{target: brokertest.NewTarget()}
	policy := brokertest.AllowAll("db", "mail")
	ledger := brokertest.NewMemory()
	b, err := engine.New(engine.Config{
		Ledger: ledger, Policy: func() broker.Policy { return policy }, Vault: brokertest.NewVault(w.target),
		Backends: map[string]broker.Backend{policy.Tools["db"].Backend: w.target}, Now: time.Now, Random: rand.Reader,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	who := func(r *http.Request) string { return r.Header.Get("Test-Identity") }
	s, err := server.New(server.Config{
		Broker: withLog{b, ledger}, Now: time.Now,
		Identify: func(r *http.Request) (broker.Caller, error) {
			id, err := spiffeid.FromString(who(r))
			return broker.Caller{ID: id, Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}, err
		},
		Operator: func(r *http.Request) (broker.Operator, error) { return broker.Operator{Name: who(r)}, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	w.agents, w.operators = serve(t, documented(t, s.Agents())), serve(t, documented(t, s.Operators()))
	t.Cleanup(s.Close) // before the listeners close, which wait for streams
	return w
}

func serve(t *testing.T, h http.Handler) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// as sends every request with an identity.
type as struct {
	identity string
	http.RoundTripper
}

func (a as) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Test-Identity", a.identity)
	return a.RoundTripper.RoundTrip(r)
}

func (w world) agent(t *testing.T, name string) *agent.Client {
	t.Helper()
	c, err := agent.New(agent.Config{Address: w.agents.URL, HTTPClient: &http.Client{Transport: as{"spiffe://example.org/" + name, w.agents.Client().Transport}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // it always succeeds
	return c
}

func (w world) operator(t *testing.T, name string) *operator.Client {
	t.Helper()
	c, err := operator.New(operator.Config{Address: w.operators.URL, HTTP: &http.Client{Transport: as{name, w.operators.Client().Transport}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func await(t *testing.T, done <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatalf("waited 10 s for %s", what)
	}
}

// TestEndToEnd runs the main flow: root -> sub, a step each, and a revocation that reaches both.
func TestEndToEnd(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	root, err := w.agent(t, "root").Open(ctx, agent.Chain{Task: "report", Depth: 1, Rights: []agent.Right{
		{Tool: "db", Use: true, Delegate: true, Args: map[string]agent.Constraint{"table": agent.OneOf("orders", "items")}}}})
	if err != nil {
		t.Fatal(err)
	}
	less := []agent.Right{{Tool: "db", Use: true, Args: map[string]agent.Constraint{"table": agent.OneOf("items")}}}
	id, err := root.Delegate(ctx, "spiffe://example.org/sub", agent.Share{Rights: less})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.agent(t, "thief").Join(ctx, id); !errors.Is(err, agent.ErrNotFound) {
		t.Errorf("Join by another = %v, want not found", err)
	}
	sub, err := w.agent(t, "sub").Join(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	var problem *agent.Error
	if _, err := sub.Begin(ctx, agent.Call{Tool: "db", Args: agent.Args{"table": "orders"}}); !errors.Is(err, agent.ErrDenied) || !errors.As(err, &problem) ||
		problem.Code != "argument_outside" || !slices.Equal(problem.Missing, []string{"argument:table"}) {
		t.Errorf("a step outside the delegation = %v, want argument_outside with the missing argument", err)
	}
	items := agent.Call{Tool: "db", Args: agent.Args{"table": "items"}}
	var secret []byte
	if err := sub.Step(ctx, items, func(_ context.Context, s *agent.Secret) error {
		if secret = s.JSON(); !w.target.Login(secret) {
			t.Error("the secret does not work during the step")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if w.target.Login(secret) {
		t.Error("the secret works after the step was closed")
	}
	one, err := root.Begin(ctx, agent.Call{Tool: "db", Args: agent.Args{"table": "orders"}})
	if err != nil {
		t.Fatal(err)
	}
	keyed := agent.Call{Tool: "db", Args: items.Args, IdempotencyKey: "k"}
	two, err := sub.Begin(ctx, keyed)
	if err != nil {
		t.Fatal(err)
	}
	digest := fmt.Sprintf("%x", sha256.Sum256([]byte(`{"table":"items"}`)))
	if g := two.Grant(); g.ArgsDigest != digest {
		t.Errorf("grant = %+v, want the arguments' digest %s", g, digest)
	}
	var again *agent.Repeated
	if _, err := sub.Begin(ctx, keyed); !errors.As(err, &again) || again.Grant.ID != two.Grant().ID {
		t.Errorf("the same key again = %v, want the same grant and no secret", err)
	}
	secrets := [][]byte{one.Secret().JSON(), two.Secret().JSON()}

	rv := w.revokeChain(t, string(root.Info().Chain))
	for _, s := range []*agent.Step{one, two} {
		await(t, s.Context().Done(), "a step's context to end")
		if cause := context.Cause(s.Context()); !errors.Is(cause, agent.ErrRevoked) {
			t.Errorf("the step ended because of %v, want revoked", cause)
		}
	}
	for _, d := range []*agent.Delegation{root, sub} {
		if _, err := d.Begin(ctx, items); !errors.Is(err, agent.ErrRevoked) {
			t.Errorf("a step after the revocation = %v, want revoked", err)
		}
	}
	if _, err := w.agent(t, "root").Join(ctx, root.ID()); !errors.Is(err, agent.ErrRevoked) {
		t.Errorf("Join of a revoked delegation = %v, want revoked", err)
	}
	if rv.Closure != "CLOSED" || rv.Dead != 2 || rv.Grants != 2 {
		t.Errorf("revocation = %+v, want CLOSED with 2 dead", rv)
	}
	for _, s := range secrets {
		if w.target.Login(s) {
			t.Error("a secret works after the revocation was closed")
		}
	}
	if err := one.Close(ctx); err != nil {
		t.Errorf("closing a revoked step = %v, want nil", err)
	}
}

// revokeChain acts as an operator: list the chains, plan, revoke by the plan, follow to the end.
func (w world) revokeChain(t *testing.T, chain string) (last api.Revocation) {
	t.Helper()
	ctx, op := t.Context(), w.operator(t, "ann")
	if list, err := op.Chains(ctx, false); err != nil || len(list) != 1 || list[0].Live != 2 || list[0].Delegations != 2 {
		t.Errorf("Chains = %+v, %v, want one with 2 live steps under 2 delegations", list, err)
	}
	plan, err := op.Plan(ctx, "chain:"+chain)
	if err != nil || plan.Grants != 2 {
		t.Fatalf("Plan = %+v, %v, want 2 grants", plan, err)
	}
	rv, err := op.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + chain, Reason: "test", Plan: plan.Plan})
	if err != nil {
		t.Fatal(err)
	}
	if err := op.Follow(ctx, rv.ID, func(now api.Revocation) error { last = now; return nil }); err != nil {
		t.Fatal(err)
	}
	view, err := op.Chain(ctx, chain)
	if err != nil || len(view.Delegations) != 2 || len(view.Grants) != 3 || view.Delegations[0].Fence == nil {
		t.Errorf("Chain = %+v, %v, want 2 delegations under a fence and 3 grants", view, err)
	}
	if page, err := op.ChainAudit(ctx, chain, 0, 1); err != nil || len(page.Entries) != 1 || page.Entries[0].Op != "open" || page.Next == 0 {
		t.Errorf("ChainAudit = %+v, %v, want the opening", page, err)
	}
	if page, err := op.Audit(ctx, 0, 1000); err != nil || len(page.Entries) < 10 {
		t.Errorf("Audit has %d entries, %v", len(page.Entries), err)
	}
	return last
}

// TestFreeze checks that a freeze stops new steps and nothing else, and that two people must lift it.
func TestFreeze(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	d, err := w.agent(t, "root").Open(ctx, agent.Chain{Task: "t", Rights: []agent.Right{{Tool: "db", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	ann, bob := w.operator(t, "ann"), w.operator(t, "bob")
	rv, err := ann.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + string(d.Info().Chain), Reason: "test", Freeze: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := ann.Follow(ctx, rv.ID, func(api.Revocation) error { return nil }); err != nil {
		t.Errorf("following a freeze = %v, want nil at once", err)
	}
	var problem *agent.Error
	if _, err := d.Begin(ctx, agent.Call{Tool: "db"}); !errors.As(err, &problem) || problem.Code != "frozen" || !problem.Retryable {
		t.Errorf("a step under a freeze = %v, want frozen, retryable", err)
	}
	if d.Context().Err() != nil {
		t.Error("a freeze ended the delegation's context")
	}
	if _, err := ann.Unfreeze(ctx, rv.ID); !errors.As(err, &problem) || problem.Code != "second_person_needed" {
		t.Errorf("the first Unfreeze = %v, want second_person_needed", err)
	}
	if _, err := ann.Unfreeze(ctx, rv.ID); !errors.As(err, &problem) || problem.Code != "second_person_needed" {
		t.Errorf("Unfreeze by the same person again = %v, want second_person_needed", err)
	}
	if lifted, err := bob.Unfreeze(ctx, rv.ID); err != nil || !lifted.Lifted {
		t.Errorf("the second person's Unfreeze = %+v, %v, want it lifted", lifted, err)
	}
	if err := d.Step(ctx, agent.Call{Tool: "db"}, func(context.Context, *agent.Secret) error { return nil }); err != nil {
		t.Errorf("a step after the freeze = %v, want nil", err)
	}
	if list, err := ann.Revocations(ctx); err != nil || len(list) != 1 || list[0].Unfreezer != "ann" {
		t.Errorf("Revocations = %+v, %v, want the freeze", list, err)
	}
}
