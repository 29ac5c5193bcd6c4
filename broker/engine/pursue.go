package engine

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// pursue starts steps 2 to 6 of revoke in the background. [Broker.Resume] starts it for every
// revocation that has not settled; it is the same function.
func (b *Engine) pursue(rv broker.Revocation) {
	if rv.Freeze || !rv.Settled.IsZero() || !b.pursued.begin(rv.ID) {
		return
	}
	b.background(func() {
		defer b.pursued.end(rv.ID)
		p := pursuit{b: b, rv: rv, tokens: map[string]bool{}}
		for wait := 10 * time.Millisecond; b.ctx.Err() == nil; wait = min(wait*2, 5*time.Second) {
			woken, cancel := b.hub.watch(topicName{chain: rv.Chain})
			done, err := p.round(b.ctx)
			if err != nil {
				b.cfg.Alarm("pursuing revocation "+string(rv.ID), err)
			}
			if p.held {
				wait = 50 * time.Millisecond
			}
			if done || !b.pause(woken, wait, p.least) {
				cancel()
				return
			}
			cancel()
		}
	})
}

// pursuits are the revocations that this process is at work on. A command that is repeated finds
// its revocation standing, and must not start a second pursuit, nor miss the first: the answer of the transaction
// that fenced may have been lost.
type pursuits struct {
	mu sync.Mutex // guards at
	at map[broker.RevocationID]bool
}

func (p *pursuits) begin(id broker.RevocationID) (first bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.at[id] {
		return false
	}
	if p.at == nil {
		p.at = map[broker.RevocationID]bool{}
	}
	p.at[id] = true
	return true
}

func (p *pursuits) end(id broker.RevocationID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.at, id)
}

// pursueUnsure is pursue for a fence that the ledger failed to acknowledge: it may have been recorded
// all the same, and whoever asked for it may never ask again.
func (b *Engine) pursueUnsure(rv broker.Revocation, err error) {
	if rv.ID != "" && !errors.Is(err, broker.ErrNotCommitted) {
		b.pursue(rv)
	}
}

// pause waits until woken, for at least least and at most d longer; false means that the broker
// stops.
func (b *Engine) pause(woken <-chan struct{}, d, least time.Duration) bool {
	first := time.NewTimer(least)
	defer first.Stop()
	select {
	case <-b.ctx.Done():
		return false
	case <-first.C:
	}
	most := time.NewTimer(d)
	defer most.Stop()
	select {
	case <-b.ctx.Done():
		return false
	case <-woken:
	case <-most.C:
	}
	return true
}

// pursuit carries one revocation from fenced to closure.
type pursuit struct {
	b      *Engine
	rv     broker.Revocation
	stored broker.Revocation                 // as the ledger is known to have it; zero: not known
	queued map[broker.GrantID]broker.ChainID // what the fence covers and was not over when last looked at, with its chain
	static map[broker.GrantID]bool           // what it covers and is over, and works on
	total  int                               // of both, when the pursuit began
	latest time.Time                         // the latest end of what was queued then
	hunted []broker.GrantID                  // whose mint was under way then
	lanes  map[string]bool                   // the backends of what was queued then
	begun  time.Time
	held   bool                // the end of tokens waits for the lanes
	tokens map[string]bool     // accessors that Vault confirmed as revoked, to this process
	nodes  []broker.Delegation // with tokens, root first; after the fence none gets another
	least  time.Duration       // between two rounds: looking costs more the more is left
	absent bool                // the ledger does not have it: see pursueUnsure
}

// round looks at what is left, has it ended, and records the closure when it changed.
func (p *pursuit) round(ctx context.Context) (done bool, err error) {
	var left []broker.Grant
	p.held = false
	if p.queued == nil {
		left, err = p.begin(ctx)
	} else {
		left, err = p.left(ctx)
	}
	if err != nil || p.absent {
		return p.absent && p.b.cfg.Now().Sub(p.rv.Fenced) > p.b.cfg.MintTimeout, err
	}
	p.least = 5*time.Millisecond + time.Duration(len(left))*200*time.Microsecond
	if len(left) == 0 && p.rv.Unswept {
		if err := p.sweep(ctx); err != nil {
			p.b.cfg.Alarm("sweeping for "+string(p.rv.ID), err)
		}
	}
	return p.record(ctx, left, p.killTokens(ctx, p.nodes))
}

// headStart is how long severing may hold up the end of the delegations' tokens. Vault would use that to end what
// is below them one by one, over the same database, and lock a login out of the bulk for as long as that takes.
const headStart = 2 * time.Second

// holds reports whether it is too early for step 3: a target is at work, and has not had its time for it.
func (p *pursuit) holds() bool {
	return p.b.cfg.Now().Sub(p.begun) < headStart && p.b.closer.severing(p.lanes)
}

// begin lists what the fence covers, which nothing can join any more, and hands it to the closer.
func (p *pursuit) begin(ctx context.Context) (grants []broker.Grant, err error) {
	var static []broker.GrantID
	err = p.b.view(ctx, "revoke", func(tx broker.Tx) error {
		_, ok, err := load[broker.Revocation](tx, keyRevocation(p.rv.ID))
		if p.absent = err == nil && !ok; err != nil || !ok {
			return err
		}
		if grants, p.nodes, err = p.b.under(tx, p.rv); err != nil {
			return err
		}
		static, err = p.b.worksOn(tx, p.rv)
		return err
	})
	if err != nil || p.absent {
		return nil, err
	}
	p.queued, p.static, p.total = make(map[broker.GrantID]broker.ChainID, len(grants)), map[broker.GrantID]bool{}, len(grants)+len(static)
	p.lanes, p.begun = map[string]bool{}, p.b.cfg.Now()
	for _, id := range static {
		p.static[id] = true
	}
	for _, g := range grants {
		p.queued[g.ID], p.lanes[g.Backend] = g.Chain, true
		if end := g.LatestEnd(); end.After(p.latest) {
			p.latest = end
		}
		if g.State == broker.StateHandle && g.Lease.Expires.IsZero() {
			p.hunted, p.rv.Unswept = append(p.hunted, g.ID), true
		}
	}
	p.b.closer.cut(grants)
	return grants, nil
}

// sweep is step 4, once nothing is left: mints that were under way when it was fenced, and whose answer never came,
// may have left what the ledger does not know.
func (p *pursuit) sweep(ctx context.Context) error {
	var lost []broker.Grant
	err := p.b.view(ctx, "revoke", func(tx broker.Tx) error {
		lost = nil
		for _, id := range p.hunted {
			g, _, err := load[broker.Grant](tx, keyGrant(id))
			if err != nil {
				return err
			}
			if g.Lease.Expires.IsZero() && g.Token.Accessor != "" {
				lost = append(lost, g)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if len(p.hunted) > 0 && len(lost) == 0 {
		p.rv.Unswept = false
		return nil
	}
	done, err := p.b.sweepAfter(ctx, lost, p.rv.Fenced)
	p.rv.Unswept = !done
	return err
}

// left gives what is not over of what the fence covers. Of many only the ids: to decode a
// hundred thousand grants again for every look would take longer than to end them.
func (p *pursuit) left(ctx context.Context) (grants []broker.Grant, err error) {
	const many = 1000
	var over, static []broker.GrantID
	err = p.b.view(ctx, "revoke", func(tx broker.Tx) error {
		grants, over, static = nil, nil, nil
		for id, chain := range p.queued {
			live, err := tx.Get(keyLive(chain, id))
			if err != nil {
				return err
			}
			if live != nil {
				grants = append(grants, broker.Grant{ID: id})
				continue
			}
			over = append(over, id)
			works, err := tx.Get(keyStatic(chain, id))
			if err != nil {
				return err
			}
			if works != nil {
				static = append(static, id)
			}
		}
		if len(grants) > many {
			return nil
		}
		for i := range grants {
			g, _, err := load[broker.Grant](tx, keyGrant(grants[i].ID))
			if err != nil {
				return err
			}
			grants[i] = g
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, id := range over {
		delete(p.queued, id)
	}
	for _, id := range static {
		p.static[id] = true
	}
	return grants, nil
}

// worksOn lists what a revocation covers of the static secrets whose grants are over. Their time was
// over, not their use.
func (b *Engine) worksOn(tx broker.Tx, rv broker.Revocation) (ids []broker.GrantID, err error) {
	covers, err := b.covering(tx, rv)
	if err != nil {
		return nil, err
	}
	seen := b.sight(tx)
	err = eachStatic(tx, rv.Chain, func(g broker.Grant) error {
		p, err := seen.path("revoke", g.Delegation)
		if err == nil && covers(p, p.subject(g)) {
			ids = append(ids, g.ID)
		}
		return err
	})
	return ids, err
}

// under lists what is under a revocation: grants that are not over, and delegations with the
// ancestors before their descendants.
func (b *Engine) under(tx broker.Tx, rv broker.Revocation) (grants []broker.Grant, nodes []broker.Delegation, err error) {
	covers, err := b.covering(tx, rv)
	if err != nil {
		return nil, nil, err
	}
	seen := b.sight(tx)
	err = eachLive(tx, rv.Chain, func(g broker.Grant) error {
		p, err := seen.path("revoke", g.Delegation)
		if err == nil && covers(p, p.subject(g)) {
			grants = append(grants, g)
		}
		return err
	})
	if err != nil || rv.Grant != "" {
		return grants, nil, err
	}
	err = eachRecent(tx, rv.Chain, rv.Fenced, func(id broker.DelegationID) error {
		p, err := b.readPath(tx, "revoke", id)
		if err == nil && len(p.leaf().Tokens) > 0 && covers(p, selector.Subject{}) {
			nodes = append(nodes, p.leaf())
		}
		return err
	})
	rootFirst(nodes)
	return grants, nodes, err
}

// covering gives the test of whether a path or a grant on it is meant by a revocation.
func (b *Engine) covering(tx broker.Tx, rv broker.Revocation) (func(path, selector.Subject) bool, error) {
	switch {
	case rv.Node != "":
		return func(p path, _ selector.Subject) bool {
			for _, d := range p.nodes {
				if d.ID == rv.Node {
					return true
				}
			}
			return false
		}, nil
	case rv.Grant != "":
		return func(_ path, s selector.Subject) bool { return s.Grant == rv.Grant }, nil
	}
	s, err := selector.Parse(rv.Selector)
	r := queryFence{selector: s, Fence: broker.Fence{At: rv.Fenced, Frozen: rv.Freeze}}
	return r.covers, err
}

// killTokens ends the delegations' tokens, root first, so that what hangs below ends with one
// call where Vault can do it. It gives how many are not confirmed yet.
func (p *pursuit) killTokens(ctx context.Context, nodes []broker.Delegation) (pending int) {
	now := p.b.cfg.Now()
	p.held = len(nodes) > 0 && p.holds()
	for _, d := range nodes {
		for _, t := range d.Tokens {
			if p.tokens[t.Accessor] || !t.Expires.IsZero() && now.After(t.Expires) {
				continue
			}
			if p.held || pending > 0 {
				pending++ // later; or Vault has just not answered: do not ask it a thousand times more
				continue
			}
			killCtx, cancel := context.WithTimeout(ctx, p.b.cfg.MintTimeout)
			err := p.b.cfg.Vault.Kill(killCtx, t.Accessor)
			cancel()
			if err != nil {
				p.b.cfg.Alarm("revoking the tokens of "+string(p.rv.ID), err)
				pending++
				continue
			}
			p.tokens[t.Accessor] = true
		}
	}
	return pending
}

// record works the counts out and stores them when they changed. A revocation has settled
// when nothing is left that work or time can change.
func (p *pursuit) record(ctx context.Context, left []broker.Grant, pending int) (done bool, err error) {
	now := p.b.cfg.Now()
	reckon := func(rv broker.Revocation) broker.Revocation {
		rv.Tokens, rv.Unswept = pending, p.rv.Unswept // first: the closure counts them
		recount(&rv, found{left: left, static: len(p.static), total: p.total, latest: p.latest})
		done = len(left) == 0 && pending == 0 && !rv.Unswept
		if done && rv.Settled.IsZero() {
			rv.Settled = now
		}
		return rv
	}
	// Without this hundreds that wait for a Vault that is down would keep the ledger from those who fence.
	if p.stored.ID != "" && reckon(p.stored) == p.stored {
		return done, nil
	}
	err = p.b.update(ctx, "revoke", func(tx broker.Tx) error {
		before, ok, err := load[broker.Revocation](tx, keyRevocation(p.rv.ID))
		if err != nil || !ok {
			return orUnknownRevocation("revoke", err)
		}
		rv := reckon(before)
		if p.rv = rv; before == rv {
			return nil
		}
		if err := save(tx, keyRevocation(rv.ID), rv); err != nil {
			return err
		}
		op := broker.OpEvidence
		if before.Closure != rv.Closure {
			op = broker.OpClosure
		}
		_, err = enter(tx, broker.Entry{At: now, Actor: "pawl", Op: op, Chain: rv.Chain, Delegation: rv.Node, Revocation: rv.ID,
			Detail: tally(rv)})
		return err
	})
	if err != nil {
		p.stored = broker.Revocation{}
		return false, err // a closure that was not recorded is worked out again
	}
	p.stored = p.rv
	return done, nil
}

// found is what a look at a revocation's grants found.
type found struct {
	left   []broker.Grant // not over; of many only the ids
	static int            // over, and works on
	total  int            // of both, when they were first listed
	latest time.Time      // the latest end of what was left then
}

// recount brings the revocation's numbers up to date: what is left decides the closure, and what
// is over was proven, except a static secret.
func recount(rv *broker.Revocation, f found) {
	rv.Grants = max(rv.Grants, f.total) // none can join after the fence
	rv.Alive, rv.Unknown, rv.Static, rv.LatestEnd = f.static, 0, f.static, time.Time{}
	for _, g := range f.left {
		if g.Outcome == broker.OutcomeAlive {
			rv.Alive++
		} else {
			rv.Unknown++
		}
		if end := g.LatestEnd(); end.After(rv.LatestEnd) {
			rv.LatestEnd = end
		}
	}
	if len(f.left) > 0 && f.left[0].State == "" { // only their ids are known
		rv.LatestEnd = f.latest
	}
	rv.Dead = rv.Grants - rv.Alive - rv.Unknown
	switch {
	case rv.Alive > 0:
		rv.Closure = broker.ClosurePartial
	case rv.Unknown > 0 || rv.Tokens > 0 || rv.Unswept:
		rv.Closure = broker.ClosureUnknown
	default:
		rv.Closure = broker.ClosureClosed
	}
}
