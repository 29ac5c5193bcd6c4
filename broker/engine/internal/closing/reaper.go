// Package closing ends what must end, per backend, and proves it: grants that expired, that are fenced, that their agent
// closed, and those whose issue failed.
package closing

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/sched"
)

// Config is what a [Reaper] works with. All fields are required.
type Config struct {
	Vault    broker.Vault
	Backends map[string]broker.Backend
	Now      func() time.Time
	Alarm    func(op string, err error) // must not block

	View   func(ctx context.Context, op string, f func(*records.Tx) error) error
	Update func(ctx context.Context, op string, f func(*records.Tx) error) error

	Undeliverable func(*broker.Grant) bool // no agent can get the grant's sealed secret any more
	Discard       func([]broker.Grant)     // the sealed secrets of grants that end

	Context    context.Context // the lifetime of background work
	Background func(func())    // runs f in a goroutine that the owner waits for

	CallTimeout time.Duration // of one call to Vault
	Workers     int           // calls to Vault at once for each backend
}

// Reaper ends grants. It holds ids and times only: the ledger says how each grant stands, and a restart fills the reaper
// from it. It is safe for concurrent use.
//
// Each backend has a worker of its own, so that a dead backend delays no other. In a worker, severing waits for
// nothing; killing in Vault and proving follow.
type Reaper struct {
	cfg     Config
	minting sched.Busy[broker.GrantID] // an issue of this process works on it: its mint may be under way
	wake    sched.Signal               // of the clock: the heap has an earlier first

	mu        sync.Mutex // guards what follows
	due       sched.Heap[Due]
	nextCheck map[broker.GrantID]time.Time // the next check of a grant that a check did not end; later ones in due are void
	checked   time.Time                    // by the clock, at the last look at due
	workers   map[string]*worker
	waiting   map[broker.GrantID][]chan struct{} // callers that wait for a grant to be closed
	progress  map[broker.GrantID][]*Progress
	givenUp   map[string]bool // leases that Vault has given up revoking
}

// New makes a Reaper. Nothing is scheduled before [Reaper.Run].
func New(cfg Config) *Reaper {
	return &Reaper{cfg: cfg, wake: sched.NewSignal(), nextCheck: map[broker.GrantID]time.Time{}, workers: map[string]*worker{},
		waiting: map[broker.GrantID][]chan struct{}{}, progress: map[broker.GrantID][]*Progress{}}
}

// BeginMint notes a grant that this process is issuing, and when it must end.
func (r *Reaper) BeginMint(g broker.Grant) {
	r.minting.Begin(g.ID)
	r.schedule(Due{At: g.Expires, ID: g.ID, Backend: g.Backend})
}

// EndMint notes that no mint of this process is under way for the grant any more.
func (r *Reaper) EndMint(id broker.GrantID) { r.minting.End(id) }

// IsMinting reports whether an issue of this process works on the grant.
func (r *Reaper) IsMinting(id broker.GrantID) bool { return r.minting.Has(id) }

// Closed gives a channel that is closed when the grant has been recorded as CLOSED. cancel must be called.
func (r *Reaper) Closed(id broker.GrantID) (closed <-chan struct{}, cancel func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	done := make(chan struct{})
	r.waiting[id] = append(r.waiting[id], done)
	return done, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.waiting[id] = slices.DeleteFunc(r.waiting[id], func(d chan struct{}) bool { return d == done })
		if len(r.waiting[id]) == 0 {
			delete(r.waiting, id)
		}
	}
}

// EndNow ends grants without waiting for their time.
func (r *Reaper) EndNow(grants ...broker.Grant) {
	now := make([]Due, len(grants))
	for i, g := range grants {
		now[i] = Due{ID: g.ID, Backend: g.Backend}
	}
	r.dispatch(now)
}

// EndFenced is [Reaper.EndNow] for grants that were read after they were fenced. They are severed without being read
// again: reading a thousand takes as long as severing half of them.
func (r *Reaper) EndFenced(grants []broker.Grant) {
	now := make([]Due, len(grants))
	for i := range grants {
		g := grants[i]
		g.Ending = cmp.Or(g.Ending, broker.EndingRevoked)
		now[i] = Due{ID: g.ID, Backend: g.Backend, grant: &g}
	}
	r.dispatch(now)
}

// dispatch gives each worker its part.
func (r *Reaper) dispatch(ds []Due) {
	by := map[string][]Due{}
	for _, d := range ds {
		by[d.Backend] = append(by[d.Backend], d)
	}
	for backend, part := range by {
		r.worker(backend).push(part)
	}
}

// Severing reports whether one of the backends still severs what it was given.
func (r *Reaper) Severing(backends map[string]bool) bool {
	for backend := range backends {
		if !r.worker(backend).sever.isIdle() {
			return true
		}
	}
	return false
}

// worker gives the backend's worker, which runs from its first use on.
func (r *Reaper) worker(backend string) *worker {
	r.mu.Lock()
	defer r.mu.Unlock()
	w, ok := r.workers[backend]
	if !ok {
		w = newWorker(r, backend)
		r.workers[backend] = w
		r.cfg.Background(w.runSever)
		r.cfg.Background(func() { w.runClose(w.quick) })
		r.cfg.Background(func() { w.runClose(w.bulk) })
	}
	return w
}

// Fill schedules many grants at once.
func (r *Reaper) Fill(due []Due) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.due.Fill(due)
}

// maxWait is about the longest that [worker.retry] puts a grant off.
const maxWait = 15 * time.Second

// schedule checks a grant later. Of repeated checks only the earliest is kept: a grant may be hurried any number
// of times, and otherwise each check of a grant that cannot be ended would be followed by another one for good. When the clock was ahead
// and has been set right, what it put off is checked soon.
func (r *Reaper) schedule(d Due) {
	most := r.cfg.Now().Add(maxWait)
	r.mu.Lock()
	if d.attempt > 0 {
		if d.At.After(most) {
			d.At = most
		}
		if next, ok := r.nextCheck[d.ID]; ok && !d.At.Before(next) {
			r.mu.Unlock()
			return
		}
		r.nextCheck[d.ID] = d.At
	}
	first := r.due.Add(d)
	r.mu.Unlock()
	if first {
		r.wake.Notify()
	}
}

// Run gives due grants to the workers until the broker stops.
func (r *Reaper) Run() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		timer.Reset(r.dispatchDue())
		select {
		case <-r.cfg.Context.Done():
			return
		case <-r.wake:
		case <-timer.C:
		}
	}
}

// dispatchDue gives every due grant to its worker, and returns how long the next can wait.
func (r *Reaper) dispatchDue() time.Duration {
	now := r.cfg.Now()
	var ready []Due
	next := maxWait
	r.mu.Lock()
	if now.Before(r.checked) {
		r.clockSetBackLocked(now)
	}
	r.checked = now
	for r.due.Len() > 0 {
		if wait := r.due.First().At.Sub(now); wait > 0 {
			next = min(next, wait)
			break
		}
		d := r.due.Pop()
		if d.attempt > 0 {
			if !r.nextCheck[d.ID].Equal(d.At) {
				continue // an earlier check took its place
			}
			delete(r.nextCheck, d.ID)
		}
		ready = append(ready, d)
	}
	r.mu.Unlock()
	r.dispatch(ready)
	return next
}

// setBackLocked is for a clock that was ahead and has been set right: what it put off for seconds must not wait for
// the hours that it was ahead.
func (r *Reaper) clockSetBackLocked(now time.Time) {
	r.due.Each(func(d Due) Due {
		if d.attempt == 0 || d.At.Sub(now) <= maxWait {
			return d
		}
		if r.nextCheck[d.ID].Equal(d.At) {
			r.nextCheck[d.ID] = now.Add(maxWait)
		}
		d.At = now.Add(maxWait)
		return d
	})
}

// SetGivenUp takes over the leases that Vault has given up revoking, and gives those that are new among them.
func (r *Reaper) SetGivenUp(leases map[string]bool) (fresh []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id := range leases {
		if !r.givenUp[id] {
			fresh = append(fresh, id)
		}
	}
	r.givenUp = leases
	return fresh
}

// GivenUp counts the leases that Vault has given up revoking.
func (r *Reaper) GivenUp() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.givenUp)
}

func (r *Reaper) isGivenUp(lease string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.givenUp[lease]
}
