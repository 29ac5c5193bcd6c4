package engine

import (
	"context"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Resume takes up what the ledger holds and starts the background work. Grants that were under
// way when a process died are hunted down, grants that are alive end when their time comes, and
// revocations go on. It is called once, before the first request.
//
// Errors: Unavailable when the ledger cannot be read or written.
func (b *Engine) Resume(ctx context.Context) error {
	const op = "resume"
	var alive []dueGrant
	var abandoned []broker.Grant
	var unsettled []broker.Revocation
	var watched []broker.Delegation
	err := b.view(ctx, op, func(tx broker.Tx) error {
		alive, abandoned, unsettled = nil, nil, nil
		err := eachLiveAs(tx, "", func(g standing) error {
			uncollected := g.Sealed != "" && g.Collected.IsZero() // what was kept for it went with the process
			if g.State == broker.StateIssued && g.Ending == "" && !uncollected {
				alive = append(alive, dueGrant{at: g.Expires, id: g.ID, backend: g.Backend})
			} else {
				abandoned = append(abandoned, broker.Grant{ID: g.ID, Backend: g.Backend})
			}
			return nil
		})
		if err != nil {
			return err
		}
		return eachRevocation(tx, func(rv broker.Revocation) error {
			if rv.Settled.IsZero() {
				unsettled = append(unsettled, rv)
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	if err := b.update(ctx, op, func(tx broker.Tx) (err error) {
		if watched, err = b.watched(tx, b.cfg.Now()); err != nil {
			return err
		}
		_, err = enter(tx, broker.Entry{At: b.cfg.Now(), Actor: "pawl", Op: broker.OpResume})
		return err
	}); err != nil {
		return err
	}
	b.closer.fill(alive)
	for _, d := range watched {
		b.watchdog.heard(d, b.cfg.Now())
	}
	b.background(b.watchdog.run)
	b.background(b.closer.run)
	b.background(b.runSweeps)
	b.closer.hurry(abandoned...)
	for _, rv := range unsettled {
		b.pursue(rv)
	}
	return nil
}

// standing is the part of a [Grant] that says when it must end: of a hundred thousand, nothing
// else is decoded.
type standing struct {
	ID      broker.GrantID    `json:"id"`
	State   broker.GrantState `json:"state"`
	Backend string            `json:"backend"`
	Expires time.Time         `json:"expires"`
	Ending  broker.Ending     `json:"ending"`

	Sealed    string    `json:"sealed"`
	Collected time.Time `json:"collected"`
}

// fill takes many due grants at once.
func (c *closer) fill(due []dueGrant) {
	slices.SortFunc(due, func(a, b dueGrant) int { return a.at.Compare(b.at) }) // sorted is a heap
	c.mu.Lock()
	defer c.mu.Unlock()
	c.due = append(due, c.due...)
}

func eachRevocation(tx broker.Tx, f func(broker.Revocation) error) error {
	var ids []broker.RevocationID
	if err := tx.Scan("r/", "", func(key string, _ []byte) bool {
		ids = append(ids, broker.RevocationID(key[2:]))
		return true
	}); err != nil {
		return err
	}
	for _, id := range ids {
		rv, ok, err := load[broker.Revocation](tx, keyRevocation(id))
		if err != nil {
			return err
		}
		if ok {
			if err := f(rv); err != nil {
				return err
			}
		}
	}
	return nil
}
