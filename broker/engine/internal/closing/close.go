package closing

import (
	"context"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// recordWithin is how long the end of a secret may take, at its target and in the ledger, before the ledger records that
// it was asked for.
const recordWithin = 250 * time.Millisecond

// endsAlone reports whether the end of an issued grant needs no record before its proof. It has no lease and no token of
// its own, so nothing but its target has to end it; a crash before the proof is recorded leaves it ISSUED, to its own end,
// with an agent that has no answer. A sealed secret is none: its collector must be refused from the record on.
func endsAlone(g *broker.Grant) bool {
	return g.State == broker.StateIssued && g.Ending == "" && g.Lease.ID == "" && g.Token.Accessor == "" && g.Sealed == ""
}

// Close ends a step's secret. It waits, as long as ctx allows, for the proof that the secret is dead. The returned
// grant's State is CLOSED if the proof came in time, and then this is durable. To close a grant again is no error.
//
// Errors: Unauthenticated, NotFound, Unavailable (the ledger did not record the end; the secret ends at its expiry).
func (p Process) Close(ctx context.Context, c broker.Caller, id broker.GrantID) (broker.Grant, error) {
	const op = "close"
	r := p.Reaper
	now := r.cfg.Now()
	if err := c.Check(op, now); err != nil {
		return broker.Grant{}, err
	}
	closed, cancel := r.Closed(id)
	defer cancel()
	var g broker.Grant
	read := func(tx *records.Tx) error { return tx.OwnGrant(op, c, id, &g) }
	if err := r.cfg.View(ctx, op, read); err != nil {
		return broker.Grant{}, err
	}
	p.Beat(g.Delegation, now)
	ended := false
	if endsAlone(&g) {
		r.asked.Begin(g.ID)
		r.EndNow(g)
		soon, cancel := context.WithTimeout(ctx, recordWithin)
		defer cancel()
		ended = r.await(soon, closed)
	}
	if !ended {
		if err := r.cfg.Update(ctx, op, func(tx *records.Tx) error { return recordEnd(tx, read, &g, now) }); err != nil {
			return broker.Grant{}, err
		}
		if g.State == broker.StateClosed {
			return g, nil
		}
		r.EndNow(g)
		if !r.await(ctx, closed) {
			return g, nil // the end is recorded, and the reaper proves it later
		}
	}
	readCtx, cancelRead := context.WithTimeout(context.WithoutCancel(ctx), r.cfg.CallTimeout)
	defer cancelRead()
	// When the read fails, the caller gets the grant as it was before it was closed.
	_ = r.cfg.View(readCtx, op, read)
	return g, nil
}

// recordEnd records that the agent has asked for the end of its grant.
func recordEnd(tx *records.Tx, read func(*records.Tx) error, g *broker.Grant, now time.Time) error {
	if err := read(tx); err != nil || g.State == broker.StateClosed || g.Ending != "" {
		return err
	}
	g.Ending = broker.EndingClosed
	if err := tx.PutGrant(*g); err != nil {
		return err
	}
	entry := records.GrantEntry(g, broker.OpEnd, now)
	entry.Actor, entry.Detail = g.Caller.String(), string(broker.EndingClosed)
	_, err := tx.Enter(entry)
	return err
}

// await waits for a channel of [Reaper.Closed], and reports whether it was closed in time.
func (r *Reaper) await(ctx context.Context, closed <-chan struct{}) bool {
	select {
	case <-closed:
		return true
	case <-ctx.Done():
	case <-r.cfg.Context.Done():
	}
	return false
}
