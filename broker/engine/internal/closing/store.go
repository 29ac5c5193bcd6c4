package closing

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// store records a batch and returns the grants that are not closed. asked is the count of servers
// before the target was asked about them. It waits until the records are durable only where an agent waits for them:
// everything else that ends is dead by what is durable already, a fence or its own end, and a crash has it ended again.
func (w *worker) store(batch []broker.Grant, asked int) (rest []broker.Grant) {
	ctx, cancel := context.WithTimeout(w.r.cfg.Context, time.Minute)
	defer cancel()
	for len(batch) > 0 {
		n, err := w.record(ctx, batch, asked)
		if err != nil {
			w.alarm(opRecord, err)
			return append(rest, batch...)
		}
		for _, g := range batch[:n] {
			if g.State != broker.StateClosed {
				rest = append(rest, g)
			}
		}
		batch = batch[n:]
	}
	return rest
}

const opRecord = "recording closed grants"

// recorded takes note of grants whose records are durable.
func (w *worker) recorded(grants []broker.Grant) {
	w.mu.Lock()
	for _, g := range grants {
		if g.State == broker.StateClosed {
			delete(w.killed, g.Token.Accessor)
		}
		if g.Ending != "" {
			w.r.asked.End(g.ID)
		}
	}
	w.mu.Unlock()
	w.r.addLeftovers(grants)
	w.r.report(grants)
}

// lostRecord has the grants checked again whose records the ledger has failed to write.
func (w *worker) lostRecord(grants []broker.Grant, err error) {
	w.alarm(opRecord, err)
	spread := rand.Float64()
	for _, g := range grants {
		w.r.schedule(w.retry(g.ID, 1, spread))
	}
}

// awaited reports whether an agent waits for the end of one of the grants.
func (r *Reaper) awaited(grants []broker.Grant) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(grants, func(g broker.Grant) bool {
		return len(r.waiting[g.ID]) > 0 || r.asked.Has(g.ID)
	})
}

// recordTime bounds the time in which one transaction of a worker adds grants. Every fence and intent waits for the
// running transaction, and the commit takes about twice as long again.
const recordTime = 2 * time.Millisecond

// record stores the outcomes of the first n grants of a batch, at least one. A closed grant leaves the live ones and
// returns its place in the budgets. A grant with an unchanged outcome is not written again.
func (w *worker) record(ctx context.Context, batch []broker.Grant, asked int) (n int, err error) {
	const op = "close"
	now := w.r.cfg.Now()
	write := func(tx *records.Tx) error {
		n = 0
		w.discardOld(batch, asked)
		began := w.r.cfg.Now()
		ended := map[broker.DelegationID]int{} // closed grants by delegation
		for i := range batch {
			if i > 0 && w.r.cfg.Now().Sub(began) > recordTime {
				break
			}
			n++
			if err := recordOne(tx, &batch[i], now, ended); err != nil {
				return err
			}
		}
		return tx.GiveBack(ended)
	}
	if w.r.awaited(batch) {
		if err = w.r.cfg.Update(ctx, op, write); err == nil {
			w.recorded(batch[:n])
		}
		return n, err
	}
	err = w.r.cfg.Order(ctx, op, write, func(err error) {
		if err != nil {
			w.lostRecord(batch[:n], err)
		} else {
			w.recorded(batch[:n])
		}
	})
	return n, err
}

// servers counts the servers that have taken the place of the worker's target.
func (w *worker) servers() int {
	w.r.mu.Lock()
	defer w.r.mu.Unlock()
	return w.r.replaced[w.backend]
}

// discardOld makes unknown what was proven dead at a server whose place another one has taken since. asked is the count
// of servers before the proof.
func (w *worker) discardOld(batch []broker.Grant, asked int) {
	if asked == w.servers() || !w.probes() {
		return
	}
	for i := range batch {
		g := &batch[i]
		if n := len(g.Evidence); n > 0 && g.Outcome == broker.OutcomeDead && g.State != broker.StateIntent {
			g.Outcome, g.Evidence[n-1].Outcome = broker.OutcomeUnknown, broker.OutcomeUnknown
			g.Evidence[n-1].Final = false
			g.Evidence[n-1].Answer += "; another server may have taken its place since"
		}
	}
}

func recordOne(tx *records.Tx, g *broker.Grant, now time.Time, ended map[broker.DelegationID]int) error {
	old, ok, err := tx.Grant(g.ID)
	if err != nil {
		return err
	}
	g.NothingMade = g.NothingMade || old.NothingMade // an issue may have recorded it since the read
	switch dead := g.Outcome == broker.OutcomeDead || g.Outcome == broker.OutcomeStatic; {
	case !ok || old.State == broker.StateClosed:
		g.State, g.Outcome, g.Evidence, g.Ended = broker.StateClosed, old.Outcome, old.Evidence, old.Ended
	case g.State != old.State:
		// An issue has changed the state since the read. The next check reads the new state.
	case dead:
		if err := tx.Finish(g, endEntry(g, old, broker.OpClosed, now), ended); err != nil {
			return err
		}
		if isLeftover(g) {
			if err := tx.MarkLeftover(*g); err != nil {
				return err
			}
		}
		if g.NothingMade {
			return tx.CountStep(*g, -1)
		}
	case g.Outcome != old.Outcome || old.Ending == "" || givenUp(g.Evidence) != givenUp(old.Evidence):
		if err := tx.PutGrant(*g); err != nil {
			return err
		}
		_, err := tx.Enter(endEntry(g, old, broker.OpEnd, now))
		return err
	}
	return nil
}

// endEntry is the entry of a grant's end. It is the agent's where the ledger has not recorded yet that the agent closed it.
func endEntry(g *broker.Grant, old broker.Grant, op broker.Op, now time.Time) broker.Entry {
	entry := records.GrantEntry(g, op, now)
	if old.Ending == "" && g.Ending == broker.EndingClosed {
		entry.Actor = g.Caller.String()
	}
	return entry
}
