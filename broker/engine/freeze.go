package engine

import (
	"context"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/requests"
)

// unfreezeLifted begins the detail of the entry that lifts a freeze. The entry of the first request has another.
const unfreezeLifted = "lifted"

// Unfreeze lifts a freeze when two people have requested it. The first call records the first operator. The users of the
// local socket count as one person. Revocations are not lifted.
//
// Errors: Unauthenticated, NotFound, Conflict (it is no freeze, or is lifted), Denied with CodeSecondPerson after the
// first call.
func (e *Engine) Unfreeze(ctx context.Context, o broker.Operator, id broker.RevocationID,
) (rv broker.Revocation, err error) {
	const op = "unfreeze"
	second := false
	rv, err = unfreeze(ctx, e, o, id, func(rv *broker.Revocation) string {
		if second = rv.Unfreezer != "" && !broker.SamePerson(rv.Unfreezer, o.Name); second {
			return unfreezeLifted
		}
		rv.Unfreezer = o.Name
		return "asked for"
	})
	if err == nil && !second {
		err = broker.Errorf(broker.Denied, op, "recorded; a second person must ask for the same").
			With(broker.CodeSecondPerson).Lacks("another operator repeats this command; the users of the local socket are one person",
			"operator")
	}
	return rv, err
}

// UnfreezeAlone lifts a freeze in the ledger of a stopped broker, without a second person. The revocation and the audit
// log keep the reason. A way out for root, where nobody else can lift it.
//
// Errors: Malformed, Unauthenticated, NotFound, Conflict, Unavailable.
func UnfreezeAlone(ctx context.Context, l broker.Ledger, now func() time.Time, o broker.Operator, id broker.RevocationID,
	reason string,
) (broker.Revocation, error) {
	if err := requests.CheckText("unfreeze", "reason", reason, 1, broker.MaxTask); err != nil {
		return broker.Revocation{}, err
	}
	e := &Engine{cfg: Config{Ledger: l, Now: now}}
	return unfreeze(ctx, e, o, id, func(rv *broker.Revocation) string {
		rv.LiftedAlone = reason
		return unfreezeLifted + " by one person on a stopped broker: " + reason
	})
}

// unfreeze records a request to lift a freeze, and lifts it when decide returns the detail of a lift.
func unfreeze(ctx context.Context, e *Engine, o broker.Operator, id broker.RevocationID,
	decide func(*broker.Revocation) (detail string),
) (rv broker.Revocation, err error) {
	const op = "unfreeze"
	if err := o.Check(op); err != nil {
		return broker.Revocation{}, err
	}
	err = e.update(ctx, op, func(tx *records.Tx) error {
		var ok bool
		if rv, ok, err = tx.Revocation(id); err != nil || !ok {
			return orNotFound(err, records.UnknownRevocation(op))
		}
		if !rv.Freeze || rv.Lifted {
			return broker.Errorf(broker.Conflict, op, "%s is not a freeze that is in force", id)
		}
		detail := decide(&rv)
		if strings.HasPrefix(detail, unfreezeLifted) {
			if err := lift(tx, &rv, e.cfg.Now()); err != nil {
				return err
			}
		}
		if _, err := tx.Enter(broker.Entry{At: e.cfg.Now(), Actor: o.Name, Op: broker.OpUnfreeze, Chain: rv.Chain,
			Delegation: rv.Node, Grant: rv.Grant, Revocation: id, Detail: detail}); err != nil {
			return err
		}
		return tx.PutRevocation(rv)
	})
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
