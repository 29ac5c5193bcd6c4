package engine

import (
	"context"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// unfreezeLifted is the detail of the entry that lifts a freeze. The entry of the first request has another.
const unfreezeLifted = "lifted"

// Unfreeze lifts a freeze when two operators have requested it. The first call records the first operator. Revocations
// are not lifted.
//
// Errors: Unauthenticated, NotFound, Conflict (it is no freeze, or is lifted), Denied with CodeSecondPerson after the
// first call.
func (e *Engine) Unfreeze(ctx context.Context, o broker.Operator, id broker.RevocationID,
) (rv broker.Revocation, err error) {
	const op = "unfreeze"
	if err := o.Check(op); err != nil {
		return broker.Revocation{}, err
	}
	second := false
	err = e.update(ctx, op, func(tx *records.Tx) error {
		var ok bool
		if rv, ok, err = tx.Revocation(id); err != nil || !ok {
			return orNotFound(err, records.UnknownRevocation(op))
		}
		if !rv.Freeze || rv.Lifted {
			return broker.Errorf(broker.Conflict, op, "%s is not a freeze that is in force", id)
		}
		if second = rv.Unfreezer != "" && rv.Unfreezer != o.Name; !second {
			rv.Unfreezer = o.Name
		} else if err := lift(tx, &rv, e.cfg.Now()); err != nil {
			return err
		}
		detail := map[bool]string{false: "asked for", true: unfreezeLifted}[second]
		if _, err := tx.Enter(broker.Entry{At: e.cfg.Now(), Actor: o.Name, Op: broker.OpUnfreeze, Chain: rv.Chain,
			Delegation: rv.Node, Grant: rv.Grant, Revocation: id, Detail: detail}); err != nil {
			return err
		}
		return tx.PutRevocation(rv)
	})
	if err == nil && !second {
		err = broker.Errorf(broker.Denied, op, "recorded; a second operator must ask for the same").
			With(broker.CodeSecondPerson).Lacks("another operator repeats this command", "operator")
	}
	return rv, err
}

// lift removes the freeze's mark, unless a final fence has replaced it.
func lift(tx *records.Tx, rv *broker.Revocation, now time.Time) error {
	rv.Lifted, rv.Settled = true, now
	switch {
	case rv.Node != "":
		d, _, err := tx.Delegation(rv.Node)
		if err != nil || d.Fence == nil || d.Fence.Revocation != rv.ID {
			return err
		}
		d.Fence = nil
		return tx.PutDelegation(d)
	case rv.Grant != "":
		g, _, err := tx.Grant(rv.Grant)
		if err != nil || g.Fence == nil || g.Fence.Revocation != rv.ID {
			return err
		}
		g.Fence = nil
		return tx.PutGrant(g)
	}
	return tx.DropRule(rv.ID)
}
