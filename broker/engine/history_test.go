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

// action is one thing that somebody did to a chain, as seen from outside the broker.
type action string

const (
	handOver action = "hand over" // a step was asked for; true: its secret was handed over, false: refused as revoked
	tried    action = "try"       // a captured secret was tried at the target; true: it works
	fence    action = "fence"     // the chain was revoked and that was acknowledged
	closed   action = "closed"    // its revocation was seen to be CLOSED
)

// chainState is all that the model knows of a chain: two promises, each kept once and for good.
type chainState struct{ fenced, closed bool }

// promises is the model: a secret is handed over only before the fence and refused only after
// it, works only before CLOSED was said and is dead only after the fence, and CLOSED is said of what
// is fenced. Every chain is a history of its own, numbered by the operations' Metadata.
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

// recorder stamps what happens with the ticks of one counter, so that what ended before another
// thing began has the smaller stamp, on a clock that stands still too.
type recorder struct {
	ticks atomic.Int64
	mu    sync.Mutex // guards what follows
	seen  map[broker.ChainID][]porcupine.Operation
}

func (r *recorder) now() int64 { return r.ticks.Add(1) }

func (r *recorder) add(chain broker.ChainID, client int, what action, call int64, output bool) {
	op := porcupine.Operation{ClientId: client, Input: what, Call: call, Output: output, Return: r.now()}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen[chain] = append(r.seen[chain], op)
}

// check gives the worst that porcupine says of any chain.
func (r *recorder) check() porcupine.CheckResult {
	for _, history := range r.seen {
		if !porcupine.CheckOperations(promises, history) {
			return porcupine.Illegal
		}
	}
	return porcupine.Ok
}

// delayingVault holds some mints back until their chain's revocation is acknowledged: half of those
// before Vault has minted, half with the answer on its way. It notes when an answer arrived, since
// the commit that decides about the hand-over comes after that.
type delayingVault struct {
	*brokertest.Vault
	*recorder
	acknowledged map[broker.ChainID]chan struct{}

	mu      sync.Mutex // guards what follows
	grants  map[string]broker.Grant
	held    map[broker.ChainID]int
	arrived map[broker.GrantID]int64
}

// mostHeld mints of a chain wait at once, so that others go on.
const mostHeld = 3

func (v *delayingVault) CreateStepToken(ctx context.Context, g broker.Grant, name, policy string) (broker.Handle, error) {
	h, err := v.Vault.CreateStepToken(ctx, g, name, policy)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.grants[h.Accessor] = g
	return h, err
}

func (v *delayingVault) Mint(ctx context.Context, h broker.Handle, m broker.Mint) (broker.Lease, broker.Secret, error) {
	v.mu.Lock()
	g := v.grants[h.Accessor]
	before, after := false, false
	if v.held[g.Chain] < mostHeld && rand.N(10) == 0 {
		v.held[g.Chain]++
		before = v.held[g.Chain]%2 == 0
		after = !before
	}
	v.mu.Unlock()
	hold := func(held bool) {
		if !held {
			return
		}
		select {
		case <-v.acknowledged[g.Chain]:
		case <-ctx.Done(): // so many wait that nobody asks any more
		}
	}
	hold(before)
	lease, secret, err := v.Vault.Mint(ctx, h, m)
	hold(after)
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

// blindLedger takes the conditional commit out: transactions that change something do not see
// fences, and keep those that are there. Reading alone shows them, so that asking after the fence
// is refused as ever.
type blindLedger struct{ broker.Ledger }

func (l blindLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	return l.Ledger.Update(ctx, func(tx broker.Tx) error { return f(blindTx{tx}) })
}

type blindTx struct{ broker.Tx }

func marked(key string) bool { return strings.HasPrefix(key, "d/") || strings.HasPrefix(key, "g/") }

func (tx blindTx) Get(key string) ([]byte, error) {
	raw, err := tx.Tx.Get(key)
	if err != nil || raw == nil || !marked(key) {
		return raw, err
	}
	return without(raw, nil)
}

func (tx blindTx) Put(key string, value []byte) error {
	if value == nil || !marked(key) {
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
		if value, err = without(value, fence); err != nil {
			return err
		}
	}
	return tx.Tx.Put(key, value)
}

// fieldsOf gives the members of a record, which follow the version of its format.
func fieldsOf(raw []byte) (fields map[int]cbor.RawMessage, err error) {
	return fields, cbor.Unmarshal(raw[1:], &fields)
}

// fenceField is the key of the fence in a delegation, or in a grant.
func fenceField(fields map[int]cbor.RawMessage) int {
	if _, grant := fields[17]; grant { // the path that it is minted at
		return 24
	}
	return 11
}

// without gives a record without its fence, or with another one.
func without(raw []byte, other cbor.RawMessage) ([]byte, error) {
	fields, err := fieldsOf(raw)
	if err != nil {
		return nil, err
	}
	at := fenceField(fields)
	if delete(fields, at); other != nil {
		fields[at] = other
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

// storm is one round: clients that ask for steps in all chains at once, and somebody who
// revokes each chain in the middle of that.
type round struct {
	*world
	*recorder
	vault  *delayingVault
	chains []*roundChain
}

type roundChain struct {
	id    broker.ChainID
	d     map[string]broker.Delegation
	after int64 // attempts at which it is revoked
	asked atomic.Int64
	full  chan struct{} // closed when asked has reached after
}

const (
	roundClients  = 16
	roundChains   = 4
	roundAttempts = 125 // of each client
)

func newRound(t *testing.T, ledger func(broker.Ledger) broker.Ledger) *round {
	w := &world{t: t, ledger: brokertest.NewMemory(), target: brokertest.NewTarget(), policy: brokertest.AllowAll("db.read", "deploy")}
	w.policy.Answer = func(q broker.Question) broker.Decision {
		if q.Tool.Name == "deploy" && q.Action == broker.ActionUse {
			return broker.Decision{Consequence: broker.ConsequenceRevokeChain}
		}
		return broker.Decision{Allow: true}
	}
	s := &round{world: w, recorder: &recorder{seen: map[broker.ChainID][]porcupine.Operation{}}}
	s.vault = &delayingVault{Vault: brokertest.NewVault(w.target), recorder: s.recorder, acknowledged: map[broker.ChainID]chan struct{}{},
		grants: map[string]broker.Grant{}, held: map[broker.ChainID]int{}, arrived: map[broker.GrantID]int64{}}
	w.vault = s.vault.Vault // what it holds is looked at in the end
	b, err := engine.New(engine.Config{Ledger: ledger(w.ledger), Policy: func() broker.Policy { return w.policy }, Vault: s.vault,
		Backends: map[string]broker.Backend{"target": w.target}, Now: time.Now, Random: crand.Reader,
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
		c.after = roundAttempts * roundClients / roundChains / 20 * rand.Int64N(8)
		root := w.open("root", broker.OpenRequest{Depth: 1, Rights: use("db.read", "deploy")})
		leaf, err := w.Delegate(ctx, as("root"), broker.DelegateRequest{From: root.ID, To: as("agent").ID, Rights: use("db.read", "deploy")})
		if err != nil {
			t.Fatal(err)
		}
		c.id, c.d["root"], c.d["agent"] = root.Chain, root, leaf
		s.vault.acknowledged[c.id] = make(chan struct{})
		s.chains = append(s.chains, c)
	}
	return s
}

// revoke fences a chain in one of the ways there are, and watches it until it is CLOSED.
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
	case 3: // the fence is a consequence
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

// captured is a secret that a client keeps when it should not.
type captured struct {
	chain  broker.ChainID
	secret broker.Secret
}

func (s *round) attempt(c *roundChain, client int) (got captured, ok bool) {
	if c.asked.Add(1) == c.after+1 {
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
	case !errors.Is(err, broker.Unavailable): // Vault had ended the token before the mint
		s.t.Errorf("Issue = %v, want a secret, Revoked or Unavailable", err)
	}
	return captured{}, false
}

func (s *round) try(kept captured, client int) {
	began := s.now()
	s.add(kept.chain, client, tried, began, s.target.Login(kept.secret.Reveal()))
}

// client asks in every chain in turn, and tries what it kept now and then, and all of it once
// everything is over.
func (s *round) client(n int) (kept []captured) {
	for i := range roundAttempts {
		if got, ok := s.attempt(s.chains[(i+n)%roundChains], n); ok {
			kept = append(kept, got)
		}
		if len(kept) > 0 && i%2 == 0 {
			s.try(kept[rand.N(len(kept))], n)
		}
		if i%5 == 4 {
			pass(2 * time.Millisecond) // lets the broker's own clock run, for what it does in the background
		}
	}
	return kept
}

// rage runs the round and gives what porcupine says of it.
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
		for _, kept := range kept[n] {
			s.try(kept, n)
		}
	}
	return s.check()
}

// TestHistories is the promise of the acknowledgement, checked by porcupine over what 16 clients
// saw of 100,000 attempts around it.
func TestHistories(t *testing.T) {
	var handed, refused, used int
	for range 100_000 / (roundClients * roundAttempts) {
		synctest.Test(t, func(t *testing.T) {
			s := newRound(t, func(l broker.Ledger) broker.Ledger { return l })
			if got := s.run(); got != porcupine.Ok {
				t.Fatalf("porcupine says %s", got)
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
		t.Errorf("%d handed over and %d refused: the fences fell too early or too late to tell anything", handed, refused)
	}
}

// TestHistoriesWithoutTheConditionalCommit: a checker that finds nothing must be able to.
func TestHistoriesWithoutTheConditionalCommit(t *testing.T) {
	for range 10 {
		found := false
		synctest.Test(t, func(t *testing.T) {
			s := newRound(t, func(l broker.Ledger) broker.Ledger { return blindLedger{l} })
			found = s.run() == porcupine.Illegal
		})
		if found {
			return
		}
	}
	t.Error("porcupine finds nothing wrong in 10 rounds in which fences are not looked at when a secret is handed over")
}
