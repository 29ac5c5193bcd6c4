package engine

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Subscribe returns the subscriber's delivery cursor: the revision after which events are not yet delivered. For a new
// subscriber it records a cursor, which starts at this call.
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
		at, err = tx.Enter(broker.Entry{At: e.cfg.Now(), Actor: "pawl", Op: broker.OpDelivered,
			Detail: subscriber + ": from now on"})
		if err != nil {
			return err
		}
		return tx.PutCursor(subscriber, at)
	})
	return at, err
}

// MarkDelivered moves a subscriber's delivery cursor to a revision: the events up to it are delivered.
//
// Errors: Unavailable.
func (e *Engine) MarkDelivered(ctx context.Context, subscriber string, upto broker.Revision) error {
	return e.update(ctx, "deliver", func(tx *records.Tx) error {
		if _, err := tx.Enter(broker.Entry{At: e.cfg.Now(), Actor: "pawl", Op: broker.OpDelivered,
			Detail: fmt.Sprintf("%s: %d", subscriber, upto)}); err != nil {
			return err
		}
		return tx.PutCursor(subscriber, upto)
	})
}

// Event returns the event that an entry records: a fence, a changed closure, a freeze, a lifted freeze, or a touched canary,
// which has no revocation. ok is false for every other entry.
//
// Errors: Unavailable.
func (e *Engine) Event(ctx context.Context, entry broker.Entry) (ev broker.Event, ok bool, err error) {
	canary := entry.Op == broker.OpViolation && entry.Code == broker.Code(broker.ViolationCanary)
	switch {
	case entry.Op == broker.OpUnfreeze && !strings.HasPrefix(entry.Detail, unfreezeLifted):
		return broker.Event{}, false, nil
	case entry.Op != broker.OpFence && entry.Op != broker.OpFreeze && entry.Op != broker.OpUnfreeze &&
		entry.Op != broker.OpClosure && !canary:
		return broker.Event{}, false, nil
	}
	err = e.view(ctx, "deliver", func(tx *records.Tx) error {
		ev = broker.Event{Entry: entry}
		if ev.Revocation, ok, err = tx.Revocation(entry.Revocation); err != nil || !ok && !canary {
			return err
		}
		ok = true
		chain := cmp.Or(ev.Revocation.Chain, entry.Chain) // a canary's has no revocation, and a rule's no chain
		if chain == "" {
			return nil
		}
		c, _, err := tx.Chain(chain)
		ev.Opener = c.Opener
		return err
	})
	if err == nil && ok && entry.Op == broker.OpClosure {
		ev.Tally, ok = closing.ParseTally(entry.Detail)
	}
	return ev, ok, err
}
