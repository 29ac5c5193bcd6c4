package engine

import (
	"context"
	"time"

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
		return g, nil // the end is recorded, and the reaper proves it later
	case <-e.ctx.Done():
		return g, nil
	case <-closed:
	}
	readCtx, cancelRead := detached(ctx, e.cfg.MintTimeout)
	defer cancelRead()
	// When the read fails, the caller gets the grant as it was before it was closed.
	_ = e.view(readCtx, op, func(tx *records.Tx) error { return ownGrant(tx, op, c, id, &g) })
	return g, nil
}

// The graces of a held step, in which a request must hold it again.
const (
	holdGrace   = 1500 * time.Millisecond
	resumeGrace = 30 * time.Second // after a start: its holder may still connect to the last process
)

// Hold holds a step that was taken to be held, until release is called. Without any request that holds it, the step's
// secret ends after a grace.
//
// Errors: Unauthenticated, NotFound, Expired (it has ended, or was not taken to be held), Unavailable.
func (e *Engine) Hold(ctx context.Context, c broker.Caller, id broker.GrantID) (release func(), err error) {
	const op = "hold"
	if err := c.Check(op, e.cfg.Now()); err != nil {
		return nil, err
	}
	var g broker.Grant
	if err := e.view(ctx, op, func(tx *records.Tx) error { return ownGrant(tx, op, c, id, &g) }); err != nil {
		return nil, err
	}
	release, held := e.holds.Hold(id, holdGrace)
	if !held {
		return nil, broker.Errorf(broker.Expired, op, "the step has ended, or was not taken to be held").With(broker.CodeExpired)
	}
	return release, nil
}

// holderLost ends a held step whose holder is gone.
func (e *Engine) holderLost(id broker.GrantID) (recorded bool) {
	_, err := e.reaper.End(e.ctx, "hold", broker.EndingLost, "no connection of its holder is left", id)
	if err != nil && e.ctx.Err() == nil {
		e.cfg.Alarm("ending a step whose holder is gone", err)
	}
	return err == nil
}

// ownGrant reads the caller's grant into g. A grant of another caller gets the same refusal as one that does not exist.
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
