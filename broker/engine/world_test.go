package engine_test

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
)

// world is a broker with a ledger, a Vault and a target in memory. Make it inside a synctest bubble: the bubble's clock
// stands still until every goroutine waits.
type world struct {
	whole
	t      *testing.T
	ledger *brokertest.Memory
	vault  *brokertest.Vault
	target *brokertest.Target
	policy *brokertest.Policy

	mostChains   int                                    // zero: as many as a test opens
	mostRefusals int                                    // recorded one by one a minute; zero: the default
	sweepEvery   time.Duration                          // zero: never
	noTokenAhead bool                                   // as in the configuration
	wrap         func(*brokertest.Policy) broker.Policy // the policy that the broker sees; nil: policy itself
	brokerVault  broker.Vault                           // wraps vault for the broker; nil: the broker uses vault itself
	backend      broker.Backend                         // wraps target for the broker; nil: the broker uses target itself

	mu     sync.Mutex // guards alarms
	alarms []string
	skew   atomic.Int64 // nanoseconds by which the broker's clock is ahead
}

// countAlarms counts the alarms that contain a text.
func (w *world) countAlarms(text string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range w.alarms {
		if strings.Contains(a, text) {
			n++
		}
	}
	return n
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, ledger: brokertest.NewMemory(), target: brokertest.NewTarget(),
		policy: brokertest.AllowAll("db.read", "db.write", "deploy")}
	w.policy.Tools["note"] = broker.Tool{Name: "note", Backend: "keeper", Narrowing: broker.NarrowNone,
		Path: brokertest.Path("kv/notes")}
	w.vault = brokertest.NewVault(w.target)
	w.start(w.ledger)
	return w
}

// staticBackend hands out static secrets, which nothing ends.
type staticBackend struct{ *brokertest.Target }

func (staticBackend) Prove(_ context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	found := make([]broker.Evidence, len(grants))
	for i := range found {
		found[i] = broker.Evidence{At: time.Now(), Check: "keeper", Outcome: broker.OutcomeStatic,
			Answer: "it can only be rotated"}
	}
	return found, nil
}

func (w *world) clock() time.Time { return time.Now().Add(time.Duration(w.skew.Load())) }

// start makes and resumes a broker over the world's parts, as a new process does.
func (w *world) start(ledger broker.Ledger) {
	w.t.Helper()
	vault := w.brokerVault
	if vault == nil {
		vault = w.vault
	}
	var backend broker.Backend = w.target
	if w.backend != nil {
		backend = w.backend
	}
	b, err := engine.New(engine.Config{Ledger: urgency{ledger, w.t}, Policy: w.snapshot, Vault: vault,
		Alarm: func(op string, err error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.alarms = append(w.alarms, op+": "+err.Error())
		},
		Backends: map[string]broker.Backend{"target": backend, "keeper": staticBackend{w.target}},
		Now:      w.clock, Random: rand.Reader,
		MintTimeout: 2 * time.Second, MintBound: 5 * time.Second, SweepEvery: cmp.Or(w.sweepEvery, -1),
		OpenChains: cmp.Or(w.mostChains, 1<<20),
		Refusals:   w.mostRefusals, NoTokenAhead: w.noTokenAhead})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := b.Resume(ctx); err != nil {
		w.t.Fatal(err)
	}
	w.Engine = b
	w.t.Cleanup(b.Stop)
}

// snapshot returns the policy that the broker sees.
func (w *world) snapshot() broker.Policy {
	if w.wrap != nil {
		return w.wrap(w.policy)
	}
	return w.policy
}

var ctx = context.Background()

// as returns a caller with an SVID that is valid for an hour.
func as(name string) broker.Caller {
	return broker.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/" + name), Proof: broker.ProofX509,
		NotAfter: time.Now().Add(time.Hour)}
}

func use(tools ...broker.ToolName) (rights []broker.Right) {
	for _, t := range tools {
		rights = append(rights, broker.Right{Tool: t, Use: true, Delegate: true})
	}
	return rights
}

func (w *world) open(holder string, r broker.OpenRequest) broker.Delegation {
	w.t.Helper()
	if r.Task == "" {
		r.Task = "a task"
	}
	if r.Rights == nil {
		r.Rights = use("db.read", "db.write", "deploy")
	}
	d, err := w.Open(ctx, as(holder), r)
	if err != nil {
		w.t.Fatalf("Open(%v) = %v, want a root", r, err)
	}
	return d
}

// draw opens the chain of a drawing. Each name in it is also the name of the delegation's holder.
func (w *world) draw(drawing string) map[string]broker.Delegation {
	w.t.Helper()
	root, err := brokertest.ParseChain(drawing)
	if err != nil {
		w.t.Fatal(err)
	}
	made := map[string]broker.Delegation{}
	root.Walk(func(parent, n *brokertest.Node) {
		if parent == nil {
			made[n.Name] = w.open(n.Name, broker.OpenRequest{Depth: broker.MaxDepth})
			return
		}
		from := made[parent.Name]
		d, err := w.Delegate(ctx, as(parent.Name), broker.DelegateRequest{From: from.ID, To: as(n.Name).ID,
			Rights: use("db.read", "db.write", "deploy"), Depth: from.Depth - 1})
		if err != nil {
			w.t.Fatalf("Delegate(%s -> %s) = %v", parent.Name, n.Name, err)
		}
		made[n.Name] = d
	})
	return made
}

func step(d broker.Delegation, tool broker.ToolName) broker.StepRequest {
	return broker.StepRequest{Delegation: d.ID, Tool: tool}
}

func (w *world) issue(holder string, r broker.StepRequest) broker.Issued {
	w.t.Helper()
	got, err := w.Issue(ctx, as(holder), r)
	if err != nil {
		w.t.Fatalf("Issue(%s, %s) = %v, want a secret", holder, r.Tool, err)
	}
	return got
}

// refused fails the test unless err has the kind and the code.
func refused(t *testing.T, call string, err error, kind broker.Kind, code broker.Code) {
	t.Helper()
	var e *broker.Error
	if !errors.As(err, &e) || e.Kind != kind || e.Code != code {
		t.Fatalf("%s = %v, want kind %s and code %q", call, err, kind, code)
	}
}

// pass lets time pass in the bubble.
func pass(d time.Duration) { <-time.After(d) }

// wantAllClosed fails the test unless the target has no login and Vault has no lease. Every grant in the ledger must be
// CLOSED, and every chain must count no live grant.
func (w *world) wantAllClosed() {
	w.t.Helper()
	if alive, leases := w.target.Alive(), w.vault.LeaseIDs(); len(alive)+len(leases) > 0 {
		w.t.Fatalf("alive at the target: %v, leases in Vault: %v; want none", alive, leases)
	}
	chains, err := w.Chains(ctx, true)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, c := range chains {
		v, err := w.Chain(ctx, c.Chain.ID)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, g := range v.Grants {
			if g.State != broker.StateClosed {
				w.t.Errorf("grant %s is %s (%s, %v), want CLOSED", g.ID, g.State, g.Ending, g.Evidence)
			}
		}
		if c.Live != 0 {
			w.t.Errorf("chain %s counts %d live grants, want 0", c.Chain.ID, c.Live)
		}
	}
}

// whole is an engine of which the queries return all pages.
type whole struct{ *engine.Engine }

func (w whole) Chains(ctx context.Context, all bool) (list []broker.ChainSummary, err error) {
	err = broker.EachPage(func(p broker.Page) (string, error) {
		part, next, err := w.Engine.Chains(ctx, all, p)
		list = append(list, part...)
		return next, err
	})
	return list, err
}

func (w whole) Chain(ctx context.Context, id broker.ChainID) (v broker.ChainView, err error) {
	err = broker.EachPage(func(p broker.Page) (string, error) {
		part, err := w.Engine.Chain(ctx, id, p)
		v.Chain = part.Chain
		v.Delegations, v.Grants = append(v.Delegations, part.Delegations...), append(v.Grants, part.Grants...)
		return part.Next, err
	})
	return v, err
}

func (w whole) Revocations(ctx context.Context) (list []broker.Revocation, err error) {
	err = broker.EachPage(func(p broker.Page) (string, error) {
		part, next, err := w.Engine.Revocations(ctx, p)
		list = append(list, part...)
		return next, err
	})
	return list, err
}

func (w whole) Canaries(ctx context.Context) (list []broker.Canary, err error) {
	err = broker.EachPage(func(p broker.Page) (string, error) {
		part, next, err := w.Engine.Canaries(ctx, p)
		list = append(list, part...)
		return next, err
	})
	return list, err
}

// urgency fails the test when a fence is recorded by an update that is not urgent, or an issue or an end by one that is.
type urgency struct {
	broker.Ledger
	t *testing.T
}

func (l urgency) Update(ctx context.Context, f func(broker.Tx) error) error {
	return l.Ledger.Update(ctx, func(tx broker.Tx) error { return f(urgencyTx{tx, l.t, broker.IsUrgent(ctx)}) })
}

type urgencyTx struct {
	broker.Tx
	t      *testing.T
	urgent bool
}

func (tx urgencyTx) Append(e broker.Entry) (broker.Revision, error) {
	switch e.Op {
	case broker.OpFence, broker.OpFreeze:
		if !tx.urgent {
			tx.t.Errorf("%s is recorded by an update that is not urgent", e.Op)
		}
	case broker.OpOpen, broker.OpIntent, broker.OpHandle, broker.OpEnd:
		if tx.urgent {
			tx.t.Errorf("%s is recorded by an urgent update", e.Op)
		}
	}
	return tx.Tx.Append(e)
}
