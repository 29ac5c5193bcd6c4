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

// Heartbeat takes a sign of life of a delegation's holder.
//
// Errors: Unauthenticated, NotFound (the delegation is not the caller's), Unavailable; also Revoked and Expired, so that
// a holder who missed the push learns of it here.
func (e *Engine) Heartbeat(ctx context.Context, c broker.Caller, id broker.DelegationID) error {
	const op = "heartbeat"
	_, unusable, err := e.heartbeat(ctx, op, c, id)
	return cmp.Or(err, unusable)
}

// heartbeat notes a sign of life. A frozen delegation takes it too: its holder is there.
func (e *Engine) heartbeat(ctx context.Context, op string, c broker.Caller, id broker.DelegationID) (now time.Time, unusable, err error) {
	now = e.cfg.Now()
	if err := c.Check(op, now); err != nil {
		return now, nil, err
	}
	var l records.Lineage
	if err := e.view(ctx, op, func(tx *records.Tx) (err error) {
		if l, err = tx.Lineage(op, id); err == nil {
			if unusable = tx.CheckUsable(op, l, selector.Subject{}, now); unusable != nil && broker.KindOf(unusable) == broker.Internal {
				err = unusable
			}
		}
		return err
	}); err != nil {
		return now, nil, err
	}
	if l.Leaf().Holder != c.ID {
		return now, nil, e.refuseViolation(ctx, c, l, broker.ViolationHolder, "", records.UnknownDelegation(op))
	}
	e.watchdog.Beat(l.Leaf(), now)
	return now, unusable, nil
}

// Acknowledge records that a delegation's holder has acknowledged a revocation and stopped its work, and is a heartbeat. It is recorded
// once. A fenced or expired delegation takes it too, since the fence is what it acknowledges.
//
// Errors: Unauthenticated, NotFound (the delegation is not the caller's, or no such revocation covers it), Unavailable.
func (e *Engine) Acknowledge(ctx context.Context, c broker.Caller, id broker.DelegationID, rv broker.RevocationID) error {
	const op = "acknowledge"
	now, _, err := e.heartbeat(ctx, op, c, id)
	if err != nil {
		return err
	}
	return e.update(ctx, op, func(tx *records.Tx) error { return recordAcknowledgement(tx, c, id, rv, now) })
}

// recordAcknowledgement records the acknowledgement of the revocation, and of every other final one over the delegation:
// a holder who has stopped for one has stopped for all.
func recordAcknowledgement(tx *records.Tx, c broker.Caller, id broker.DelegationID, rv broker.RevocationID, now time.Time) error {
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
		if _, err := tx.Enter(broker.Entry{At: now, Actor: c.ID.String(), Op: broker.OpAcknowledged, Chain: l.Chain.ID, Delegation: id,
			Revocation: f.Revocation}); err != nil {
			return err
		}
	}
	return nil
}

// maxRolls is of how many revocations the holders that must acknowledge are kept.
const maxExpected = 32

// Acknowledgements tells who was to hear of a revocation and who has said so, by delegation and
// ancestors first. It is empty for a freeze, which stops no step, and for a revocation that covers
// grants and no delegation.
//
// Errors: NotFound with CodeRevocationUnknown, Unavailable.
func (e *Engine) Acknowledgements(ctx context.Context, id broker.RevocationID) (list []broker.Acknowledgement, err error) {
	const op = "revocation"
	err = e.view(ctx, op, func(tx *records.Tx) error {
		rv, ok, err := tx.Revocation(id)
		if err != nil || !ok {
			return orNotFound(err, records.UnknownRevocation(op))
		}
		holders, known := e.expected.Get(id)
		if !known {
			if holders, err = expectedHolders(tx, rv); err != nil {
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

// roll lists who is to hear of a revocation. It looks at what is in the ledger after the fence, so
// that the fence's own transaction costs the same whatever hangs below.
func expectedHolders(tx *records.Tx, rv broker.Revocation) (holders []broker.Acknowledgement, err error) {
	if rv.Freeze || rv.Grant != "" {
		return nil, nil
	}
	covers, err := records.Covering(rv)
	if err != nil {
		return nil, err
	}
	var open []broker.Delegation
	err = tx.EachMember(rv.Chain, func(id broker.DelegationID) error {
		l, err := tx.Lineage("revocation", id)
		if err != nil || l.Leaf().Created.After(rv.Fenced) || !covers(l, selector.Subject{}) || slices.ContainsFunc(l.Nodes, func(d broker.Delegation) bool { return !rv.Fenced.Before(d.Expires) }) {
			return err
		}
		before, err := tx.FinalFences(l)
		if err == nil && !slices.ContainsFunc(before, func(f broker.Fence) bool { return f.Generation < rv.Revision }) {
			open = append(open, l.Leaf())
		}
		return err
	})
	records.RootFirst(open)
	for _, d := range open {
		holders = append(holders, broker.Acknowledgement{Chain: d.Chain, Delegation: d.ID, Holder: d.Holder})
	}
	return holders, err
}
