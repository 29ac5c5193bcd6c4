package engine

import (
	"context"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Close ends a step's secret. It waits for the proof that it is dead for as long as ctx allows;
// the grant's State tells whether that came in time. Closing again is no error.
//
// Errors: Unauthenticated, NotFound, Unavailable (the end could not be recorded; the secret
// ends with its time).
func (e *Engine) Close(ctx context.Context, c broker.Caller, id broker.GrantID) (broker.Grant, error) {
	const op = "close"
	now := e.cfg.Now()
	if err := c.Check(op, now); err != nil {
		return broker.Grant{}, err
	}
	var g broker.Grant
	if err := e.view(ctx, op, func(tx *records.Tx) error { return ownGrant(tx, op, c, id, &g) }); err != nil {
		return broker.Grant{}, err
	}
	e.watchdog.BeatAgain(g.Delegation, now)
	closed, cancel := e.reaper.Closed(id)
	defer cancel()
	err := e.update(ctx, op, func(tx *records.Tx) error {
		if err := ownGrant(tx, op, c, id, &g); err != nil || g.State == broker.StateClosed || g.Ending != "" {
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
		return g, nil // the end is recorded; only the proof was not waited for
	case <-e.ctx.Done():
		return g, nil
	case <-closed:
	}
	clean, cancelRead := detached(ctx, e.cfg.MintTimeout)
	defer cancelRead()
	_ = e.view(clean, op, func(tx *records.Tx) error { return ownGrant(tx, op, c, id, &g) }) // it is closed either way
	return g, nil
}

func ownGrant(tx *records.Tx, op string, c broker.Caller, id broker.GrantID, g *broker.Grant) error {
	found, ok, err := tx.Grant(id)
	if err != nil {
		return err
	}
	if !ok || found.Caller != c.ID {
		return records.UnknownGrant(op)
	}
	*g = found
	return nil
}
