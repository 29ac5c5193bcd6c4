package engine_test

import (
	"context"
	crand "crypto/rand"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/fxamacker/cbor/v2"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
)

// action is an operation of a client on a chain, as seen from outside the broker.
type action string

const (
	handOver action = "hand over" // Issue; true: it handed a secret over, false: it was refused as revoked
	tried    action = "try"       // a login at the target with a captured secret; true: it works
	fence    action = "fence"     // Revoke, which was acknowledged
	closed   action = "closed"    // a read of the revocation that was CLOSED
)

// chainState is the model's state of a chain: two promises, each final.
type chainState struct{ fenced, closed bool }

// promises is the model. A secret is handed over only before the fence, and refused only after it. It works only before
// CLOSED, and is dead only after the fence. Only a fenced chain is CLOSED. Each chain is a history of its own.
var promises = porcupine.Model{
	Init: func() any { return chainState{} },
	Step: func(state, input, output any) (bool, any) {
		s, yes := state.(chainState), output.(bool)
		switch input.(action) {
		case handOver:
			return yes != s.fenced, s
		case tried:
			return yes && !s.closed || !yes && s.fenced, s
		case fence:
			return true, chainState{true, s.closed}
		}
		return s.fenced, chainState{s.fenced, true}
	},
}

// recorder stamps the calls and returns of operations with the ticks of a counter. An operation that returned before
// another was called has the smaller stamp, although the bubble's clock stands still.
type recorder struct {
	ticks atomic.Int64
	mu    sync.Mutex // guards seen
	seen  map[broker.ChainID][]porcupine.Operation
}

func (r *recorder) now() int64 { return r.ticks.Add(1) }

func (r *recorder) add(chain broker.ChainID, client int, a action, call int64, output bool) {
	op := porcupine.Operation{ClientId: client, Input: a, Call: call, Output: output, Return: r.now()}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen[chain] = append(r.seen[chain], op)
}

// check returns porcupine's result: Ok when it is Ok for every chain.
func (r *recorder) check() porcupine.CheckResult {
	for _, history := range r.seen {
		if !porcupine.CheckOperations(promises, history) {
			return porcupine.Illegal
		}
	}
	return porcupine.Ok
}

// delayingVault delays some mints until their chain's revocation is acknowledged, half of them before Vault mints and
// half after. It stamps the arrival of each answer: the commit that decides on the hand-over comes after it.
type delayingVault struct {
	*brokertest.Vault
	*recorder
	acknowledged map[broker.ChainID]chan struct{}

	mu      sync.Mutex              // guards grants, delayed and arrived
	grants  map[string]broker.Grant // by the step's token, or by id
	delayed map[broker.ChainID]int
	arrived map[broker.GrantID]int64
}

// mostDelayed is the number of a chain's mints that are delayed. The others continue.
const mostDelayed = 3

func (v *delayingVault) CreateStepToken(ctx context.Context, g broker.Grant, name, policy string) (
	h broker.Handle, err error) {
	h, err = v.Vault.CreateStepToken(ctx, g, name, policy)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.grants[h.Accessor] = g
	return h, err
}

func (v *delayingVault) DelegationToken(g broker.Grant, policy string) (broker.Handle, error) {
	h, err := v.Vault.DelegationToken(g, policy)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.grants[string(g.ID)] = g
	return h, err
}

func (v *delayingVault) Mint(ctx context.Context, h broker.Handle, m broker.Mint) (broker.Lease, broker.Secret, error) {
	v.mu.Lock()
	g := v.grants[h.Accessor]
	if m.Shared != nil {
		g = v.grants[string(m.Shared.Grant)]
	}
	before, after := false, false
	if v.delayed[g.Chain] < mostDelayed && rand.N(10) == 0 {
		v.delayed[g.Chain]++
		before = v.delayed[g.Chain]%2 == 0
		after = !before
	}
	v.mu.Unlock()
	delay := func(delayed bool) {
		if !delayed {
			return
		}
		select {
		case <-v.acknowledged[g.Chain]:
		case <-ctx.Done(): // so many clients wait that none makes the attempts after which the chain is revoked
		}
	}
	delay(before)
	lease, secret, err := v.Vault.Mint(ctx, h, m)
	delay(after)
	v.mu.Lock()
	v.arrived[g.ID] = v.now()
	v.mu.Unlock()
	return lease, secret, err
}

func (v *delayingVault) answered(id broker.GrantID) int64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.arrived[id]
}

// blindLedger takes out the conditional commit: updates do not see fences, and keep the existing ones. Views show the
// fences, so a request after the fence is refused as before.
type blindLedger struct{ broker.Ledger }

func (l blindLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	return l.Ledger.Update(ctx, func(tx broker.Tx) error { return f(blindTx{tx}) })
}

func (l blindLedger) Order(ctx context.Context, f func(broker.Tx) error, done func(error)) error {
	return l.Ledger.Order(ctx, func(tx broker.Tx) error { return f(blindTx{tx}) }, done)
}

type blindTx struct{ broker.Tx }

// hasFence reports whether a record has a field for a fence: delegations and grants have.
func hasFence(key string) bool { return strings.HasPrefix(key, "d/") || strings.HasPrefix(key, "g/") }

func (tx blindTx) Get(key string) ([]byte, error) {
	raw, err := tx.Tx.Get(key)
	if err != nil || raw == nil || !hasFence(key) {
		return raw, err
	}
	return withFence(raw, nil)
}

func (tx blindTx) Put(key string, value []byte) error {
	if value == nil || !hasFence(key) {
		return tx.Tx.Put(key, value)
	}
	raw, err := tx.Tx.Get(key)
	if err != nil {
		return err
	}
	if raw == nil {
		return tx.Tx.Put(key, value)
	}
	fields, err := fieldsOf(raw)
	if err != nil {
		return err
	}
	if fence, ok := fields[fenceField(fields)]; ok {
		if value, err = withFence(value, fence); err != nil {
			return err
		}
	}
	return tx.Tx.Put(key, value)
}

// fieldsOf returns the members of a record. They follow the byte with the version of its format.
func fieldsOf(raw []byte) (fields map[int]cbor.RawMessage, err error) {
	return fields, cbor.Unmarshal(raw[1:], &fields)
}

// fenceField returns the key of the fence in a delegation or in a grant.
func fenceField(fields map[int]cbor.RawMessage) int {
	if _, grant := fields[17]; grant { // the path in Vault, which only a grant has
		return 24
	}
	return 11
}

// withFence replaces the fence of a record; nil: it removes the fence.
func withFence(raw []byte, fence cbor.RawMessage) ([]byte, error) {
	fields, err := fieldsOf(raw)
	if err != nil {
		return nil, err
	}
	at := fenceField(fields)
	if delete(fields, at); fence != nil {
		fields[at] = fence
	}
	body, err := cbor.Marshal(fields)
	return append([]byte{raw[0]}, body...), err
}

func (tx blindTx) Scan(prefix, after string, f func(string, []byte) bool) error {
	if prefix == "f/" {
		return nil
	}
	return tx.Tx.Scan(prefix, after, f)
}

// round is one history of clients that take steps in all chains at once, while each chain is revoked.
type round struct {
	*world
	*recorder
	vault    *delayingVault
	chains   []*roundChain
	attempts int // of each client
}

type roundChain struct {
	id       broker.ChainID
	d        map[string]broker.Delegation
	after    int64 // attempts after which it is revoked
	attempts atomic.Int64
	full     chan struct{} // closed when there were more attempts than after
}

const (
	roundClients  = 16
	roundChains   = 4
	roundAttempts = 125 // of each client
)

// newRound makes a round. In about half of them the secrets have no lease, and their steps no token of their own.
func newRound(t *testing.T, attempts int, ledger func(broker.Ledger) broker.Ledger) *round {
	w := &world{t: t, ledger: brokertest.NewMemory(), target: brokertest.NewTarget(),
		policy: brokertest.AllowAll("db.read", "deploy")}
	w.policy.Answer = func(q broker.Question) broker.Decision {
		if q.Tool.Name == "deploy" && q.Action == broker.ActionUse {
			return broker.Decision{Consequence: broker.ConsequenceRevokeChain}
		}
		return broker.Decision{Allow: true}
	}
	s := &round{world: w, recorder: &recorder{seen: map[broker.ChainID][]porcupine.Operation{}}, attempts: attempts}
	s.vault = &delayingVault{Vault: brokertest.NewVault(w.target), recorder: s.recorder,
		acknowledged: map[broker.ChainID]chan struct{}{}, grants: map[string]broker.Grant{},
		delayed: map[broker.ChainID]int{}, arrived: map[broker.GrantID]int64{}}
	w.vault = s.vault.Vault // for wantAllClosed
	var backend broker.Backend = w.target
	if rand.N(2) == 0 {
		backend = sharedTarget{w.target}
	}
	b, err := engine.New(engine.Config{Ledger: ledger(w.ledger), Policy: func() broker.Policy { return w.policy },
		Vault: s.vault, Backends: map[string]broker.Backend{"target": backend}, Now: time.Now, Random: crand.Reader,
		MintTimeout: 2 * time.Second, MintBound: 5 * time.Second, SweepEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	w.Engine = b
	t.Cleanup(b.Stop)
	for range roundChains {
		c := &roundChain{d: map[string]broker.Delegation{}, full: make(chan struct{})}
		c.after = int64(attempts) * roundClients / roundChains / 20 * rand.Int64N(8)
		root := w.open("root", broker.OpenRequest{Depth: 1, Rights: use("db.read", "deploy")})
		leaf, err := w.Delegate(ctx, as("root"), broker.DelegateRequest{From: root.ID, To: as("agent").ID,
			Rights: use("db.read", "deploy")})
		if err != nil {
			t.Fatal(err)
		}
		c.id, c.d["root"], c.d["agent"] = root.Chain, root, leaf
		s.vault.acknowledged[c.id] = make(chan struct{})
		s.chains = append(s.chains, c)
	}
	return s
}

// revoke fences a chain in one of four ways, and watches the revocation until it is CLOSED.
func (s *round) revoke(way int, c *roundChain, client int) {
	<-c.full
	began := s.now()
	var id broker.RevocationID
	switch way {
	case 0:
		id = s.world.revoke("chain:%s", c.id).ID
	case 1:
		id = s.world.revoke("subtree:%s", c.d["agent"].ID).ID
	case 2:
		id = s.world.revoke("spiffe:%s and chain:%s", as("agent").ID, c.id).ID
	case 3: // the fence is the consequence of a violation
		_, err := s.Issue(ctx, as("root"), step(c.d["root"], "deploy"))
		var e *broker.Error
		if !errors.As(err, &e) || e.Revocation == "" {
			s.t.Errorf("Issue of a forbidden tool = %v, want a revocation", err)
			return
		}
		id = e.Revocation
	}
	s.add(c.id, client, fence, began, true)
	close(s.vault.acknowledged[c.id])
	for {
		changed, cancel := s.Watch(c.id)
		began := s.now()
		rv, err := s.Revocation(ctx, id)
		if err != nil {
			s.t.Errorf("Revocation = %v", err)
		}
		if err != nil || rv.Closure == broker.ClosureClosed {
			cancel()
			s.add(c.id, client, closed, began, true)
			return
		}
		<-changed
		cancel()
	}
}

// captured is a secret that a client keeps and tries later.
type captured struct {
	chain  broker.ChainID
	secret broker.Secret
}

func (s *round) attempt(c *roundChain, client int) (got captured, ok bool) {
	if c.attempts.Add(1) == c.after+1 {
		close(c.full)
	}
	began := s.now()
	issued, err := s.Issue(ctx, as("agent"), step(c.d["agent"], "db.read"))
	switch {
	case err == nil:
		s.add(c.id, client, handOver, s.vault.answered(issued.Grant.ID), true)
		return captured{c.id, issued.Secret}, true
	case errors.Is(err, broker.Revoked):
		s.add(c.id, client, handOver, began, false)
	case !errors.Is(err, broker.Unavailable): // Unavailable: Vault had revoked the token before the mint
		s.t.Errorf("Issue = %v, want a secret, Revoked or Unavailable", err)
	}
	return captured{}, false
}

func (s *round) try(c captured, client int) {
	began := s.now()
	s.add(c.chain, client, tried, began, s.target.Login(c.secret.Reveal()))
}

// client takes steps in the chains in turn. From time to time it tries a secret that it has captured, and it returns
// them all.
func (s *round) client(n int) (kept []captured) {
	for i := range s.attempts {
		if got, ok := s.attempt(s.chains[(i+n)%roundChains], n); ok {
			kept = append(kept, got)
		}
		if len(kept) > 0 && i%2 == 0 {
			s.try(kept[rand.N(len(kept))], n)
		}
		if i%5 == 4 {
			pass(2 * time.Millisecond) // the bubble's clock advances, so the background work continues
		}
	}
	return kept
}

// run runs the round and returns porcupine's result.
func (s *round) run() porcupine.CheckResult {
	var clients, revokers sync.WaitGroup
	for way, c := range s.chains {
		revokers.Go(func() { s.revoke(way, c, roundClients+way) })
	}
	kept := make([][]captured, roundClients)
	for n := range roundClients {
		clients.Go(func() { kept[n] = s.client(n) })
	}
	clients.Wait()
	revokers.Wait()
	for n := range roundClients {
		for _, c := range kept[n] {
			s.try(c, n)
		}
	}
	return s.check()
}

// TestHistories checks the promise of the acknowledgement with porcupine, over the histories of 16 clients that make
// 100,000 attempts around it.
func TestHistories(t *testing.T) {
	var handed, refused, used int
	for range 100_000 / (roundClients * roundAttempts) {
		synctest.Test(t, func(t *testing.T) {
			s := newRound(t, roundAttempts, func(l broker.Ledger) broker.Ledger { return l })
			if got := s.run(); got != porcupine.Ok {
				t.Fatalf("porcupine's result = %s, want %s", got, porcupine.Ok)
			}
			s.wantAllClosed()
			for _, history := range s.seen {
				for _, op := range history {
					switch yes := op.Output.(bool); {
					case op.Input == handOver && yes:
						handed++
					case op.Input == handOver:
						refused++
					case op.Input == tried:
						used++
					}
				}
			}
		})
	}
	t.Logf("%d secrets handed over, %d requests refused, %d uses of captured secrets", handed, refused, used)
	if handed < 10_000 || refused < 50_000 {
		t.Errorf("%d secrets handed over and %d requests refused, want 10,000 and 50,000 or more: "+
			"the fences came too early or too late to test the promise", handed, refused)
	}
}

// TestHistoriesWithoutTheConditionalCommit holds that the checker can fail: on a ledger without the conditional commit
// it finds a broken promise.
func TestHistoriesWithoutTheConditionalCommit(t *testing.T) {
	for range 10 {
		found := false
		synctest.Test(t, func(t *testing.T) {
			s := newRound(t, roundAttempts, func(l broker.Ledger) broker.Ledger { return blindLedger{l} })
			found = s.run() == porcupine.Illegal
		})
		if found {
			return
		}
	}
	t.Error("porcupine found no broken promise in 10 rounds whose hand-overs do not check the fences")
}
