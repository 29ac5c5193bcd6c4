package broker

import (
	"context"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// told is a subscriber's cursor: everything up to a revision was told, or never will be.
type told struct {
	Revision Revision `json:"revision"`
}

func keyTold(subscriber string) string { return "t/" + subscriber }

// Subscribe gives the revision after which a subscriber is still to be told of events. For one that is
// new that is the revision of this call, which records it.
//
// Errors: Unavailable.
func (b *Broker) Subscribe(ctx context.Context, subscriber string) (at Revision, err error) {
	const op = "subscribe"
	known := false
	if err := b.view(ctx, op, func(tx Tx) (err error) {
		var t told
		t, known, err = load[told](tx, keyTold(subscriber))
		at = t.Revision
		return err
	}); err != nil || known {
		return at, err
	}
	err = b.update(ctx, op, func(tx Tx) error {
		if at, err = enter(tx, Entry{At: b.cfg.Now(), Actor: "pawl", Op: OpTold, Detail: subscriber + ": from now on"}); err != nil {
			return err
		}
		return save(tx, keyTold(subscriber), told{at})
	})
	return at, err
}

// Told records that a subscriber need not be told again of anything up to a revision.
//
// Errors: Unavailable.
func (b *Broker) Told(ctx context.Context, subscriber string, upto Revision) error {
	return b.update(ctx, "tell", func(tx Tx) error {
		if _, err := enter(tx, Entry{At: b.cfg.Now(), Actor: "pawl", Op: OpTold, Detail: fmt.Sprintf("%s: %d", subscriber, upto)}); err != nil {
			return err
		}
		return save(tx, keyTold(subscriber), told{upto})
	})
}

// Event is what others may be told about an entry of the audit log.
type Event struct {
	Entry      Entry
	Revocation Revocation  // as it stands now, which may be later than the entry
	Opener     spiffeid.ID // of the revocation's chain; zero when it is a rule's
	Tally      Tally       // of a closure: as of the entry
}

// Tally is a closure with its counts.
type Tally struct {
	Closure                      Closure
	Dead, Alive, Unknown, Grants int
}

const tallyFormat = "%d dead, %d alive, %d unknown of %d"

// tally is the revocation's numbers in words; parseTally reads them back.
func (rv Revocation) tally() string {
	return fmt.Sprintf("%s: "+tallyFormat, rv.Closure, rv.Dead, rv.Alive, rv.Unknown, rv.Grants)
}

func parseTally(detail string) (t Tally, ok bool) {
	closure, counts, ok := strings.Cut(detail, ": ")
	t.Closure = Closure(closure)
	_, err := fmt.Sscanf(counts, tallyFormat, &t.Dead, &t.Alive, &t.Unknown, &t.Grants)
	return t, ok && err == nil
}

// Event gives the event that an entry records; ok is false when it records none: a fence, a closure that
// changed, a freeze, and one that was lifted.
//
// Errors: Unavailable.
func (b *Broker) Event(ctx context.Context, e Entry) (ev Event, ok bool, err error) {
	switch {
	case e.Op == OpUnfreeze && e.Detail != unfreezeLifted:
		return Event{}, false, nil
	case e.Op != OpFence && e.Op != OpFreeze && e.Op != OpUnfreeze && e.Op != OpClosure:
		return Event{}, false, nil
	}
	err = b.view(ctx, "tell", func(tx Tx) error {
		ev = Event{Entry: e}
		if ev.Revocation, ok, err = load[Revocation](tx, keyRevocation(e.Revocation)); err != nil || !ok {
			return err
		}
		if ev.Revocation.Chain == "" {
			return nil
		}
		c, _, err := load[Chain](tx, keyChain(ev.Revocation.Chain))
		ev.Opener = c.Opener
		return err
	})
	if err == nil && ok && e.Op == OpClosure {
		ev.Tally, ok = parseTally(e.Detail) // what cannot be read is none of ours
	}
	return ev, ok, err
}
