package volatile

import (
	"context"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/sched"
)

// Watchdog detects missed heartbeats. It is in memory only, since a heartbeat is not worth a write. After a restart
// every holder has its whole interval again.
//
// The watch of a root starts when its chain is opened. The watch of a delegation that was passed on starts with its
// holder's first request: an agent that never ran has no secret.
type Watchdog struct {
	now    func() time.Time
	missed func(context.Context, broker.DelegationID) (recorded bool)
	wake   sched.Signal // wakes Run: the heap has a new first item

	mu    sync.Mutex // guards the fields below
	beats map[broker.DelegationID]*beat
	due   sched.Heap[*beat]
}

// beat is one watched delegation, until it expires or misses its heartbeat. A heartbeat does not move it in the heap.
// When the item is due, takeLate reschedules it.
type beat struct {
	id    broker.DelegationID
	every time.Duration
	ends  time.Time // the delegation's own end
	last  time.Time // the last heartbeat
	at    time.Time // due in the heap
}

// Due is the time at which takeLate checks the delegation.
func (b *beat) Due() time.Time { return b.at }

// NewWatchdog makes a Watchdog. It calls missed for each missed heartbeat, and again until missed returns true.
func NewWatchdog(now func() time.Time, missed func(context.Context, broker.DelegationID) bool) *Watchdog {
	return &Watchdog{now: now, missed: missed, beats: map[broker.DelegationID]*beat{}, wake: sched.NewSignal()}
}

// Beat notes a heartbeat of the delegation's holder, and starts the watch if there is none.
func (w *Watchdog) Beat(d broker.Delegation, now time.Time) {
	if d.Heartbeat == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if b, known := w.beats[d.ID]; known {
		b.last = now
		return
	}
	w.watchLocked(&beat{id: d.ID, every: d.Heartbeat, ends: d.Expires, last: now, at: now.Add(d.Heartbeat)})
}

// BeatAgain notes a heartbeat of a watched delegation's holder. It starts no watch.
func (w *Watchdog) BeatAgain(id broker.DelegationID, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if b, known := w.beats[id]; known {
		b.last = now
	}
}

func (w *Watchdog) watchLocked(b *beat) {
	w.beats[b.id] = b
	if w.due.Add(b) {
		w.wake.Notify()
	}
}

// Run reports missed heartbeats, until ctx ends.
func (w *Watchdog) Run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		late, next := w.takeLate(w.now())
		for _, b := range late {
			w.report(ctx, b)
		}
		timer.Reset(next)
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		case <-timer.C:
		}
	}
}

// takeLate removes the delegations with a late heartbeat from the heap, and returns the time until the next is due.
func (w *Watchdog) takeLate(now time.Time) (late []*beat, next time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.due.Len() > 0 {
		if wait := w.due.First().at.Sub(now); wait > 0 {
			return late, min(wait, time.Minute)
		}
		b := w.due.Pop()
		if deadline := b.last.Add(b.every); now.Before(deadline) && now.Before(b.ends) {
			b.at = deadline
			w.due.Add(b)
			continue
		}
		delete(w.beats, b.id)
		if now.Before(b.ends) {
			late = append(late, b)
		}
	}
	return late, time.Minute
}

// report reports a missed heartbeat. The holder's next heartbeat starts a new watch.
func (w *Watchdog) report(ctx context.Context, b *beat) {
	reportCtx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if w.missed(reportCtx, b.id) || ctx.Err() != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, rewatched := w.beats[b.id]; !rewatched {
		b.at = w.now().Add(time.Second) // retry: the ledger has no record of it
		w.watchLocked(b)
	}
}
