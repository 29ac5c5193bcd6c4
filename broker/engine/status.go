package engine

import (
	"context"
	"slices"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/volatile"
	"github.com/pawlsec/pawl/broker/selector"
)

// Watch gives a channel that is closed when something about the chain has changed, or about any
// when the id is empty, so that the watcher looks again and then watches anew. cancel must be called.
func (e *Engine) Watch(id broker.ChainID) (changed <-chan struct{}, cancel func()) {
	return e.hub.Watch(volatile.Topic{Chain: id})
}

// WatchFences is [Broker.Watch] for whoever asks only for [Broker.Standing]: the channel is closed
// when a fence that may be over the chain was set or lifted, and not by each step of a busy chain.
func (e *Engine) WatchFences(id broker.ChainID) (changed <-chan struct{}, cancel func()) {
	return e.hub.Watch(volatile.Topic{Chain: id, Fences: true})
}

// Standing tells the holder of a delegation how it stands: fenced or not, and which of the
// holder's own steps must stop.
//
// Errors: Unauthenticated, NotFound, Unavailable.
func (e *Engine) Status(ctx context.Context, c broker.Caller, id broker.DelegationID) (s broker.Status, err error) {
	if s, err = e.Peek(ctx, c, id); err == nil {
		e.watchdog.Beat(s.Delegation, e.cfg.Now())
	}
	return s, err
}

// Peek is [Engine.Standing] on the broker's own account, for a stream that is open: the holder was
// not heard by it.
func (e *Engine) Peek(ctx context.Context, c broker.Caller, id broker.DelegationID) (s broker.Status, err error) {
	const op = "standing"
	if err := c.Check(op, e.cfg.Now()); err != nil {
		return broker.Status{}, err
	}
	err = e.view(ctx, op, func(tx *records.Tx) error {
		l, err := tx.Lineage(op, id)
		if err != nil {
			return err
		}
		if l.Leaf().Holder != c.ID {
			return records.UnknownDelegation(op)
		}
		s = broker.Status{Delegation: l.Leaf()}
		if s.Fence, err = tx.FenceOver(l, selector.Subject{}); err != nil {
			return err
		}
		if s.Fence != nil && !s.Fence.Frozen {
			return nil
		}
		return eachFenced(tx, l, func(g broker.GrantID) { s.Ended = append(s.Ended, g) })
	})
	return s, err
}

// eachFenced calls f with each grant directly under the lineage's leaf that was fenced by itself or by a rule. A grant's
// own fence is listed. Only for rules must the live grants be read, so that the agents of a chain with thousands of them
// learn of a fence at once.
func eachFenced(tx *records.Tx, l records.Lineage, f func(broker.GrantID)) error {
	leaf := l.Leaf().ID
	listed := map[broker.GrantID]bool{}
	if err := tx.EachMarkedFenced(leaf, func(id broker.GrantID) error { listed[id] = true; f(id); return nil }); err != nil {
		return err
	}
	rules, err := tx.Rules()
	if err != nil || !slices.ContainsFunc(rules, func(r records.Rule) bool { return !r.Fence.Frozen }) {
		return err
	}
	return tx.EachLive(l.Chain.ID, func(g broker.Grant) error {
		if g.Delegation != leaf || listed[g.ID] {
			return nil
		}
		fence, err := tx.FenceOver(l, l.Subject(g))
		if err == nil && fence != nil && !fence.Frozen {
			f(g.ID)
		}
		return err
	})
}

// Active reports whether a grant's secret is good as far as the ledger knows: handed out, not
// ended, not fenced and not past its time. It is what introspection of a secret answers from; a
// freeze does not end what was handed out.
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
