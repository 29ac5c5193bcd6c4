// Package closing ends grants and proves them dead, with one worker for each backend. A grant must end when it expires,
// is fenced, is closed by its agent, or when its issue failed.
package closing

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/sched"
)

// Config configures a [Reaper]. All fields are required.
type Config struct {
	Vault    broker.Vault
	Backends map[string]broker.Backend
	Now      func() time.Time
	Alarm    func(op string, err error) // must not block

	View   func(ctx context.Context, op string, f func(*records.Tx) error) error
	Update func(ctx context.Context, op string, f func(*records.Tx) error) error
	Order  func(ctx context.Context, op string, f func(*records.Tx) error, done func(error)) error

	Undeliverable func(*broker.Grant) bool // reports whether no collector can get the grant's sealed secret any more
	Discard       func([]broker.Grant)     // drops the sealed secrets of grants that end

	Reconcile func(broker.Revocation) // closes a revocation that Reopen has opened

	Context    context.Context // the lifetime of background work
	Background func(func())    // runs f in a goroutine that the owner waits for

	CallTimeout time.Duration // of one call to Vault
	Workers     int           // concurrent calls to Vault for each backend
}

// Reaper ends grants. It holds ids and times only. The state of each grant is in the ledger, and the engine fills the
// reaper from the ledger after a restart. It is safe for concurrent use.
//
// Each backend has its own worker, so a dead backend delays no other. A worker severs first, without waiting for Vault.
// It kills and proves after that.
type Reaper struct {
	cfg     Config
	minting sched.Busy[broker.GrantID] // an issue of this process works on the grant: its mint may be in flight
	lost    sched.Busy[broker.GrantID] // grants whose ISSUED the ledger has failed to write
	asked   sched.Busy[broker.GrantID] // their agents close them, and the ledger does not have that yet
	left    leftovers
	wake    sched.Signal // wakes Run: the heap has a new first item

	mu        sync.Mutex // guards the fields below
	due       sched.Heap[Due]
	nextCheck map[broker.GrantID]time.Time // of a grant that the last check did not end; later ones in due are void
	checked   time.Time                    // the time of the last dispatchDue
	workers   map[string]*worker
	waiting   map[broker.GrantID][]chan struct{} // callers that wait for a grant to be closed
	progress  map[broker.GrantID][]*Progress
	givenUp   map[string]bool // leases that Vault has given up revoking
	replaced  map[string]int  // how often another server was seen in the place of a backend's target
	limited   time.Time       // until then Vault asked for no more revocations of tokens
}

// New makes a Reaper. Nothing is scheduled before [Reaper.Run].
func New(cfg Config) *Reaper {
	return &Reaper{cfg: cfg, wake: sched.NewSignal(), left: newLeftovers(cfg.Now()), nextCheck: map[broker.GrantID]time.Time{},
		workers: map[string]*worker{}, waiting: map[broker.GrantID][]chan struct{}{},
		progress: map[broker.GrantID][]*Progress{}, replaced: map[string]int{}}
}

// BeginMint notes that this process is issuing the grant, and schedules the grant's end.
func (r *Reaper) BeginMint(g broker.Grant) {
	r.minting.Begin(g.ID)
	r.schedule(Due{At: g.Expires, ID: g.ID, Backend: g.Backend})
}

// EndMint notes that this process has no mint in flight for the grant any more.
func (r *Reaper) EndMint(id broker.GrantID) { r.minting.End(id) }

// IsMinting reports whether an issue of this process works on the grant.
func (r *Reaper) IsMinting(id broker.GrantID) bool { return r.minting.Has(id) }

// Closed returns a channel that is closed when the grant has been recorded as CLOSED. The caller must call cancel.
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

// EndNow checks grants at once, and ends those that must end.
func (r *Reaper) EndNow(grants ...broker.Grant) {
	now := make([]Due, len(grants))
	for i, g := range grants {
		now[i] = Due{ID: g.ID, Backend: g.Backend}
	}
	r.dispatch(now)
}

// EndLost ends a grant whose ISSUED the ledger has failed to write. Its secret may be in use. It stays a grant that must
// end for as long as the process lives, whatever the ledger has of it: such a failure is rare.
func (r *Reaper) EndLost(g broker.Grant) {
	r.lost.Begin(g.ID)
	r.EndNow(g)
}

// EndFenced is [Reaper.EndNow] for grants that were read after their fence. The worker severs them without reading them
// again: to read a thousand grants takes as long as to sever half of them.
func (r *Reaper) EndFenced(grants []broker.Grant) {
	now := make([]Due, len(grants))
	for i := range grants {
		g := grants[i]
		g.Ending = cmp.Or(g.Ending, broker.EndingRevoked)
		now[i] = Due{ID: g.ID, Backend: g.Backend, grant: &g}
	}
	r.dispatch(now)
}

// dispatch enqueues the grants at the workers of their backends.
func (r *Reaper) dispatch(ds []Due) {
	by := map[string][]Due{}
	for _, d := range ds {
		by[d.Backend] = append(by[d.Backend], d)
	}
	for backend, part := range by {
		r.worker(backend).push(part)
	}
}

// Severing reports whether the worker of one of the backends has grants left to sever.
func (r *Reaper) Severing(backends map[string]bool) bool {
	for backend := range backends {
		if !r.worker(backend).sever.isIdle() {
			return true
		}
	}
	return false
}

// worker returns the backend's worker. It starts the worker at the first use.
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

// Schedule takes over grants from the list of live ones: it ends the abandoned ones now, and the others at their expiry.
func (r *Reaper) Schedule(list []records.Scheduled) {
	var due []Due
	var abandoned []broker.Grant
	for _, s := range list {
		if s.Abandoned {
			abandoned = append(abandoned, broker.Grant{ID: s.ID, Backend: s.Backend})
		} else {
			due = append(due, Due{At: s.Expires, ID: s.ID, Backend: s.Backend})
		}
	}
	r.mu.Lock()
	r.due.Fill(due)
	r.mu.Unlock()
	r.wake.Notify()
	r.EndNow(abandoned...)
}

// maxWait is about the longest delay of [worker.retry].
const maxWait = 15 * time.Second

// schedule checks a grant at d.At. It keeps only the earliest of repeated checks. EndNow may come any number of times
// for a grant, and each check of a grant that does not end schedules another. Without this limit the checks would
// multiply. It shortens the delay of a repeated check to maxWait, in case the clock was set back.
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

// Run dispatches due grants to the workers until the engine stops.
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

// dispatchDue dispatches the due grants. It returns the time until the next one is due, at most maxWait.
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
				continue // an earlier check replaced it
			}
			delete(r.nextCheck, d.ID)
		}
		ready = append(ready, d)
	}
	r.mu.Unlock()
	r.dispatch(ready)
	return next
}

// clockSetBackLocked corrects the scheduled checks after the clock was set back. A clock that was hours ahead scheduled
// them hours too late.
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

// Limit notes that Vault refused to revoke a token because it limits the rate of requests. Until the time that Vault
// named, of at most maxWait, it is not asked to revoke others. Every other error is ignored.
func (r *Reaper) Limit(err error) {
	var refusal *broker.Error
	if !errors.As(err, &refusal) || refusal.Code != broker.CodeVaultBusy {
		return
	}
	until := r.cfg.Now().Add(min(refusal.RetryAfter, maxWait))
	r.mu.Lock()
	defer r.mu.Unlock()
	if until.After(r.limited) {
		r.limited = until
	}
}

// Limited returns the error for a revocation of a token that Vault is not asked for now, and when it can be asked again.
// The error is nil while Vault can be asked.
func (r *Reaper) Limited() (again time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.limited.After(r.cfg.Now()) {
		err = errLimited
	}
	return r.limited, err
}

var errLimited = errors.New("Vault limits the rate of revocations")

// SetGivenUp replaces the set of leases that Vault has given up revoking. It returns the new ones among them.
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
