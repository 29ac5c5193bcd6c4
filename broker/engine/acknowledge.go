package engine

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/selector"
)

// Heartbeat notes a heartbeat of a delegation's holder.
//
// Errors: Unauthenticated, NotFound (the delegation is not the caller's), Unavailable. Also Revoked and Expired, so
// that a holder that missed the push learns of the fence here.
func (e *Engine) Heartbeat(ctx context.Context, c broker.Caller, id broker.DelegationID) error {
	const op = "heartbeat"
	_, unusable, err := e.heartbeat(ctx, op, c, id)
	return cmp.Or(err, unusable)
}

// heartbeat notes a heartbeat, and returns the reason why the delegation is unusable, if it is. A delegation that is
// frozen, revoked or expired takes the heartbeat too.
func (e *Engine) heartbeat(ctx context.Context, op string, c broker.Caller, id broker.DelegationID,
) (now time.Time, unusable, err error) {
	now = e.cfg.Now()
	if err := c.Check(op, now); err != nil {
		return now, nil, err
	}
	var l records.Lineage
	err = e.view(ctx, op, func(tx *records.Tx) (err error) {
		if l, err = tx.Lineage(op, id); err == nil && l.Leaf().Holder == c.ID {
			unusable = tx.CheckUsable(op, l, selector.Subject{}, now)
			if unusable != nil && broker.KindOf(unusable) == broker.Internal {
				err = unusable
			}
		}
		return err
	})
	if isStranger(c, l, err) {
		return now, nil, e.refuseStranger(ctx, c, l, "", records.UnknownDelegation(op))
	}
	if err != nil {
		return now, nil, err
	}
	e.watchdog.Beat(l.Leaf(), now)
	return now, unusable, nil
}

// Acknowledge records that a delegation's holder has acknowledged a revocation and stopped its work. It is recorded
// once, and is a heartbeat too. A fenced or expired delegation accepts it, since the holder acknowledges that fence.
//
// Errors: Unauthenticated, NotFound (the delegation is not the caller's, or no such revocation covers it), Unavailable.
func (e *Engine) Acknowledge(ctx context.Context, c broker.Caller, id broker.DelegationID, rv broker.RevocationID,
) error {
	const op = "acknowledge"
	now, _, err := e.heartbeat(ctx, op, c, id)
	if err != nil {
		return err
	}
	return e.update(ctx, op, func(tx *records.Tx) error { return recordAcknowledgement(tx, c, id, rv, now) })
}

// recordAcknowledgement records the acknowledgement of the revocation, and of every other final fence over the
// delegation. A holder that has stopped for one has stopped for all.
func recordAcknowledgement(tx *records.Tx, c broker.Caller, id broker.DelegationID, rv broker.RevocationID,
	now time.Time) error {
	const op = "acknowledge"
	l, err := tx.Lineage(op, id)
	if err != nil {
		return err
	}
	fences, err := tx.FinalFences(l)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(fences, func(f broker.Fence) bool { return f.Revocation == rv }) {
		return records.UnknownRevocation(op)
	}
	for _, f := range fences {
		first, err := tx.Acknowledge(f.Revocation, id, now)
		if err != nil {
			return err
		}
		if !first {
			continue
		}
		if _, err := tx.Enter(broker.Entry{At: now, Actor: c.ID.String(), Op: broker.OpAcknowledged, Chain: l.Chain.ID,
			Delegation: id, Revocation: f.Revocation}); err != nil {
			return err
		}
	}
	return nil
}

// maxExpected bounds the revocations of which the holders that must acknowledge are kept in memory.
const maxExpected = 32

// Acknowledgements lists the holders that must acknowledge a revocation, with the time at which each did. The list is
// by delegation, ancestors first. It is empty for a freeze, which stops no step, and for a revocation that covers
// grants and no delegation.
//
// Errors: NotFound with CodeRevocationUnknown, Unavailable.
func (e *Engine) Acknowledgements(ctx context.Context, id broker.RevocationID,
) (list []broker.Acknowledgement, err error) {
	const op = "revocation"
	rv, err := e.Revocation(ctx, id)
	if err != nil {
		return nil, err
	}
	err = e.past.Since(ctx, op, rv.Fenced, func(tx *records.Tx) error {
		holders, known := e.expected.Get(id)
		if !known {
			var err error
			if holders, err = tx.ExpectedHolders(rv, e.cfg.Now()); err != nil {
				return err
			}
			e.expected.Put(id, holders)
		}
		list = slices.Clone(holders)
		acknowledged, err := tx.Acknowledgements(id)
		for i := range list {
			list[i].At = acknowledged[list[i].Delegation]
		}
		return err
	})
	return list, err
}
