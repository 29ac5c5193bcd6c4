package closing

import (
	"cmp"
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// worker ends the grants of one backend.
type worker struct {
	r       *Reaper
	backend string
	sever   *queue // grants to sever

	// Grants to kill and prove, after the attempt to sever them. Small sets go to quick and large ones to bulk, and
	// both run concurrently. An agent's own Close must not wait for the revocation of another chain.
	quick, bulk *queue

	mu     sync.Mutex           // guards killed
	killed map[string]time.Time // the time of Vault's confirmation, by accessor, until the grant is closed
}

func newWorker(r *Reaper, backend string) *worker {
	return &worker{r: r, backend: backend, sever: newQueue(), quick: newQueue(), bulk: newQueue(),
		killed: map[string]time.Time{}}
}

func (w *worker) push(ds []Due) {
	var toSever, toClose []Due
	for _, d := range ds {
		if d.attempt == 0 || d.alive {
			toSever = append(toSever, d)
		} else {
			toClose = append(toClose, d)
		}
	}
	w.sever.push(toSever)
	w.pushClose(toClose)
}

func (w *worker) pushClose(ds []Due) {
	if len(ds) <= batchSize {
		w.quick.push(ds)
	} else {
		w.bulk.push(ds)
	}
}

// runSever is step 2 of Revoke: it severs all queued grants in bulk, without Vault.
func (w *worker) runSever() {
	for w.await(w.sever) {
		taken := w.sever.take()
		grants := w.grantsToEnd(taken)
		if s, ok := w.r.cfg.Backends[w.backend].(broker.Severer); ok && len(grants) > 0 {
			ctx, cancel := context.WithTimeout(w.r.cfg.Context, 30*time.Second)
			if err := s.Sever(ctx, grants); err != nil {
				w.alarm("severing at "+w.backend, err) // continue: Vault may end them
			}
			cancel()
		}
		severed := make([]Due, len(grants))
		for i, g := range grants {
			severed[i] = Due{ID: g.ID, attempt: max(taken[g.ID].attempt, 1)}
		}
		w.pushClose(severed)
		w.sever.done()
	}
}

// alarm raises an alarm, unless the engine stops.
func (r *Reaper) alarm(op string, err error) {
	if r.cfg.Context.Err() == nil {
		r.cfg.Alarm(op, err)
	}
}

func (w *worker) alarm(op string, err error) { w.r.alarm(op, err) }

func (w *worker) await(q *queue) bool {
	select {
	case <-w.r.cfg.Context.Done():
		return false
	case <-q.wake:
		return true
	}
}

// grantsToEnd returns the due grants that must end now. It reads those that were enqueued without their record. A grant
// that need not end yet was due too early, because the clock was ahead: it is scheduled again for its expiry. The order
// is that of values.
func (w *worker) grantsToEnd(due map[broker.GrantID]Due) (grants []broker.Grant) {
	now := w.r.cfg.Now()
	var notYet []Due
	err := w.r.cfg.View(w.r.cfg.Context, "close", func(tx *records.Tx) error {
		grants, notYet = nil, nil
		for _, d := range values(due) {
			if d.grant != nil {
				grants = append(grants, *d.grant)
				continue
			}
			g, ok, err := tx.Grant(d.ID)
			if err != nil {
				return err
			}
			if !ok || g.State == broker.StateClosed {
				w.r.asked.End(d.ID)
				continue
			}
			must, err := w.r.MustEnd(tx, &g, now)
			if err != nil {
				return err
			}
			if must {
				grants = append(grants, g)
			} else {
				notYet = append(notYet, Due{At: g.Expires, ID: d.ID, Backend: w.backend})
			}
		}
		return nil
	})
	w.r.cfg.Discard(grants)
	if err != nil && w.r.cfg.Context.Err() == nil {
		w.alarm("reading grants that must end", err)
		spread := rand.Float64()
		for id, d := range due {
			w.r.schedule(w.retry(id, d.attempt, spread))
		}
		return nil
	}
	for _, d := range notYet {
		w.r.schedule(d)
	}
	return grants
}

// MustEnd reports whether a grant that is not closed must end now, and puts the reason in g.Ending.
func (r *Reaper) MustEnd(tx *records.Tx, g *broker.Grant, now time.Time) (bool, error) {
	if g.Ending != "" {
		return true, nil
	}
	if g.Fence != nil && !g.Fence.Frozen {
		g.Ending = broker.EndingRevoked
		return true, nil
	}
	l, err := tx.Lineage("close", g.Delegation)
	if err != nil {
		return false, err
	}
	f, err := tx.FenceOver(l, l.Subject(*g))
	switch {
	case err != nil:
		return false, err
	case f != nil && !f.Frozen:
		g.Ending = broker.EndingRevoked
	case !now.Before(g.Expires):
		g.Ending = broker.EndingExpired
	case r.asked.Has(g.ID):
		g.Ending = broker.EndingClosed
	case r.cfg.Undeliverable(g), r.lost.Has(g.ID):
		g.Ending = broker.EndingFailed
	case g.State != broker.StateIssued && !r.IsMinting(g.ID):
		g.Ending = broker.EndingFailed // the process that was issuing it is gone
	}
	return g.Ending != "", nil
}

// batchSize is the number of grants that are killed together, and then recorded together. A set up to this size is
// small.
const batchSize = 200

// passSize is the number of grants that are proven together. A query for many leases, or for many secrets at their
// target, costs little more than a query for a few.
const passSize = 10 * batchSize

// runClose is steps 3 to 5 of Revoke for the grants of one queue.
func (w *worker) runClose(q *queue) {
	for w.await(q) {
		taken := q.take()
		if q == w.quick && len(taken) > batchSize { // many small sets make a large one
			w.bulk.push(values(taken))
			taken = nil
		}
		for pass := range slices.Chunk(values(taken), passSize) {
			if w.r.cfg.Context.Err() == nil {
				w.closePass(pass)
			}
		}
		q.done()
	}
}

// values returns the due grants in the order of their ids. Neighbours share the pages of the ledger: two hundred grants
// in any order are six hundred pages in one commit, for which every fence waits.
func values(due map[broker.GrantID]Due) []Due {
	return slices.SortedFunc(maps.Values(due), func(a, b Due) int { return cmp.Compare(a.ID, b.ID) })
}

// closePass closes the grants of a pass that can be closed. It schedules the others for about the same time, so that
// the next check is one pass again.
func (w *worker) closePass(pass []Due) {
	taken := make(map[broker.GrantID]Due, len(pass))
	for _, d := range pass {
		taken[d.ID] = d
	}
	grants := w.grantsToEnd(taken)
	if len(grants) == 0 {
		return
	}
	spread := rand.Float64()
	for _, g := range w.closeProven(grants, taken) {
		due := w.retry(g.ID, taken[g.ID].attempt, spread)
		due.alive = w.isAlive(g)
		if settles := g.MintDeadline.Add(time.Millisecond); settles.After(w.r.cfg.Now()) && settles.Before(due.At) {
			due.At = settles // from then on no mint can be in flight
		}
		if again, err := w.r.Limited(); err != nil && due.At.Before(again) {
			due.At = again
		}
		w.r.schedule(due)
	}
}

// closeProven kills and proves the grants of a pass, closes the proven ones, and returns the others.
func (w *worker) closeProven(pass []broker.Grant, taken map[broker.GrantID]Due) (rest []broker.Grant) {
	killed := w.kill(pass)
	ctx, cancel := context.WithTimeout(w.r.cfg.Context, time.Minute)
	defer cancel()
	asked := w.servers()
	found := w.prove(ctx, pass)
	gone := w.leasesGone(ctx, pass, killed, found)
	w.revokeLeft(ctx, pass, gone, taken)
	now := w.r.cfg.Now()
	for i := range pass {
		g := &pass[i]
		g.Outcome, g.Evidence = verdict{g: *g, killed: killed[i], gone: gone[i], found: found[i],
			minting: w.r.IsMinting(g.ID), givenUp: w.r.isGivenUp(g.Lease.ID), probed: w.probes(), now: now}.outcome()
	}
	for batch := range slices.Chunk(pass, batchSize) {
		rest = append(rest, w.store(batch, asked)...)
	}
	return rest
}

// isAlive reports whether the target has not shown that the grant's secret is dead. The target was down when the worker
// severed, or the secret was created after that: the next check severs again.
func (w *worker) isAlive(g broker.Grant) bool {
	n := len(g.Evidence)
	return n > 0 && w.probes() && g.Evidence[n-1].Outcome != broker.OutcomeDead
}

// retry schedules the next check with exponential backoff. The first delays are short, since Vault has usually only
// queued the revocation. spread, from 0 to 1, is jitter: it separates the checks of different backends.
func (w *worker) retry(id broker.GrantID, attempt int, spread float64) Due {
	series := backoff.Exponential{First: 10 * time.Millisecond, Most: 10 * time.Second}
	wait := series.At(attempt)
	wait += time.Duration(spread * float64(wait/2))
	return Due{At: w.r.cfg.Now().Add(wait), ID: id, Backend: w.backend, attempt: attempt + 1}
}
