package engine

import (
	"context"
	"errors"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/requests"
	"github.com/pawlsec/pawl/broker/engine/internal/sweeping"
	"github.com/pawlsec/pawl/broker/selector"
)

// Revoke, the numbered procedure (docs/architecture.md):
//
//  1. Fence, in one transaction, and answer "fenced".                     Revoke, fence.go
//  2. Sever at the targets, in bulk, without Vault.                       start, internal/closing
//  3. Kill the delegations' tokens, then the steps' tokens and leases.    killTokens, internal/closing
//  4. Wait out the mints in flight, then sweep for orphans.               sweep
//  5. Prove, and record the evidence of each grant.                       internal/closing
//  6. Compute the closure, and record it.                                 record
//
// Steps 2 to 6 run in the background, in rounds, until the revocation has settled. A crash in any of them leaves the
// fence and the evidence recorded so far. Resume then runs the same function, since every step may be repeated.

// Revoke fences the delegations and grants that the selector matches, and returns. From then on no secret is handed out
// under the fence. Steps 2 to 6 follow in the background, and [Engine.Revocation] reports their progress. With Freeze
// only the fence is set, and operators can lift it. A repeated command returns the existing revocation, marked
// Repeated.
//
// A final rule covers the open chains. If it matches nothing that is open and no step that can still be taken, Revoke
// refuses it with CodeSelectorEmpty. A freeze by a rule covers later chains too. The field Nothing marks a rule that
// covers nothing yet.
//
// No grant handed out the value of a canary. For such a leaked value Revoke records the touch, and returns the
// revocation that policy attaches to it, or else NotFound with CodeCanaryValue.
//
// Errors: Malformed, Unauthenticated, NotFound, Conflict (the plan is stale), Unavailable.
func (e *Engine) Revoke(ctx context.Context, o broker.Operator, r selector.Request) (broker.Revocation, error) {
	const op = "revoke"
	if err := o.Check(op); err != nil {
		return broker.Revocation{}, err
	}
	if err := requests.CheckText(op, "reason", r.Reason, 1, broker.MaxTask); err != nil {
		return broker.Revocation{}, err
	}
	if rv, isCanary, err := e.touchLeaked(ctx, o, r.Selector); isCanary {
		return rv, err
	}
	var plan *comparison
	if r.Plan != "" {
		var err error
		if plan, err = e.comparePlan(ctx, r); err != nil {
			return broker.Revocation{}, err
		}
	}
	// Step 1. A crash after it leaves the fence, and a revocation for which Resume runs steps 2 to 6.
	f := fencing{by: o.Name, reason: r.Reason, selector: r.Selector.String(), freeze: r.Freeze, now: e.cfg.Now(),
		check: true}
	if _, _, _, one := r.Selector.Target(); !one {
		if err := e.view(ctx, op, func(tx *records.Tx) (err error) {
			f.matched, err = matchOf(tx, e.cfg.Policy(), r.Selector, f, e.started)
			return err
		}); err != nil {
			f.matched = nil // the transaction decides
		}
	}
	var rv broker.Revocation
	err := e.update(broker.Urgent(ctx), op, func(tx *records.Tx) (err error) {
		if f.target, err = targetOf(tx, r.Selector); err != nil {
			return err
		}
		if plan != nil {
			if err := checkGrown(tx, plan); err != nil {
				return err
			}
		}
		rv, err = e.fence(tx, f)
		return err
	})
	if broker.KindOf(err) == broker.Unavailable {
		e.reconcileUnconfirmed(rv, err)
		return broker.Revocation{}, e.endUnfenced(ctx, r, f, err)
	}
	if f.matched != nil && f.matched.refusal != nil && errors.Is(err, f.matched.refusal) {
		return broker.Revocation{}, e.past.NothingMatches(ctx, f.matched.refusal, r.Selector)
	}
	if err != nil {
		return broker.Revocation{}, err
	}
	e.reconcile(rv)
	return rv, nil
}

// reconcileOpened reconciles a revocation that was opened while its reconciler was about to end.
func (e *Engine) reconcileOpened(id broker.RevocationID) {
	var rv broker.Revocation
	err := e.view(e.ctx, "sweep", func(tx *records.Tx) (err error) { rv, _, err = tx.Revocation(id); return err })
	if err == nil && rv.ID != "" && e.ctx.Err() == nil {
		e.reconcile(rv)
	}
}

// finished reports whether nothing is left to do for a revocation: it has settled, and Vault has removed all leases.
func finished(rv broker.Revocation) bool { return rv.Freeze || !rv.Settled.IsZero() && rv.Leases == 0 }

// reconcile starts steps 2 to 6 in the background, unless this process runs them already.
func (e *Engine) reconcile(rv broker.Revocation) {
	if finished(rv) || !e.reconciling.Begin(rv.ID) {
		return
	}
	e.background(func() {
		defer func() {
			e.reconciling.End(rv.ID)
			e.reconcileOpened(rv.ID)
		}()
		r := reconciler{e: e, rv: rv, killed: map[string]bool{}}
		defer r.close()
		retry := backoff.Exponential{First: 10 * time.Millisecond, Most: 5 * time.Second}
		for e.ctx.Err() == nil {
			done, err := r.round(e.ctx)
			if err != nil {
				e.cfg.Alarm("reconciling revocation "+string(rv.ID), err)
			}
			wait := retry.Next()
			if r.delayed {
				wait = 50 * time.Millisecond
				retry.Reset() // the kills follow
			}
			if done || !e.pause(r.changed(), wait, r.minWait) {
				return
			}
		}
	})
}

// reconcileUnconfirmed is reconcile for a fence with an unknown commit. The fence may be in the ledger, and the
// requester may never ask again.
func (e *Engine) reconcileUnconfirmed(rv broker.Revocation, err error) {
	if rv.ID != "" && !errors.Is(err, broker.ErrNotCommitted) {
		e.reconcile(rv)
	}
}

// pause waits for least, and then until woken, but at most d longer. It returns false when the engine stops.
func (e *Engine) pause(woken <-chan struct{}, d, least time.Duration) bool {
	first := time.NewTimer(least)
	defer first.Stop()
	select {
	case <-e.ctx.Done():
		return false
	case <-first.C:
	}
	most := time.NewTimer(d)
	defer most.Stop()
	select {
	case <-e.ctx.Done():
		return false
	case <-woken:
	case <-most.C:
	}
	return true
}

// reconciler reconciles one revocation, from its fence to its closure.
type reconciler struct {
	e      *Engine
	rv     broker.Revocation
	stored broker.Revocation // as last read from or written to the ledger; zero: not known

	progress *closing.Progress // of the grants under the fence
	total    int               // grants under the fence at the start, static ones included
	inFlight []broker.GrantID  // grants with a mint in flight at the start
	backends map[string]bool   // of the grants at the start
	tokens   []broker.Handle   // of delegations, root first, and made ahead; after the fence there is no other
	ahead    []broker.Grant    // the tokens that were made ahead
	killed   map[string]bool   // accessors that Vault confirmed as revoked to this process

	started time.Time
	read    time.Time     // the last read of the ledger
	delayed bool          // step 3 waits for severing, or the grants must be listed again
	minWait time.Duration // between two rounds; longer with more grants left, since each round may write
	absent  bool          // the ledger does not have the revocation: see reconcileUnconfirmed
}

func (r *reconciler) close() {
	if r.progress != nil {
		r.e.progress.Delete(r.rv.ID)
		r.progress.Close()
	}
}

// Awaited lists the grants for which a revocation waits: those that are not closed, at most MaxAwaited, and of more the
// last to end. The list is empty for a settled revocation, for a freeze, and just after a restart.
//
// Errors: Unavailable.
func (e *Engine) Awaited(ctx context.Context, id broker.RevocationID) (list []broker.Awaited, err error) {
	progress, ok := e.progress.Load(id)
	if !ok {
		return nil, nil
	}
	waiting := progress.(*closing.Progress).Last(broker.MaxAwaited)
	err = e.view(ctx, "revocation", func(tx *records.Tx) error {
		list = nil
		for _, w := range waiting {
			g, ok, err := tx.Grant(w.ID)
			if err != nil {
				return err
			}
			if ok && g.State != broker.StateClosed {
				list = append(list, broker.Awaited{Grant: g.ID, Chain: g.Chain, Tool: g.Tool, Backend: g.Backend,
					Why: w.Why, Until: w.Until})
			}
		}
		return nil
	})
	return list, err
}

func (r *reconciler) changed() <-chan struct{} {
	if r.progress == nil {
		return nil
	}
	return r.progress.Changed
}

// round runs steps 2 to 6 once, as far as they can go now. done: the revocation has settled, and no lease is left.
func (r *reconciler) round(ctx context.Context) (done bool, err error) {
	r.delayed = false
	if r.progress == nil {
		err = r.start(ctx)
	} else if r.e.cfg.Now().Sub(r.read) > rereadEvery {
		err = r.reread(ctx)
	}
	if err != nil || r.absent {
		return r.absent && r.e.cfg.Now().Sub(r.rv.Fenced) > r.e.cfg.MintTimeout, err
	}
	counts := r.progress.Counts()
	counts.Total = r.total
	r.minWait = 5*time.Millisecond + time.Duration(counts.Left)*50*time.Microsecond
	if counts.Left == 0 && r.rv.Unswept {
		if err := r.sweep(ctx); err != nil {
			r.e.cfg.Alarm("sweeping for "+string(r.rv.ID), err)
		}
	}
	return r.record(ctx, counts, r.killTokens(ctx))
}

// start is step 2. It lists the grants and delegations under the fence, which none can join any more. It gives the
// grants to the workers of their backends. These sever, kill and prove (steps 2, 3 and 5).
//
// A crash after step 2 leaves severed logins of which the ledger has no evidence. The next process severs them again.
func (r *reconciler) start(ctx context.Context) error {
	var grants []broker.Grant
	var static []broker.GrantID
	var leftovers []broker.Grant
	var nodes []broker.Delegation
	err := r.e.view(ctx, "revoke", func(tx *records.Tx) error {
		_, ok, err := tx.Revocation(r.rv.ID)
		if r.absent = err == nil && !ok; err != nil || !ok {
			return err
		}
		if grants, nodes, err = tx.Under(r.rv); err != nil {
			return err
		}
		if r.ahead, err = tx.AheadUnder(r.rv); err != nil {
			return err
		}
		if static, err = tx.StaticUnder(r.rv); err != nil {
			return err
		}
		leftovers, err = tx.LeftoversUnder(r.rv)
		return err
	})
	if err != nil || r.absent {
		return err
	}
	r.tokens = tokensOf(nodes, r.ahead)
	r.total, r.backends, r.started = len(grants)+len(static), map[string]bool{}, r.e.cfg.Now()
	for _, g := range grants {
		r.backends[g.Backend] = true
		if g.State == broker.StateHandle && g.Lease.Expires.IsZero() && !g.NothingMade {
			r.inFlight, r.rv.Unswept = append(r.inFlight, g.ID), true
		}
	}
	r.progress = r.e.reaper.Follow(grants, static, leftovers)
	r.e.progress.Store(r.rv.ID, r.progress)
	r.e.reaper.EndFenced(grants)
	return r.reread(ctx) // a worker may have closed a grant between the view and Follow
}

// rereadEvery is how often the progress is compared with the ledger, in addition to the workers' reports.
const rereadEvery = 5 * time.Second

// reread updates the progress from the ledger, which is authoritative.
func (r *reconciler) reread(ctx context.Context) error {
	r.read = r.e.cfg.Now()
	closed := map[broker.GrantID]closing.Found{}
	var removed []broker.GrantID
	err := r.e.view(ctx, "revoke", func(tx *records.Tx) error {
		clear(closed)
		removed = nil
		now, _, err := tx.Revocation(r.rv.ID)
		if err != nil {
			return err
		}
		if now.Alive != r.rv.Alive { // a sweep has made grants live again, and record starts anew
			r.stored = broker.Revocation{}
		}
		for id, f := range r.progress.Left() {
			live, static, err := tx.LiveOrStatic(f.Chain, id)
			if err != nil {
				return err
			}
			left, err := tx.HasLeftover(f.Chain, id)
			if err != nil {
				return err
			}
			switch {
			case live:
			case static:
				closed[id] = closing.Found{Chain: f.Chain, Outcome: broker.OutcomeStatic}
			default:
				closed[id] = closing.Found{Chain: f.Chain, Outcome: broker.OutcomeDead, Leftover: left}
			}
		}
		for id, chain := range r.progress.Leftovers() {
			left, err := tx.HasLeftover(chain, id)
			if err != nil {
				return err
			}
			if !left {
				removed = append(removed, id)
			}
		}
		return nil
	})
	for id, f := range closed {
		r.progress.Report(id, f, true)
	}
	for _, id := range removed {
		r.progress.Removed(id)
	}
	return err
}

// headStart is how long severing may delay the kill of the delegations' tokens. After the kill Vault revokes the leases
// below one by one, at the same database. Each revocation would lock its login against the bulk.
const headStart = 2 * time.Second

// tokensOf returns the tokens of delegations, and those that were made ahead below them.
func tokensOf(nodes []broker.Delegation, madeAhead []broker.Grant) (tokens []broker.Handle) {
	for _, d := range nodes {
		tokens = append(tokens, d.Tokens...)
	}
	for _, g := range madeAhead {
		tokens = append(tokens, g.Token)
	}
	return tokens
}

// killTokens is step 3 for the delegations. It kills their tokens, root first: where Vault can, one call ends the whole
// subtree. Those that were made ahead follow. It returns the number of tokens without a confirmation. The workers kill
// the steps' tokens and leases. A token past its end needs no kill, once EndTolerance has passed for Vault's clock and
// its whole seconds.
//
// A crash after it leaves dead tokens of which the ledger has no record. The next process kills them again, which Vault
// confirms.
func (r *reconciler) killTokens(ctx context.Context) (pending int) {
	now := r.e.cfg.Now()
	r.delayed = len(r.tokens) > 0 && now.Sub(r.started) < headStart && r.e.reaper.Severing(r.backends)
	for _, t := range r.tokens {
		if r.killed[t.Accessor] || !t.Expires.IsZero() && now.After(t.Expires.Add(broker.EndTolerance)) {
			continue
		}
		if _, limited := r.e.reaper.Limited(); r.delayed || pending > 0 || limited != nil {
			pending++ // for a later round: after one failed call Vault gets no more in this round
			continue
		}
		killCtx, cancel := context.WithTimeout(ctx, r.e.cfg.MintTimeout)
		err := r.e.cfg.Vault.Kill(killCtx, t.Accessor)
		cancel()
		if err != nil {
			r.e.reaper.Limit(err)
			r.e.cfg.Alarm("revoking the tokens of "+string(r.rv.ID), err)
			pending++
			continue
		}
		r.killed[t.Accessor] = true
	}
	if pending == 0 {
		r.e.ahead.Recorded(true, r.ahead...)
		r.ahead = nil
	}
	return pending
}

// sweep is step 4. It runs when every grant is closed, which includes that no mint can complete any more. A mint with a
// lost answer may have left an orphaned lease or login.
//
// A crash after it leaves the revocation Unswept. The next process no longer knows the mints, and sweeps all paths.
func (r *reconciler) sweep(ctx context.Context) error {
	var lost []broker.Grant
	err := r.e.view(ctx, "revoke", func(tx *records.Tx) error {
		lost = nil
		for _, id := range r.inFlight {
			g, _, err := tx.Grant(id)
			if err != nil {
				return err
			}
			if g.Lease.Expires.IsZero() && g.Token.Accessor != "" && !g.NothingMade {
				lost = append(lost, g)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if len(r.inFlight) > 0 && len(lost) == 0 {
		r.rv.Unswept = false
		return nil
	}
	done, err := r.e.sweeper.After(ctx, lost, r.rv.Fenced)
	r.rv.Unswept = !done
	return err
}

// record is step 6: it computes the counts and the closure, and records them when they changed. pending counts tokens.
// A revocation has settled when every grant is closed, every token is dead and the sweep is done. It is done when Vault
// has removed the leases too.
//
// A crash before it leaves the previous closure, and the next process computes it again. After a settled closure,
// Resume has no work left.
func (r *reconciler) record(ctx context.Context, counts closing.Counts, pending int) (done bool, err error) {
	now := r.e.cfg.Now()
	recounted := func(rv broker.Revocation) broker.Revocation {
		rv.Tokens, rv.Unswept = pending, r.rv.Unswept
		counts.Apply(&rv)
		settled := counts.Left == 0 && pending == 0 && !rv.Unswept
		if settled && rv.Settled.IsZero() {
			rv.Settled = now
		}
		done = settled && rv.Leases == 0
		return rv
	}
	// Without this check, hundreds of revocations that wait for Vault would write in each round and delay new fences.
	if r.stored.ID != "" && recounted(r.stored) == r.stored {
		return done, nil
	}
	opened := false // by a sweep, which has made grants live again
	err = r.e.update(ctx, "revoke", func(tx *records.Tx) error {
		before, ok, err := tx.Revocation(r.rv.ID)
		if err != nil || !ok {
			return orNotFound(err, records.UnknownRevocation("revoke"))
		}
		if opened = before.Alive != r.rv.Alive; opened {
			before.Unswept = before.Unswept || r.rv.Unswept
			r.rv = before
			return nil
		}
		rv := recounted(before)
		if r.rv = rv; before == rv {
			return nil
		}
		if err := tx.PutRevocation(rv); err != nil {
			return err
		}
		op := broker.OpEvidence
		if before.Closure != rv.Closure {
			op = broker.OpClosure
		}
		_, err = tx.Enter(broker.Entry{At: now, Actor: "pawl", Op: op, Chain: rv.Chain, Delegation: rv.Node,
			Revocation: rv.ID, Detail: closing.FormatTally(rv)})
		return err
	})
	if opened { // list the grants again
		r.close()
		r.progress, r.delayed = nil, true
	}
	if err != nil || opened {
		r.stored = broker.Revocation{}
		return false, err
	}
	r.stored = r.rv
	return done, nil
}

// endUnfenced ends the known grants when the ledger cannot record the fence: revoking works when everything else is
// broken. Issuing has stopped with the ledger, so no other grants exist. The operator must repeat the command, since no
// fence is recorded.
func (e *Engine) endUnfenced(ctx context.Context, r selector.Request, f fencing, cause error) error {
	if r.Freeze {
		return cause
	}
	endCtx, cancel := detached(ctx, 30*time.Second)
	defer cancel()
	var grants, madeAhead []broker.Grant
	var nodes []broker.Delegation
	err := e.view(endCtx, "revoke", func(tx *records.Tx) (err error) {
		if f.target, err = targetOf(tx, r.Selector); err != nil {
			return err
		}
		rv := broker.Revocation{Selector: f.selector, Node: f.target.node, Grant: f.target.grant, Fenced: f.now}
		if grants, nodes, err = tx.Under(rv); err != nil {
			return err
		}
		madeAhead, err = tx.AheadUnder(rv)
		return err
	})
	if err != nil {
		return cause
	}
	failed := e.endWithoutLedger(endCtx, grants, tokensOf(nodes, madeAhead))
	return broker.Errorf(broker.Unavailable, "revoke", "the ledger cannot record the fence: %d known secrets were "+
		"severed and killed without a record, %d calls failed; once the ledger is back, nothing prevents new ones",
		len(grants), failed).
		With(broker.CodeLedgerDown).Because(cause).Lacks("repeat the command until it is acknowledged", "ledger")
}

// endWithoutLedger severs and kills without a read of the ledger. It returns the number of failed calls.
func (e *Engine) endWithoutLedger(ctx context.Context, grants []broker.Grant, tokens []broker.Handle) (failed int) {
	by := map[string][]broker.Grant{}
	for _, g := range grants {
		by[g.Backend] = append(by[g.Backend], g)
		if g.Token.Accessor != "" {
			tokens = append(tokens, g.Token)
		}
	}
	for name, part := range by {
		if severer, ok := e.cfg.Backends[name].(broker.Severer); ok && severer.Sever(ctx, part) != nil {
			failed++
		}
	}
	for _, t := range tokens {
		if e.cfg.Vault.Kill(ctx, t.Accessor) != nil {
			failed++
		}
	}
	return failed
}

// Orphans counts the orphaned leases and logins that a sweep ended.
type Orphans = sweeping.Orphans

// Sweep compares the leases in Vault and the logins at the backends with the ledger, and ends the orphans. It is step 4
// of Revoke for all paths, and runs on a schedule too.
func (e *Engine) Sweep(ctx context.Context) (Orphans, error) { return e.sweeper.Sweep(ctx, true) }

// Irrevocable counts the leases of grants that Vault has given up revoking, as of the last sweep. The broker retries
// each of them, and an operator must find the cause.
func (e *Engine) Irrevocable() int { return e.reaper.GivenUp() }
