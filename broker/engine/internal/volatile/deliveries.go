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
	ErrSealedTooLarge = errors.New("the sealed secret is larger than is kept")
	ErrSealedFull     = errors.New("too many sealed secrets wait to be collected")
)

// Deliveries holds the secrets that are sealed and not collected. Like every secret they are in no ledger, and a restart
// loses them: their grants are then ended.
type Deliveries struct {
	mu        sync.Mutex // guards what follows
	waiting   map[broker.GrantID]delivery
	perCaller map[spiffeid.ID]int
	bytes     int
}

type delivery struct {
	sealed []byte
	caller spiffeid.ID
}

// Reserve takes a place before anything is minted for it.
func (d *Deliveries) Reserve(g broker.Grant) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.waiting) >= broker.MaxWaiting || d.perCaller[g.Caller] >= broker.MaxWaitingEach || d.bytes >= broker.MaxSealedBytes {
		return broker.Errorf(broker.Unavailable, "issue", "%v; nothing was minted", ErrSealedFull).With(broker.CodeDeliveriesFull).After(time.Second)
	}
	if d.waiting == nil {
		d.waiting, d.perCaller = map[broker.GrantID]delivery{}, map[spiffeid.ID]int{}
	}
	d.waiting[g.ID] = delivery{caller: g.Caller}
	d.perCaller[g.Caller]++
	return nil
}

// Put fills the place. It fails when the grant has ended meanwhile, and its place is gone.
func (d *Deliveries) Put(id broker.GrantID, sealed []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	waiting, ok := d.waiting[id]
	switch {
	case !ok:
		return broker.Errorf(broker.Revoked, "issue", "it ended while it was on its way; nothing is handed out").With(broker.CodeFenced)
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

// Has reports whether a sealed secret waits.
func (d *Deliveries) Has(id broker.GrantID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.waiting[id].sealed != nil
}

// Take gives a delivery and forgets it; nil: there is none.
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

// Drop forgets what ends.
func (d *Deliveries) Drop(grants []broker.Grant) {
	for _, g := range grants {
		if g.Sealed != "" {
			d.Take(g.ID)
		}
	}
}
