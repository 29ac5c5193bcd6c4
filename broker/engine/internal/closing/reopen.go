package closing

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Find returns the grants with secrets that work at a backend although the ledger does not know them, and those that it
// calls CLOSED.
func (r *Reaper) Find(ctx context.Context, backend string) (unknown, again []broker.GrantID, err error) {
	finder, ok := r.cfg.Backends[backend].(broker.Finder)
	if !ok {
		return nil, nil, nil
	}
	found, err := finder.Find(ctx)
	if err != nil || len(found) == 0 {
		return nil, nil, err
	}
	unknown, closed, err := r.sortFound(ctx, backend, found)
	if err != nil || len(closed) == 0 {
		return unknown, nil, err
	}
	// They may have been closed after they were listed. A second list tells, whatever the clock did meanwhile.
	if found, err = finder.Find(ctx); err != nil {
		return nil, nil, err
	}
	slices.Sort(found)
	for _, id := range closed {
		if _, works := slices.BinarySearch(found, id); works {
			again = append(again, id)
		}
	}
	return unknown, again, nil
}

// sortFound returns those of the grants that work at a backend that the ledger does not know, and those that it calls
// CLOSED.
func (r *Reaper) sortFound(
	ctx context.Context, backend string, found []broker.GrantID,
) (unknown, closed []broker.GrantID, err error) {
	err = r.cfg.View(ctx, "sweep", func(tx *records.Tx) error {
		unknown, closed = nil, nil
		for _, id := range found {
			g, ok, err := tx.Grant(id)
			switch {
			case err != nil:
				return err
			case !ok || g.State == broker.StateClosed && r.cfg.Backends[g.Backend] == nil: // a former backend had it
				unknown = append(unknown, id)
			case g.State == broker.StateClosed && g.Backend == backend: // others may list those of the same target
				closed = append(closed, id)
			}
		}
		return nil
	})
	return unknown, closed, err
}

// reopenAtOnce is the number of grants that one transaction makes live again.
const reopenAtOnce = 100

// Reopen makes CLOSED grants with secrets that work again live, and ends them again. The revocations that cover them
// are no longer CLOSED, until that is proven anew. If the ledger cannot record this, the secrets are severed
// nevertheless. n is the number of grants.
func (r *Reaper) Reopen(ctx context.Context, backend string, ids []broker.GrantID) (n int, err error) {
	for part := range slices.Chunk(ids, reopenAtOnce) {
		var grants []broker.Grant
		var opened []broker.Revocation
		err := r.cfg.Update(ctx, "sweep", func(tx *records.Tx) (err error) {
			grants, opened, err = reopen(tx, backend, part, r.cfg.Now())
			return err
		})
		if err != nil {
			if severer, ok := r.cfg.Backends[backend].(broker.Severer); ok {
				err = errors.Join(err, severer.Sever(ctx, GrantsAt(backend, ids)))
			}
			return n, err
		}
		r.forgetLeftovers(grants)
		r.EndNow(grants...)
		for _, rv := range opened {
			r.cfg.Reconcile(rv)
		}
		n += len(grants)
	}
	if n > 0 {
		r.cfg.Alarm("sweep", broker.Errorf(broker.Internal, "sweep", "%d secrets that were proven dead work again at %s: "+
			"it does not know that they ended, as after a failover; they are ended and proven again", n, backend))
	}
	return n, nil
}

// GrantsAt returns grants of a backend of which only the ids are known.
func GrantsAt(backend string, ids []broker.GrantID) []broker.Grant {
	all := make([]broker.Grant, len(ids))
	for i, id := range ids {
		all[i] = broker.Grant{ID: id, Backend: backend}
	}
	return all
}

// WatchTargets proves again what is CLOSED at a target, each time when another server may have taken its place.
func (r *Reaper) WatchTargets() {
	for name, b := range r.cfg.Backends {
		if w, ok := b.(broker.Watcher); ok {
			r.cfg.Background(func() { r.watch(name, w.Replaced()) })
		}
	}
}

func (r *Reaper) watch(backend string, replaced <-chan struct{}) {
	for {
		select {
		case <-r.cfg.Context.Done():
			return
		case <-replaced:
		}
		r.mu.Lock()
		r.replaced[backend]++
		r.mu.Unlock()
		retry := backoff.Exponential{First: 100 * time.Millisecond, Most: 10 * time.Second}
		for {
			_, again, err := r.Find(r.cfg.Context, backend)
			if err == nil {
				_, err = r.Reopen(r.cfg.Context, backend, again)
			}
			if err == nil || r.cfg.Context.Err() != nil {
				break
			}
			r.cfg.Alarm("proving again at "+backend, err)
			if backoff.Sleep(r.cfg.Context, retry.Next()) != nil {
				break
			}
		}
	}
}

// reopen makes grants live and opens the final revocations that cover them. It returns both.
func reopen(
	tx *records.Tx, backend string, ids []broker.GrantID, now time.Time,
) (grants []broker.Grant, opened []broker.Revocation, err error) {
	found := broker.Evidence{At: now, Check: backend + ": list what works", Outcome: broker.OutcomeAlive,
		Answer: "it works again after it was proven dead"}
	for _, id := range ids {
		g, ok, err := tx.Grant(id)
		if err != nil {
			return nil, nil, err
		}
		if !ok || g.State != broker.StateClosed {
			continue
		}
		if err := tx.Reopen(&g, found); err != nil {
			return nil, nil, err
		}
		entry := records.GrantEntry(&g, broker.OpOrphan, now)
		entry.Detail = fmt.Sprintf("its secret works again at %s, after it was proven dead", backend)
		if _, err := tx.Enter(entry); err != nil {
			return nil, nil, err
		}
		grants = append(grants, g)
	}
	over, err := tx.RevocationsOver(grants)
	if err != nil {
		return nil, nil, err
	}
	for id, part := range over {
		rv, err := reopenRevocation(tx, id, part, now)
		if err != nil {
			return nil, nil, err
		}
		opened = append(opened, rv)
	}
	return grants, opened, nil
}

func reopenRevocation(
	tx *records.Tx, id broker.RevocationID, grants []broker.Grant, now time.Time,
) (rv broker.Revocation, err error) {
	rv, _, err = tx.Revocation(id)
	if err != nil {
		return rv, err
	}
	leftovers, err := tx.LeftoversUnder(rv) // the leases of these grants are a part of their proof again
	if err != nil {
		return rv, err
	}
	before := rv.Closure
	rv.Settled, rv.Closure, rv.Leases = time.Time{}, broker.ClosurePartial, len(leftovers)
	rv.Alive += len(grants)
	rv.Grants = max(rv.Grants, rv.Alive+rv.Unknown)
	rv.Dead = rv.Grants - rv.Alive - rv.Unknown
	for _, g := range grants {
		if end := g.LatestEnd(); end.After(rv.LatestEnd) {
			rv.LatestEnd = end
		}
	}
	if err := tx.PutRevocation(rv); err != nil {
		return rv, err
	}
	op := broker.OpEvidence
	if before != rv.Closure {
		op = broker.OpClosure
	}
	_, err = tx.Enter(broker.Entry{At: now, Actor: "pawl", Op: op, Chain: rv.Chain, Delegation: rv.Node,
		Revocation: rv.ID, Detail: FormatTally(rv)})
	return rv, err
}
