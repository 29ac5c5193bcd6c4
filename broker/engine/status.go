package engine

import (
	"context"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/volatile"
	"github.com/pawlsec/pawl/broker/selector"
)

// Watch returns a channel that is closed at the next change of the chain, or of any chain when the id is empty. The
// watcher then reads again, and calls Watch again. It must call cancel.
func (e *Engine) Watch(id broker.ChainID) (changed <-chan struct{}, cancel func()) {
	return e.hub.Watch(volatile.Topic{Chain: id})
}

// WatchFences is [Engine.Watch] for fences alone. The channel is closed when a fence that may cover the chain is set or
// lifted, and not by each step. It suits a watcher that reads only [Engine.Status].
func (e *Engine) WatchFences(id broker.ChainID) (changed <-chan struct{}, cancel func()) {
	return e.hub.Watch(volatile.Topic{Chain: id, Fences: true})
}

// Status reports to the holder of a delegation whether it is fenced, and which of the holder's own steps must stop. The
// request is a heartbeat.
//
// Errors: Unauthenticated, NotFound, Unavailable.
func (e *Engine) Status(ctx context.Context, c broker.Caller, id broker.DelegationID) (s broker.Status, err error) {
	s, l, err := e.peek(ctx, c, id)
	if isStranger(c, l, err) {
		return broker.Status{}, e.refuseStranger(ctx, c, l, "", records.UnknownDelegation(opStatus))
	}
	if err == nil {
		e.watchdog.Beat(s.Delegation, e.cfg.Now())
	}
	return s, err
}

const opStatus = "status"

// Peek is [Engine.Status] without the heartbeat. The broker calls it for an open stream, which proves no sign of life.
func (e *Engine) Peek(ctx context.Context, c broker.Caller, id broker.DelegationID) (s broker.Status, err error) {
	s, _, err = e.peek(ctx, c, id)
	return s, err
}

// peek does the work of Peek. It returns the lineage of another holder's delegation too, with the refusal.
func (e *Engine) peek(ctx context.Context, c broker.Caller, id broker.DelegationID,
) (s broker.Status, l records.Lineage, err error) {
	if err := c.Check(opStatus, e.cfg.Now()); err != nil {
		return broker.Status{}, l, err
	}
	err = e.view(ctx, opStatus, func(tx *records.Tx) error {
		if l, err = tx.Lineage(opStatus, id); err != nil {
			return err
		}
		if l.Leaf().Holder != c.ID {
			return records.UnknownDelegation(opStatus)
		}
		s = broker.Status{Delegation: l.Leaf()}
		if s.Fence, err = tx.FenceOver(l, selector.Subject{}); err != nil {
			return err
		}
		if s.Fence != nil && !s.Fence.Frozen {
			return nil
		}
		return tx.EachFenced(l, func(g broker.GrantID) { s.Ended = append(s.Ended, g) })
	})
	return s, l, err
}

// Active reports whether a grant's secret is active as far as the ledger knows: issued, not ended, not revoked and not
// expired. Introspection of a secret answers from it. A freeze ends no issued secret.
//
// Errors: Unavailable. A grant that does not exist is not active.
func (e *Engine) Active(ctx context.Context, id broker.GrantID) (active bool, err error) {
	err = e.view(ctx, "introspect", func(tx *records.Tx) error {
		active = false
		g, ok, err := tx.Grant(id)
		if err != nil || !ok || g.State != broker.StateIssued {
			return err
		}
		ends, err := e.reaper.MustEnd(tx, &g, e.cfg.Now())
		active = err == nil && !ends
		return err
	})
	return active, err
}
