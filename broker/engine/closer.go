package engine

import (
	"cmp"
	"container/heap"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// closer ends grants: those whose time is over, those that are fenced, those that their agent
// closed and those that came to nothing. It holds ids and times only; the ledger says how each
// stands, and a restart fills the closer from it.
//
// Each backend has a lane of its own, so that a dead one delays no other. In a lane, severing
// waits for nothing; killing in Vault and proving follow.
type closer struct {
	b *Engine

	mu      sync.Mutex // guards what follows
	due     dueHeap
	again   map[broker.GrantID]time.Time // the next look at a grant that a look did not end; later ones in due are void
	looked  time.Time                    // by the clock, at the last look at due
	lanes   map[string]*lane
	minting map[broker.GrantID]bool            // an issue of this process is at work on it: its mint may be under way
	waiting map[broker.GrantID][]chan struct{} // who waits for a grant to be over
	wake    chan struct{}                      // of the clock: the heap has an earlier head
}

func newCloser(b *Engine) *closer {
	return &closer{b: b, again: map[broker.GrantID]time.Time{}, lanes: map[string]*lane{}, minting: map[broker.GrantID]bool{},
		waiting: map[broker.GrantID][]chan struct{}{}, wake: make(chan struct{}, 1)}
}

// dueGrant is a grant to be looked at at a time.
type dueGrant struct {
	at      time.Time
	id      broker.GrantID
	backend string
	attempt int
	open    bool          // the target has not said that it is dead: sever again
	grant   *broker.Grant // as read after its fence, because of which it must end; nil: to be read
}

type dueHeap []dueGrant

func (h dueHeap) Len() int           { return len(h) }
func (h dueHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h dueHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *dueHeap) Push(x any)        { *h = append(*h, x.(dueGrant)) }
func (h *dueHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	*h = old[:len(old)-1]
	return last
}

// begin notes a grant that this process is issuing, and when it must end.
func (c *closer) begin(g broker.Grant) {
	c.mu.Lock()
	c.minting[g.ID] = true
	c.mu.Unlock()
	c.at(dueGrant{at: g.Expires, id: g.ID, backend: g.Backend})
}

// settled notes that no mint of this process is under way for the grant any more.
func (c *closer) settled(id broker.GrantID) {
	c.mu.Lock()
	delete(c.minting, id)
	c.mu.Unlock()
}

// isMinting reports whether an issue of this process is at work on the grant.
func (c *closer) isMinting(id broker.GrantID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.minting[id]
}

// over gives a channel that is closed when the closer has recorded the grant as CLOSED.
func (c *closer) over(id broker.GrantID) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	done := make(chan struct{})
	c.waiting[id] = append(c.waiting[id], done)
	return done
}

// announce tells whoever waits that grants are over.
func (c *closer) announce(ids []broker.GrantID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range ids {
		for _, done := range c.waiting[id] {
			close(done)
		}
		delete(c.waiting, id)
	}
}

// forget drops a channel that nobody waits on any more.
func (c *closer) forget(id broker.GrantID, done <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting[id] = slices.DeleteFunc(c.waiting[id], func(d chan struct{}) bool { return d == done })
	if len(c.waiting[id]) == 0 {
		delete(c.waiting, id)
	}
}

// hurry has grants ended now.
func (c *closer) hurry(grants ...broker.Grant) {
	now := make([]dueGrant, len(grants))
	for i, g := range grants {
		now[i] = dueGrant{id: g.ID, backend: g.Backend}
	}
	c.hand(now)
}

// cut is hurry for grants that were read after they were fenced. They need no second look before they are severed,
// and a look at a thousand takes as long as cutting half of them.
func (c *closer) cut(grants []broker.Grant) {
	now := make([]dueGrant, len(grants))
	for i := range grants {
		g := &grants[i]
		g.Ending = cmp.Or(g.Ending, broker.EndingRevoked)
		now[i] = dueGrant{id: g.ID, backend: g.Backend, grant: g}
	}
	c.hand(now)
}

// hand gives each lane its part.
func (c *closer) hand(ds []dueGrant) {
	by := map[string][]dueGrant{}
	for _, d := range ds {
		by[d.backend] = append(by[d.backend], d)
	}
	for backend, part := range by {
		c.lane(backend).push(part)
	}
}

// severing reports whether one of the backends is being told to cut what it was handed.
func (c *closer) severing(backends map[string]bool) bool {
	for backend := range backends {
		if !c.lane(backend).sever.idle() {
			return true
		}
	}
	return false
}

// at has a grant looked at later. Of the looks that follow others only the earliest is kept: a grant may be hurried
// any number of times, and each look at what cannot be ended would have another one follow it for ever. What was put
// off by a clock that has been set right since is looked at soon.
func (c *closer) at(d dueGrant) {
	most := c.b.cfg.Now().Add(mostWait)
	c.mu.Lock()
	if d.attempt > 0 {
		if d.at.After(most) {
			d.at = most
		}
		if next, ok := c.again[d.id]; ok && !d.at.Before(next) {
			c.mu.Unlock()
			return
		}
		c.again[d.id] = d.at
	}
	heap.Push(&c.due, d)
	first := c.due[0].id == d.id
	c.mu.Unlock()
	if first {
		select {
		case c.wake <- struct{}{}:
		default:
		}
	}
}

// run moves what is due into the lanes until the broker stops.
func (c *closer) run() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		timer.Reset(c.moveDue())
		select {
		case <-c.b.ctx.Done():
			return
		case <-c.wake:
		case <-timer.C:
		}
	}
}

// moveDue hands everything due to its lane and gives how long the next can wait.
func (c *closer) moveDue() time.Duration {
	now := c.b.cfg.Now()
	var ready []dueGrant
	next := mostWait
	c.mu.Lock()
	if now.Before(c.looked) {
		c.setBackLocked(now)
	}
	c.looked = now
	for len(c.due) > 0 {
		if wait := c.due[0].at.Sub(now); wait > 0 {
			next = min(next, wait)
			break
		}
		d := heap.Pop(&c.due).(dueGrant)
		if d.attempt > 0 {
			if !c.again[d.id].Equal(d.at) {
				continue // an earlier look took its place
			}
			delete(c.again, d.id)
		}
		ready = append(ready, d)
	}
	c.mu.Unlock()
	c.hand(ready)
	return next
}

// mostWait is about the longest that [lane.later] puts a grant off.
const mostWait = 15 * time.Second

// setBackLocked is for a clock that was ahead and has been set right: what was put off for seconds by
// it must not wait for the hours that it was ahead.
func (c *closer) setBackLocked(now time.Time) {
	for i, d := range c.due {
		if d.attempt > 0 && d.at.Sub(now) > mostWait {
			c.due[i].at = now.Add(mostWait)
			if c.again[d.id].Equal(d.at) {
				c.again[d.id] = c.due[i].at
			}
		}
	}
	heap.Init(&c.due)
}

// lane gives the backend's lane, which runs from its first use on.
func (c *closer) lane(backend string) *lane {
	c.mu.Lock()
	defer c.mu.Unlock()
	l, ok := c.lanes[backend]
	if !ok {
		l = &lane{b: c.b, backend: backend, sever: newInbox(), settle: newInbox(), killed: map[string]time.Time{}}
		c.lanes[backend] = l
		c.b.background(l.runSever)
		c.b.background(l.runSettle)
	}
	return l
}
