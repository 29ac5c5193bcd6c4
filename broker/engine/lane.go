package engine

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// inbox collects grants until its one reader takes them all.
type inbox struct {
	mu   sync.Mutex // guards due and busy
	due  map[broker.GrantID]dueGrant
	busy bool // the reader is at work on what it took
	wake chan struct{}
}

func newInbox() *inbox {
	return &inbox{due: map[broker.GrantID]dueGrant{}, wake: make(chan struct{}, 1)}
}

// push adds some at once, so that the reader finds all of them: it would begin with the first of a
// thousand, and do the rest in a second go.
func (i *inbox) push(ds []dueGrant) {
	if len(ds) == 0 {
		return
	}
	i.mu.Lock()
	for _, d := range ds {
		before := i.due[d.id]
		d.attempt = max(before.attempt, d.attempt)
		if d.grant == nil {
			d.grant = before.grant
		}
		i.due[d.id] = d
	}
	i.mu.Unlock()
	select {
	case i.wake <- struct{}{}:
	default:
	}
}

func (i *inbox) take() map[broker.GrantID]dueGrant {
	i.mu.Lock()
	defer i.mu.Unlock()
	taken := i.due
	i.due, i.busy = map[broker.GrantID]dueGrant{}, true
	return taken
}

// done notes that the reader is through with what it took.
func (i *inbox) done() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.busy = false
}

// idle reports whether whatever was pushed before has been dealt with.
func (i *inbox) idle() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.due) == 0 && !i.busy
}

// lane ends the grants of one backend.
type lane struct {
	b       *Engine
	backend string
	sever   *inbox // not cut yet
	settle  *inbox // cut, as far as that could be done: to be killed in Vault and proven

	// killed is when Vault confirmed the end of a token, by accessor, while its grant is not over. Only runSettle looks at it.
	killed map[string]time.Time
}

func (l *lane) push(ds []dueGrant) {
	var sever, settle []dueGrant
	for _, d := range ds {
		if d.attempt == 0 || d.open {
			sever = append(sever, d)
		} else {
			settle = append(settle, d)
		}
	}
	l.sever.push(sever)
	l.settle.push(settle)
}

// runSever is step 2 of revoke for whatever has come in: everything at once, without Vault.
func (l *lane) runSever() {
	for l.await(l.sever) {
		taken := l.sever.take()
		grants := l.ending(taken)
		if s, ok := l.b.cfg.Backends[l.backend].(broker.Severer); ok && len(grants) > 0 {
			ctx, cancel := context.WithTimeout(l.b.ctx, 30*time.Second)
			if err := s.Sever(ctx, grants); err != nil && l.b.ctx.Err() == nil {
				l.b.cfg.Alarm("severing at "+l.backend, err) // Vault may still end them
			}
			cancel()
		}
		cut := make([]dueGrant, len(grants))
		for i, g := range grants {
			cut[i] = dueGrant{id: g.ID, attempt: max(taken[g.ID].attempt, 1)}
		}
		l.settle.push(cut)
		l.sever.done()
	}
}

func (l *lane) await(i *inbox) bool {
	select {
	case <-l.b.ctx.Done():
		return false
	case <-i.wake:
		return true
	}
}

// ending loads the grants that were not handed over with their records, and leaves out those that are over and those
// that need not end yet: a clock that was ahead has them looked at too soon, and they are looked at again at their end.
func (l *lane) ending(due map[broker.GrantID]dueGrant) (grants []broker.Grant) {
	now := l.b.cfg.Now()
	var early []dueGrant
	err := l.b.view(l.b.ctx, "close", func(tx broker.Tx) error {
		grants, early = nil, nil
		seen := l.b.sight(tx)
		for id, d := range due {
			if d.grant != nil {
				grants = append(grants, *d.grant)
				continue
			}
			g, ok, err := load[broker.Grant](tx, keyGrant(id))
			if err != nil {
				return err
			}
			if !ok || g.State == broker.StateClosed {
				continue
			}
			must, err := mustEnd(seen, &g, now)
			if err != nil {
				return err
			}
			if must {
				grants = append(grants, g)
			} else {
				early = append(early, dueGrant{at: g.Expires, id: id, backend: l.backend})
			}
		}
		return nil
	})
	l.b.deliveries.drop(grants)
	if err != nil && l.b.ctx.Err() == nil {
		l.b.cfg.Alarm("reading what must end", err)
		spread := rand.Float64()
		for id, d := range due {
			l.b.closer.at(l.later(id, d.attempt, spread))
		}
		return nil
	}
	for _, d := range early {
		l.b.closer.at(d)
	}
	return grants
}

// mustEnd reports whether a grant that is not over has to end now, and says why in g.Ending.
func mustEnd(seen *sight, g *broker.Grant, now time.Time) (bool, error) {
	if g.Ending != "" {
		return true, nil
	}
	if g.Fence != nil && !g.Fence.Frozen {
		g.Ending = broker.EndingRevoked
		return true, nil
	}
	p, err := seen.path("close", g.Delegation)
	if err != nil {
		return false, err
	}
	f, err := seen.fenceOver(p, p.subject(*g))
	switch {
	case err != nil:
		return false, err
	case f != nil && !f.Frozen:
		g.Ending = broker.EndingRevoked
	case !now.Before(g.Expires):
		g.Ending = broker.EndingExpired
	case seen.b.lost(g):
		g.Ending = broker.EndingFailed // nobody can have it any more
	case g.State != broker.StateIssued && !seen.b.closer.isMinting(g.ID):
		g.Ending = broker.EndingFailed // whoever was issuing it is gone
	}
	return g.Ending != "", nil
}

// batchSize is how many grants are killed, and then recorded, before the closer looks up for others.
const batchSize = 200

// passSize is how many grants are asked about together: one question about many leases, or about many secrets at
// their target, costs Vault or the target little more than one about a few.
const passSize = 10 * batchSize

// runSettle is steps 3 to 5 of revoke. What comes in while many are being settled does not wait
// for all of them: an agent's own Close is not held up by the revocation of another chain.
func (l *lane) runSettle() {
	for l.await(l.settle) {
		left := l.settle.take()
		for len(left) > 0 && l.b.ctx.Err() == nil {
			pass := map[broker.GrantID]dueGrant{}
			for id, d := range left {
				if len(pass) == passSize {
					break
				}
				pass[id] = d
				delete(left, id)
			}
			l.settlePass(pass, func() {
				fresh := l.settle.take()
				if len(fresh) <= batchSize {
					l.settlePass(fresh, func() {})
				} else {
					maps.Copy(left, fresh)
				}
			})
		}
		l.settle.done()
	}
}

// settlePass closes what can be closed, calling between after each batch of it. What is left is looked at again
// all at once, and not each by itself.
func (l *lane) settlePass(taken map[broker.GrantID]dueGrant, between func()) {
	grants := l.ending(taken)
	if len(grants) == 0 {
		between()
		return
	}
	spread := rand.Float64()
	for _, g := range l.close(grants, taken, between) {
		due := l.later(g.ID, taken[g.ID].attempt, spread)
		due.open = l.isOpen(g)
		if settles := g.Settles.Add(time.Millisecond); settles.After(l.b.cfg.Now()) && settles.Before(due.at) {
			due.at = settles // then an answer is possible
		}
		l.b.closer.at(due)
	}
}

// isOpen reports whether the target has not said that the grant's secret is dead: it was not
// severed, since the target was down, or came to be after that.
func (l *lane) isOpen(g broker.Grant) bool {
	n := len(g.Evidence)
	return n > 0 && l.probes() && g.Evidence[n-1].Outcome != broker.OutcomeDead
}

// later is when to look again: soon at first, since Vault has usually only queued its part. spread, from 0 to 1,
// puts the looks of one backend off those of another.
func (l *lane) later(id broker.GrantID, attempt int, spread float64) dueGrant {
	wait := min(10*time.Millisecond<<min(attempt, 12), 10*time.Second)
	wait += time.Duration(spread * float64(wait/2))
	return dueGrant{at: l.b.cfg.Now().Add(wait), id: id, backend: l.backend, attempt: attempt + 1}
}

// close kills and proves a pass, closes what is proven, and gives the rest. taken says how
// often each has been looked at.
func (l *lane) close(pass []broker.Grant, taken map[broker.GrantID]dueGrant, between func()) (rest []broker.Grant) {
	killed := l.kill(pass, between)
	ctx, cancel := context.WithTimeout(l.b.ctx, time.Minute)
	defer cancel()
	found := l.prove(ctx, pass)
	gone := l.gone(ctx, pass)
	l.revokeLeft(ctx, pass, gone, taken)
	now := l.b.cfg.Now()
	for i := range pass {
		g := &pass[i]
		g.Outcome, g.Evidence = verdict{g: *g, killed: killed[i], gone: gone[i], found: found[i],
			minting: l.b.closer.isMinting(g.ID), stuck: l.b.stuck.has(g.Lease.ID), probed: l.probes(), now: now}.outcome()
	}
	for batch := range slices.Chunk(pass, batchSize) {
		rest = append(rest, l.store(batch)...)
		between()
	}
	return rest
}

// store records a batch and gives what is not over.
func (l *lane) store(batch []broker.Grant) (rest []broker.Grant) {
	ctx, cancel := context.WithTimeout(l.b.ctx, time.Minute)
	defer cancel()
	for len(batch) > 0 {
		n, err := l.record(ctx, batch)
		if err != nil {
			if l.b.ctx.Err() == nil {
				l.b.cfg.Alarm("recording what is over", err)
			}
			return append(rest, batch...)
		}
		for _, g := range batch[:n] {
			if g.State == broker.StateClosed {
				delete(l.killed, g.Token.Accessor)
			} else {
				rest = append(rest, g)
			}
		}
		batch = batch[n:]
	}
	return rest
}

// killAnswer is what Vault said to the end of a step's token.
type killAnswer struct {
	at  time.Time // when it confirmed
	err error
}

// kill revokes the steps' tokens, some at once. After Vault failed to answer one it is not
// asked for more in this pass. What it has confirmed is not asked for again by this process: a token does not come back.
func (l *lane) kill(pass []broker.Grant, between func()) []killAnswer {
	answers := make([]killAnswer, len(pass))
	var ask []int
	for i, g := range pass {
		at, confirmed := l.killed[g.Token.Accessor]
		switch {
		case confirmed:
			answers[i].at = at
		case g.Token.Accessor != "":
			ask = append(ask, i)
		default:
			answers[i].at = l.b.cfg.Now()
		}
	}
	var mu sync.Mutex // guards silent
	var silent error
	for batch := range slices.Chunk(ask, batchSize) {
		ctx, cancel := context.WithTimeout(l.b.ctx, time.Minute)
		l.each(len(batch), func(k int) {
			i := batch[k]
			mu.Lock()
			answers[i].err = silent
			mu.Unlock()
			if answers[i].err != nil {
				return
			}
			if answers[i] = l.killOne(ctx, pass[i]); answers[i].err != nil {
				mu.Lock()
				first := silent == nil
				silent = answers[i].err
				mu.Unlock()
				if first && l.b.ctx.Err() == nil {
					l.b.cfg.Alarm("revoking tokens in Vault", answers[i].err)
				}
			}
		})
		cancel()
		for _, i := range batch {
			if answers[i].err == nil {
				l.killed[pass[i].Token.Accessor] = answers[i].at
			}
		}
		if silent == nil && len(ask) > batchSize {
			between()
		}
	}
	return answers
}

func (l *lane) killOne(ctx context.Context, g broker.Grant) killAnswer {
	ctx, cancel := context.WithTimeout(ctx, l.b.cfg.MintTimeout)
	defer cancel()
	if err := l.b.cfg.Vault.Kill(ctx, g.Token.Accessor); err != nil {
		return killAnswer{err: err}
	}
	return killAnswer{at: l.b.cfg.Now()}
}

// each runs f for 0 to n-1 on the configured number of workers.
func (l *lane) each(n int, f func(i int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range min(n, l.b.cfg.Workers) {
		wg.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

func (l *lane) probes() bool {
	_, ok := l.b.cfg.Backends[l.backend].(broker.Prover)
	return ok
}

// prove asks the target. A target that does not answer proves nothing.
func (l *lane) prove(ctx context.Context, batch []broker.Grant) []broker.Evidence {
	found := make([]broker.Evidence, len(batch))
	p, ok := l.b.cfg.Backends[l.backend].(broker.Prover)
	if !ok {
		return found
	}
	answers, err := p.Prove(ctx, batch)
	if err != nil || len(answers) != len(batch) {
		for i := range found {
			found[i] = broker.Evidence{At: l.b.cfg.Now(), Check: l.backend, Answer: "the target did not answer"}
		}
		return found
	}
	return answers
}

// goneAnswer is what Vault said of a lease.
type goneAnswer struct{ asked, answered, gone bool }

func (l *lane) gone(ctx context.Context, batch []broker.Grant) []goneAnswer {
	answers := make([]goneAnswer, len(batch))
	var leases []string
	var at []int
	for i, g := range batch {
		if g.Lease.ID != "" {
			answers[i].asked = true
			leases, at = append(leases, g.Lease.ID), append(at, i)
		}
	}
	if len(leases) == 0 {
		return answers
	}
	gone, err := l.b.cfg.Vault.Gone(ctx, leases)
	if err != nil || len(gone) != len(leases) {
		return answers
	}
	for k, i := range at {
		answers[i].answered, answers[i].gone = true, gone[k]
	}
	return answers
}

// patience is how many looks Vault gets to end a lease after its token, more than a second in
// all, before the lease is revoked by name.
const patience = 7

// revokeLeft revokes leases that outlived their token. Vault writes a lease without looking at
// the token again (facts.md), so one that was written during the kill is in nobody's queue. Nor is one that
// Vault has given up, so that is given no time: each sweep hurries it anew, and its looks would never be enough.
func (l *lane) revokeLeft(ctx context.Context, batch []broker.Grant, gone []goneAnswer, taken map[broker.GrantID]dueGrant) {
	l.each(len(batch), func(i int) {
		if !gone[i].answered || gone[i].gone {
			return
		}
		if taken[batch[i].ID].attempt < patience && !l.b.stuck.has(batch[i].Lease.ID) {
			return
		}
		one, cancel := context.WithTimeout(ctx, l.b.cfg.MintTimeout)
		defer cancel()
		if err := l.b.cfg.Vault.Revoke(one, batch[i].Lease.ID); err == nil {
			gone[i].gone = true
		} else if l.b.ctx.Err() == nil {
			l.b.cfg.Alarm("revoking a lease that outlived its token", err)
		}
	})
}

// recordTime is how long one transaction of the closer goes on taking in grants. Every fence and intent waits for the
// one that is running, and its commit takes about twice as long again.
const recordTime = 2 * time.Millisecond

// record stores what was found of the first n grants of a batch, one at least: closed grants leave the live ones and
// give back their place in the budgets. A grant whose outcome is as before is not written again.
func (l *lane) record(ctx context.Context, batch []broker.Grant) (n int, err error) {
	now := l.b.cfg.Now()
	var over []broker.GrantID
	err = l.b.update(ctx, "close", func(tx broker.Tx) error {
		n, over = 0, nil
		seen, began := l.b.sight(tx), l.b.cfg.Now()
		ended := map[broker.DelegationID]int{} // how many live grants each delegation has less
		for i := range batch {
			if i > 0 && l.b.cfg.Now().Sub(began) > recordTime {
				break
			}
			g := &batch[i]
			n++
			old, ok, err := load[broker.Grant](tx, keyGrant(g.ID))
			if err != nil {
				return err
			}
			switch dead := g.Outcome == broker.OutcomeDead || g.Outcome == broker.OutcomeStatic; {
			case !ok || old.State == broker.StateClosed:
				g.State = broker.StateClosed
			case g.State != old.State:
				// An issue has moved it since it was read; the next round sees it as it is.
			case dead:
				if err := finish(seen, g, now, ended); err != nil {
					return err
				}
				over = append(over, g.ID)
			case g.Outcome != old.Outcome || old.Ending == "" || givenUp(g.Evidence) != givenUp(old.Evidence):
				if err := save(tx, keyGrant(g.ID), *g); err != nil {
					return err
				}
				if _, err := enter(tx, grantEntry(g, broker.OpEnd, now)); err != nil {
					return err
				}
			}
		}
		return giveBack(tx, ended)
	})
	if err == nil {
		l.b.closer.announce(over)
	}
	return n, err
}

// finish makes a grant CLOSED, and counts it in ended for each delegation above it.
func finish(seen *sight, g *broker.Grant, now time.Time, ended map[broker.DelegationID]int) error {
	tx := seen.tx
	p, err := seen.path("close", g.Delegation)
	if err != nil {
		return err
	}
	for _, d := range p.nodes {
		ended[d.ID]++
	}
	g.State, g.Ended = broker.StateClosed, now
	if err := save(tx, keyGrant(g.ID), *g); err != nil {
		return err
	}
	if err := tx.Put(keyLive(g.Chain, g.ID), nil); err != nil {
		return err
	}
	if err := tx.Put(keyPast(g.Chain, g.ID), []byte{}); err != nil {
		return err
	}
	if g.Ending == broker.EndingRevoked {
		if err := tx.Put(keyCut(g.Delegation, g.ID), []byte{}); err != nil {
			return err
		}
	}
	if g.Outcome == broker.OutcomeStatic { // over, and yet it works: whatever revokes it later counts it, too
		if err := tx.Put(keyStatic(g.Chain, g.ID), []byte{}); err != nil {
			return err
		}
	}
	_, err = enter(tx, grantEntry(g, broker.OpClosed, now))
	return err
}

// giveBack takes ended grants off the delegations' counts of live ones.
func giveBack(tx broker.Tx, ended map[broker.DelegationID]int) error {
	for id, n := range ended {
		u, _, err := load[Usage](tx, keyUsage(id))
		if err != nil {
			return err
		}
		u.Live = max(0, u.Live-n)
		if err := save(tx, keyUsage(id), u); err != nil {
			return err
		}
	}
	return nil
}

// grantEntry is the entry about a grant that is ending.
func grantEntry(g *broker.Grant, op broker.Op, now time.Time) broker.Entry {
	return broker.Entry{At: now, Actor: "pawl", Op: op, Chain: g.Chain, Delegation: g.Delegation, Grant: g.ID, Tool: g.Tool,
		Detail: string(g.Ending) + ", " + g.Outcome.String()}
}
