package volatile

import (
	"errors"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
)

// The refusals of [Deliveries.Put].
var (
	ErrSealedTooLarge = errors.New("the sealed secret is too large to be kept")
	ErrSealedFull     = errors.New("too many sealed secrets wait to be collected")
)

// Deliveries keeps the sealed secrets until they are collected. Like every secret they are in no ledger. A restart
// loses them, and their grants are then ended.
type Deliveries struct {
	mu        sync.Mutex // guards the fields below
	waiting   map[broker.GrantID]delivery
	perCaller map[spiffeid.ID]int
	bytes     int
}

type delivery struct {
	sealed []byte
	caller spiffeid.ID
}

// Reserve takes a place for the grant's secret, before the mint.
func (d *Deliveries) Reserve(g broker.Grant) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.waiting) >= broker.MaxWaiting || d.perCaller[g.Caller] >= broker.MaxWaitingEach ||
		d.bytes >= broker.MaxSealedBytes {
		return broker.Errorf(broker.Unavailable, "issue", "%v; nothing was minted", ErrSealedFull).
			With(broker.CodeDeliveriesFull).After(time.Second)
	}
	if d.waiting == nil {
		d.waiting, d.perCaller = map[broker.GrantID]delivery{}, map[spiffeid.ID]int{}
	}
	d.waiting[g.ID] = delivery{caller: g.Caller}
	d.perCaller[g.Caller]++
	return nil
}

// Put puts the sealed secret into its place. It fails when the grant has ended meanwhile, which drops the place.
func (d *Deliveries) Put(id broker.GrantID, sealed []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	waiting, ok := d.waiting[id]
	switch {
	case !ok:
		return broker.Errorf(broker.Revoked, "issue", "the grant ended while the step was in flight; nothing is handed out").
			With(broker.CodeFenced)
	case len(sealed) > broker.MaxSealed:
		return ErrSealedTooLarge
	case d.bytes+len(sealed) > broker.MaxSealedBytes:
		return ErrSealedFull
	}
	waiting.sealed = sealed
	d.waiting[id] = waiting
	d.bytes += len(sealed)
	return nil
}

// Has reports whether a grant's sealed secret waits to be collected.
func (d *Deliveries) Has(id broker.GrantID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.waiting[id].sealed != nil
}

// Take removes and returns a grant's sealed secret; nil: there is none.
func (d *Deliveries) Take(id broker.GrantID) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	taken, ok := d.waiting[id]
	if !ok {
		return nil
	}
	delete(d.waiting, id)
	if d.perCaller[taken.caller]--; d.perCaller[taken.caller] == 0 {
		delete(d.perCaller, taken.caller)
	}
	d.bytes -= len(taken.sealed)
	return taken.sealed
}

// Drop removes the sealed secrets of grants that end.
func (d *Deliveries) Drop(grants []broker.Grant) {
	for _, g := range grants {
		if g.Sealed != "" {
			d.Take(g.ID)
		}
	}
}

// Waiting returns the grants whose sealed secrets wait to be collected.
func (d *Deliveries) Waiting() (ids []broker.GrantID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, w := range d.waiting {
		if w.sealed != nil {
			ids = append(ids, id)
		}
	}
	return ids
}
