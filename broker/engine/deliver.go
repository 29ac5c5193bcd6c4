package engine

import (
	"context"
	"fmt"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Subscribe gives the revision after which a subscriber is still to be told of events. For one that is
// new that is the revision of this call, which records it.
//
// Errors: Unavailable.
func (e *Engine) Subscribe(ctx context.Context, subscriber string) (at broker.Revision, err error) {
	const op = "subscribe"
	known := false
	if err := e.view(ctx, op, func(tx *records.Tx) (err error) {
		at, known, err = tx.Cursor(subscriber)
		return err
	}); err != nil || known {
		return at, err
	}
	err = e.update(ctx, op, func(tx *records.Tx) error {
		if at, err = tx.Enter(broker.Entry{At: e.cfg.Now(), Actor: "pawl", Op: broker.OpDelivered, Detail: subscriber + ": from now on"}); err != nil {
			return err
		}
		return tx.PutCursor(subscriber, at)
	})
	return at, err
}

// MarkDelivered records that a subscriber need not be told again of anything up to a revision.
//
// Errors: Unavailable.
func (e *Engine) MarkDelivered(ctx context.Context, subscriber string, upto broker.Revision) error {
	return e.update(ctx, "deliver", func(tx *records.Tx) error {
		if _, err := tx.Enter(broker.Entry{At: e.cfg.Now(), Actor: "pawl", Op: broker.OpDelivered, Detail: fmt.Sprintf("%s: %d", subscriber, upto)}); err != nil {
			return err
		}
		return tx.PutCursor(subscriber, upto)
	})
}

// Event gives the event that an entry records; ok is false when it records none: a fence, a closure that
// changed, a freeze, and one that was lifted.
//
// Errors: Unavailable.
func (e *Engine) Event(ctx context.Context, entry broker.Entry) (ev broker.Event, ok bool, err error) {
	switch {
	case entry.Op == broker.OpUnfreeze && entry.Detail != unfreezeLifted:
		return broker.Event{}, false, nil
	case entry.Op != broker.OpFence && entry.Op != broker.OpFreeze && entry.Op != broker.OpUnfreeze && entry.Op != broker.OpClosure:
		return broker.Event{}, false, nil
	}
	err = e.view(ctx, "deliver", func(tx *records.Tx) error {
		ev = broker.Event{Entry: entry}
		if ev.Revocation, ok, err = tx.Revocation(entry.Revocation); err != nil || !ok {
			return err
		}
		if ev.Revocation.Chain == "" {
			return nil
		}
		c, _, err := tx.Chain(ev.Revocation.Chain)
		ev.Opener = c.Opener
		return err
	})
	if err == nil && ok && entry.Op == broker.OpClosure {
		ev.Tally, ok = parseTally(entry.Detail) // what cannot be read is none of ours
	}
	return ev, ok, err
}
