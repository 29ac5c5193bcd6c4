package engine

import (
	"context"
	"fmt"
	"strings"

	"github.com/pawlsec/pawl/broker"
)

// told is a subscriber's cursor: everything up to a revision was told, or never will be.
type told struct {
	Revision broker.Revision `json:"revision"`
}

func keyTold(subscriber string) string { return "t/" + subscriber }

// Subscribe gives the revision after which a subscriber is still to be told of events. For one that is
// new that is the revision of this call, which records it.
//
// Errors: Unavailable.
func (b *Engine) Subscribe(ctx context.Context, subscriber string) (at broker.Revision, err error) {
	const op = "subscribe"
	known := false
	if err := b.view(ctx, op, func(tx broker.Tx) (err error) {
		var t told
		t, known, err = load[told](tx, keyTold(subscriber))
		at = t.Revision
		return err
	}); err != nil || known {
		return at, err
	}
	err = b.update(ctx, op, func(tx broker.Tx) error {
		if at, err = enter(tx, broker.Entry{At: b.cfg.Now(), Actor: "pawl", Op: broker.OpTold, Detail: subscriber + ": from now on"}); err != nil {
			return err
		}
		return save(tx, keyTold(subscriber), told{at})
	})
	return at, err
}

// Told records that a subscriber need not be told again of anything up to a revision.
//
// Errors: Unavailable.
func (b *Engine) Told(ctx context.Context, subscriber string, upto broker.Revision) error {
	return b.update(ctx, "tell", func(tx broker.Tx) error {
		if _, err := enter(tx, broker.Entry{At: b.cfg.Now(), Actor: "pawl", Op: broker.OpTold, Detail: fmt.Sprintf("%s: %d", subscriber, upto)}); err != nil {
			return err
		}
		return save(tx, keyTold(subscriber), told{upto})
	})
}

const tallyFormat = "%d dead, %d alive, %d unknown of %d"

// tally is the revocation's numbers in words; parseTally reads them back.
func tally(rv broker.Revocation) string {
	return fmt.Sprintf("%s: "+tallyFormat, rv.Closure, rv.Dead, rv.Alive, rv.Unknown, rv.Grants)
}

func parseTally(detail string) (t broker.Tally, ok bool) {
	closure, counts, ok := strings.Cut(detail, ": ")
	t.Closure = broker.Closure(closure)
	_, err := fmt.Sscanf(counts, tallyFormat, &t.Dead, &t.Alive, &t.Unknown, &t.Grants)
	return t, ok && err == nil
}

// Event gives the event that an entry records; ok is false when it records none: a fence, a closure that
// changed, a freeze, and one that was lifted.
//
// Errors: Unavailable.
func (b *Engine) Event(ctx context.Context, e broker.Entry) (ev broker.Event, ok bool, err error) {
	switch {
	case e.Op == broker.OpUnfreeze && e.Detail != unfreezeLifted:
		return broker.Event{}, false, nil
	case e.Op != broker.OpFence && e.Op != broker.OpFreeze && e.Op != broker.OpUnfreeze && e.Op != broker.OpClosure:
		return broker.Event{}, false, nil
	}
	err = b.view(ctx, "tell", func(tx broker.Tx) error {
		ev = broker.Event{Entry: e}
		if ev.Revocation, ok, err = load[broker.Revocation](tx, keyRevocation(e.Revocation)); err != nil || !ok {
			return err
		}
		if ev.Revocation.Chain == "" {
			return nil
		}
		c, _, err := load[broker.Chain](tx, keyChain(ev.Revocation.Chain))
		ev.Opener = c.Opener
		return err
	})
	if err == nil && ok && e.Op == broker.OpClosure {
		ev.Tally, ok = parseTally(e.Detail) // what cannot be read is none of ours
	}
	return ev, ok, err
}
