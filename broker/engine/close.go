package engine

import (
	"context"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Close ends a step's secret. It waits, as long as ctx allows, for the proof that the secret is dead. The returned
// grant's State is CLOSED if the proof came in time. To close a grant again is no error.
//
// Errors: Unauthenticated, NotFound, Unavailable (the ledger did not record the end; the secret ends at its expiry).
func (e *Engine) Close(ctx context.Context, c broker.Caller, id broker.GrantID) (broker.Grant, error) {
	const op = "close"
	now := e.cfg.Now()
	if err := c.Check(op, now); err != nil {
		return broker.Grant{}, err
	}
	var g broker.Grant
	if err := e.view(ctx, op, func(tx *records.Tx) error { return tx.OwnGrant(op, c, id, &g) }); err != nil {
		return broker.Grant{}, err
	}
	e.watchdog.BeatAgain(g.Delegation, now)
	closed, cancel := e.reaper.Closed(id)
	defer cancel()
	err := e.update(ctx, op, func(tx *records.Tx) error {
		if err := tx.OwnGrant(op, c, id, &g); err != nil || g.State == broker.StateClosed || g.Ending != "" {
			return err
		}
		g.Ending = broker.EndingClosed
		if err := tx.PutGrant(g); err != nil {
			return err
		}
		entry := records.GrantEntry(&g, broker.OpEnd, now)
		entry.Actor, entry.Detail = c.ID.String(), string(broker.EndingClosed)
		_, err := tx.Enter(entry)
		return err
	})
	if err != nil {
		return broker.Grant{}, err
	}
	if g.State == broker.StateClosed {
		return g, nil
	}
	e.reaper.EndNow(g)
	select {
	case <-ctx.Done():
		return g, nil // the end is recorded, and the reaper proves it later
	case <-e.ctx.Done():
		return g, nil
	case <-closed:
	}
	readCtx, cancelRead := detached(ctx, e.cfg.MintTimeout)
	defer cancelRead()
	// When the read fails, the caller gets the grant as it was before it was closed.
	_ = e.view(readCtx, op, func(tx *records.Tx) error { return tx.OwnGrant(op, c, id, &g) })
	return g, nil
}
