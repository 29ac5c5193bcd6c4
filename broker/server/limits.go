package server

import (
	"cmp"
	"container/list"
	"context"
	"net/http"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limits bound the requests of one caller: a SPIFFE ID, with all of its SVIDs, connections and chains.
type Limits struct {
	// Requests of an agent a second, in bursts of as many; zero means 200. Requests that only end something (close,
	// heartbeat, acknowledge) count apart, so that an agent which asks too fast can still end its steps.
	Requests       int
	Introspections int // of a service a second; zero means 2000
	Streams        int // open event streams of an agent; zero means 50
	Bodies         int // request bodies that are arriving, and of all clients without identity together; zero means 32

	// Share returns how long a caller must not write into the ledger, because it has written its share; nil: zero.
	Share   func(caller string, now time.Time) time.Duration
	Refused func(limit string) // is called for each request that a limit refuses; nil means no call
}

// The names of the limits, for Refused.
const (
	LimitRequests       = "requests"
	LimitIntrospections = "introspections"
	LimitStreams        = "streams"
	LimitBodies         = "bodies"
	LimitAllBodies      = "all_bodies"
	LimitLedger         = "ledger_per_day"
	LimitReads          = "operator_reads"
)

// Limits that no configuration changes.
const (
	maxBodies          = 512   // bodies of all callers that are arriving
	maxOperatorStreams = 256   // of one operator
	maxOperatorReads   = 64    // of one operator at a time
	maxCallers         = 10000 // whose rates are remembered
	maxHeld            = 1000  // refusals of one caller that are held back
)

func (l Limits) orDefaults() Limits {
	l.Requests = cmp.Or(l.Requests, 200)
	l.Introspections = cmp.Or(l.Introspections, 2000)
	l.Streams = cmp.Or(l.Streams, 50)
	l.Bodies = cmp.Or(l.Bodies, 32)
	if l.Refused == nil {
		l.Refused = func(string) {}
	}
	return l
}

// rates has the rate of each caller. It remembers the callers that were seen last. One that is forgotten has a whole
// burst again, which it has after a second without a request anyway.
type rates struct {
	name  string // of the limit
	limit int    // requests a second, and the burst

	mu       sync.Mutex               // guards the fields below
	byCaller map[string]*list.Element // in recent
	recent   list.List                // of *callerRate, the last one first
}

type callerRate struct {
	caller  string
	limiter *rate.Limiter
}

func newRates(name string, limit int) *rates {
	return &rates{name: name, limit: limit, byCaller: map[string]*list.Element{}}
}

// take counts a request. It returns zero, or the time after which the caller may send the next one.
func (r *rates) take(caller string, now time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.byCaller[caller]
	if !ok {
		if r.recent.Len() >= maxCallers {
			last := r.recent.Back()
			delete(r.byCaller, r.recent.Remove(last).(*callerRate).caller)
		}
		e = r.recent.PushFront(&callerRate{caller, rate.NewLimiter(rate.Limit(r.limit), r.limit)})
		r.byCaller[caller] = e
	}
	r.recent.MoveToFront(e)
	reserved := e.Value.(*callerRate).limiter.ReserveN(now, 1)
	wait := reserved.DelayFrom(now)
	if wait > 0 {
		reserved.CancelAt(now)
	}
	return wait
}

// bodies has the request bodies that are arriving. An honest one takes milliseconds.
type bodies struct {
	mu       sync.Mutex     // guards the fields below
	byCaller map[string]int // how many
	arriving list.List      // of *arrival, oldest first
}

type arrival struct {
	caller  string // empty: no identity
	control *http.ResponseController
	dropped bool
}

// enter counts a body that begins to arrive. leave reverses that, and reports whether the body was dropped. Beyond the
// limit of all callers the oldest body is dropped; without identity, the oldest one without identity.
func (b *bodies) enter(caller string, each int, control *http.ResponseController) (leave func() bool, limit string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.byCaller == nil {
		b.byCaller = map[string]int{}
	}
	switch {
	case b.byCaller[caller] >= each && caller != "":
		return nil, LimitBodies
	case b.byCaller[caller] >= each:
		limit = LimitBodies
		b.dropLocked(func(a *arrival) bool { return a.caller == "" })
	case b.arriving.Len() >= maxBodies:
		limit = LimitAllBodies
		b.dropLocked(func(*arrival) bool { return true })
	}
	a := &arrival{caller: caller, control: control}
	e := b.arriving.PushBack(a)
	b.byCaller[caller]++
	return func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		if !a.dropped {
			b.removeLocked(e)
		}
		return a.dropped
	}, limit
}

// dropLocked drops the oldest body that may be dropped: its next read fails.
func (b *bodies) dropLocked(may func(*arrival) bool) {
	for e := b.arriving.Front(); e != nil; e = e.Next() {
		if a := e.Value.(*arrival); may(a) {
			a.dropped = true
			_ = a.control.SetReadDeadline(time.Unix(1, 0)) // a recorder in a test has no socket
			b.removeLocked(e)
			return
		}
	}
}

func (b *bodies) removeLocked(e *list.Element) {
	a := b.arriving.Remove(e).(*arrival)
	if b.byCaller[a.caller]--; b.byCaller[a.caller] == 0 {
		delete(b.byCaller, a.caller)
	}
}

// counted bounds how many of something each holder has at a time.
type counted struct {
	mu     sync.Mutex // guards counts
	counts map[string]int
}

// enter counts one more, unless the holder has most already. leave reverses that.
func (c *counted) enter(holder string, most int) (leave func(), ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counts[holder] >= most {
		return nil, false
	}
	if c.counts == nil {
		c.counts = map[string]int{}
	}
	c.counts[holder]++
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.counts[holder]--; c.counts[holder] == 0 {
			delete(c.counts, holder)
		}
	}, true
}

// holdRefusal is how long the answer to a request beyond the rate is held back, so that a client which asks again at
// once costs little.
const holdRefusal = 250 * time.Millisecond

func hold(ctx context.Context) {
	timer := time.NewTimer(holdRefusal)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
