package engine

import (
	"context"
	"errors"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/selector"
)

// Revoke, the numbered procedure (docs/architecture.md):
//
//  1. Fence, in one transaction, and answer "fenced".                        Revoke, fence.go
//  2. Sever at the targets, in bulk, without Vault.                          begin, closing
//  3. Kill the delegations' tokens, then the steps' tokens and leases.       killTokens, closing
//  4. Wait out the mints under way, then sweep for what the ledger lacks.    sweep
//  5. Prove, and record the evidence of each grant.                          closing
//  6. Work out the closure, and record it.                                   record
//
// Steps 2 to 6 run in the background. Resume starts them for every revocation that has not settled: it is the same function.

// Revoke fences what the selector selects, and returns. From then on nothing under it is handed out. Severing and proving
// follow in the background; [Engine.Revocation] tells how far they are. With Freeze nothing is severed, and an operator
// can lift it. A repeated command is answered with the existing revocation, marked Repeated.
//
// A final rule covers what is open. One that matches nothing open, and no step that can still be taken, is refused with
// CodeSelectorEmpty. A freeze by a rule covers later chains as well; Nothing says that it covers nothing yet.
//
// A leaked value that is a canary's was handed out by no grant. It is recorded as touched, and the answer is the
// revocation that policy attaches to it; where there is none, NotFound with CodeCanaryValue.
//
// Errors: Malformed, Unauthenticated, NotFound, Conflict (the plan is stale), Unavailable.
func (e *Engine) Revoke(ctx context.Context, o broker.Operator, r selector.Request) (broker.Revocation, error) {
	const op = "revoke"
	if err := o.Check(op); err != nil {
		return broker.Revocation{}, err
	}
	if err := checkText(op, "reason", r.Reason, 1, broker.MaxTask); err != nil {
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
	// Step 1. A crash after it leaves a fence, whose steps 2 to 6 the next process does.
	f := fencing{by: o.Name, reason: r.Reason, selector: r.Selector.String(), freeze: r.Freeze, now: e.cfg.Now(), check: true}
	var rv broker.Revocation
	err := e.update(ctx, op, func(tx *records.Tx) (err error) {
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
	if err != nil {
		return broker.Revocation{}, err
	}
	e.reconcile(rv)
	return rv, nil
}

// reconcile starts steps 2 to 6 in the background, unless this process is at work on them.
func (e *Engine) reconcile(rv broker.Revocation) {
	if rv.Freeze || !rv.Settled.IsZero() || !e.reconciling.Begin(rv.ID) {
		return
	}
	e.background(func() {
		defer e.reconciling.End(rv.ID)
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
				retry.Reset() // the kills begin after that
			}
			if done || !e.pause(r.changed(), wait, r.minWait) {
				return
			}
		}
	})
}

// reconcileUnsure is reconcile for a fence that the ledger failed to acknowledge. It may have been recorded all the same,
// and the requester may never ask again.
func (e *Engine) reconcileUnconfirmed(rv broker.Revocation, err error) {
	if rv.ID != "" && !errors.Is(err, broker.ErrNotCommitted) {
		e.reconcile(rv)
	}
}

// pause waits until woken, for at least least and at most d longer; false means that the broker stops.
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

// reconciler carries one revocation from its fence to its closure.
type reconciler struct {
	e      *Engine
	rv     broker.Revocation
	stored broker.Revocation // as the ledger is known to have it; zero: not known

	progress *closing.Progress   // of the grants under the fence
	total    int                 // grants under the fence, static ones included, when it began
	inFlight []broker.GrantID    // whose mint was under way then
	backends map[string]bool     // of the grants then
	nodes    []broker.Delegation // with tokens, root first; after the fence none gets another
	killed   map[string]bool     // accessors whose end Vault confirmed to this process

	started time.Time
	read    time.Time     // when the ledger was read last
	delayed bool          // step 3 waits for the targets
	minWait time.Duration // between two rounds: each may write, and more so the more is left
	absent  bool          // the ledger does not have the revocation: see reconcileUnsure
}

func (r *reconciler) close() {
	if r.progress != nil {
		r.progress.Close()
	}
}

func (r *reconciler) changed() <-chan struct{} {
	if r.progress == nil {
		return nil
	}
	return r.progress.Changed
}

// round finds what is left, has it ended, and records the closure when it changed.
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
	t := tally{total: r.total}
	t.left, t.alive, t.static, t.latest = r.progress.Count()
	r.minWait = 5*time.Millisecond + time.Duration(t.left)*50*time.Microsecond
	if t.left == 0 && r.rv.Unswept {
		if err := r.sweep(ctx); err != nil {
			r.e.cfg.Alarm("sweeping for "+string(r.rv.ID), err)
		}
	}
	return r.record(ctx, t, r.killTokens(ctx))
}

// begin is step 2: it lists what the fence covers, which nothing can join any more, and gives it to the workers.
func (r *reconciler) start(ctx context.Context) error {
	var grants []broker.Grant
	var static []broker.GrantID
	err := r.e.view(ctx, "revoke", func(tx *records.Tx) error {
		_, ok, err := tx.Revocation(r.rv.ID)
		if r.absent = err == nil && !ok; err != nil || !ok {
			return err
		}
		if grants, r.nodes, err = tx.Under(r.rv); err != nil {
			return err
		}
		static, err = tx.StaticUnder(r.rv)
		return err
	})
	if err != nil || r.absent {
		return err
	}
	r.total, r.backends, r.started = len(grants)+len(static), map[string]bool{}, r.e.cfg.Now()
	for _, g := range grants {
		r.backends[g.Backend] = true
		if g.State == broker.StateHandle && g.Lease.Expires.IsZero() {
			r.inFlight, r.rv.Unswept = append(r.inFlight, g.ID), true
		}
	}
	r.progress = r.e.reaper.Follow(grants, static)
	r.e.reaper.EndFenced(grants)
	return r.reread(ctx) // what was closed between reading and following was reported to no follower
}

// rereadEvery is how often the ledger is read for what a worker reports anyway.
const rereadEvery = 5 * time.Second

// reread compares the progress with the ledger, which decides.
func (r *reconciler) reread(ctx context.Context) error {
	r.read = r.e.cfg.Now()
	closed := map[broker.GrantID]broker.Outcome{}
	err := r.e.view(ctx, "revoke", func(tx *records.Tx) error {
		clear(closed)
		for id, f := range r.progress.Left() {
			live, static, err := tx.LiveOrStatic(f.Chain, id)
			if err != nil {
				return err
			}
			switch {
			case live:
			case static:
				closed[id] = broker.OutcomeStatic
			default:
				closed[id] = broker.OutcomeDead
			}
		}
		return nil
	})
	for id, outcome := range closed {
		r.progress.Report(id, closing.Found{Outcome: outcome}, true)
	}
	return err
}

// headStart is how long severing may delay the end of the delegations' tokens. Vault would use that time to end what is
// below them one by one, over the same database, and lock a login out of the bulk for as long as that takes.
const headStart = 2 * time.Second

// killTokens is step 3 for the delegations: their tokens end, root first, so that what is below ends with one call where
// Vault can do it. It gives how many are not confirmed yet. The workers end the steps' tokens and leases.
func (r *reconciler) killTokens(ctx context.Context) (pending int) {
	now := r.e.cfg.Now()
	r.delayed = len(r.nodes) > 0 && now.Sub(r.started) < headStart && r.e.reaper.Severing(r.backends)
	for _, d := range r.nodes {
		for _, t := range d.Tokens {
			if r.killed[t.Accessor] || !t.Expires.IsZero() && now.After(t.Expires) {
				continue
			}
			if r.delayed || pending > 0 {
				pending++ // later; or Vault has just not answered, and is not asked a thousand times more
				continue
			}
			killCtx, cancel := context.WithTimeout(ctx, r.e.cfg.MintTimeout)
			err := r.e.cfg.Vault.Kill(killCtx, t.Accessor)
			cancel()
			if err != nil {
				r.e.cfg.Alarm("revoking the tokens of "+string(r.rv.ID), err)
				pending++
				continue
			}
			r.killed[t.Accessor] = true
		}
	}
	return pending
}

// sweep is step 4, once nothing is left: mints that were under way at the fence, and whose answer never came, may have
// left what the ledger does not know.
func (r *reconciler) sweep(ctx context.Context) error {
	var lost []broker.Grant
	err := r.e.view(ctx, "revoke", func(tx *records.Tx) error {
		lost = nil
		for _, id := range r.inFlight {
			g, _, err := tx.Grant(id)
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
	if len(r.inFlight) > 0 && len(lost) == 0 {
		r.rv.Unswept = false
		return nil
	}
	done, err := sweeper{r.e}.sweepAfter(ctx, lost, r.rv.Fenced)
	r.rv.Unswept = !done
	return err
}

// record is step 6: it works out the counts and the closure, and stores them when they changed. A revocation has settled
// when nothing is left that work or time can change. pending counts tokens.
func (r *reconciler) record(ctx context.Context, t tally, pending int) (done bool, err error) {
	now := r.e.cfg.Now()
	recounted := func(rv broker.Revocation) broker.Revocation {
		rv.Tokens, rv.Unswept = pending, r.rv.Unswept // first: the closure counts them
		recount(&rv, t)
		done = t.left == 0 && pending == 0 && !rv.Unswept
		if done && rv.Settled.IsZero() {
			rv.Settled = now
		}
		return rv
	}
	// Without this, hundreds that wait for a Vault that is down would keep the ledger from those who fence.
	if r.stored.ID != "" && recounted(r.stored) == r.stored {
		return done, nil
	}
	err = r.e.update(ctx, "revoke", func(tx *records.Tx) error {
		before, ok, err := tx.Revocation(r.rv.ID)
		if err != nil || !ok {
			return orNotFound(err, records.UnknownRevocation("revoke"))
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
		_, err = tx.Enter(broker.Entry{At: now, Actor: "pawl", Op: op, Chain: rv.Chain, Delegation: rv.Node, Revocation: rv.ID,
			Detail: tallyText(rv)})
		return err
	})
	if err != nil {
		r.stored = broker.Revocation{}
		return false, err // a closure that was not recorded is worked out again
	}
	r.stored = r.rv
	return done, nil
}

// endUnrecorded does what can be done when the ledger takes no fence. Issuing has stopped with it, so what is known is
// all there is, and it is ended now: revoking works when everything else is broken. The command must be repeated, since
// nothing keeps the fence.
func (e *Engine) endUnfenced(ctx context.Context, r selector.Request, f fencing, cause error) error {
	if r.Freeze {
		return cause
	}
	clean, cancel := detached(ctx, 30*time.Second)
	defer cancel()
	var grants []broker.Grant
	var nodes []broker.Delegation
	err := e.view(clean, "revoke", func(tx *records.Tx) (err error) {
		if f.target, err = targetOf(tx, r.Selector); err != nil {
			return err
		}
		grants, nodes, err = tx.Under(broker.Revocation{Selector: f.selector, Node: f.target.node, Grant: f.target.grant, Fenced: f.now})
		return err
	})
	if err != nil {
		return cause
	}
	failed := e.endWithoutLedger(clean, grants, nodes)
	return broker.Errorf(broker.Unavailable, "revoke", "the ledger takes no fence: %d secrets known to it were cut without a record, %d calls failed; nothing keeps later ones from being handed out once the ledger is back", len(grants), failed).
		With(broker.CodeLedgerDown).Because(cause).Lacks("repeat the command until it is acknowledged", "ledger")
}

// endWithoutLedger severs and kills without reading the ledger, and gives how many calls failed.
func (e *Engine) endWithoutLedger(ctx context.Context, grants []broker.Grant, nodes []broker.Delegation) (failed int) {
	by := map[string][]broker.Grant{}
	var tokens []broker.Handle
	for _, d := range nodes {
		tokens = append(tokens, d.Tokens...)
	}
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
