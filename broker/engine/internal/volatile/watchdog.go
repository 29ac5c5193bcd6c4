package volatile

import (
	"context"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/sched"
)

// Watchdog notices holders who promised a heartbeat and missed it. It is in memory alone: a sign of life is worth no
// write, and after a restart every holder has its whole interval again.
//
// A root is watched from its opening on. A delegation that was passed on is watched from its holder's first request on: an
// agent that was never started has been handed nothing.
type Watchdog struct {
	now    func() time.Time
	missed func(context.Context, broker.DelegationID) (recorded bool)
	wake   sched.Signal // the heap has an earlier first

	mu    sync.Mutex // guards what follows
	beats map[broker.DelegationID]*beat
	due   sched.Heap[*beat]
}

// beat is one delegation that is watched, until it expires or misses its heartbeat. A heartbeat does not move it in the heap: it is put
// off when its turn comes.
type beat struct {
	id    broker.DelegationID
	every time.Duration
	ends  time.Time // the delegation's own end
	last  time.Time // heartbeat
	at    time.Time // its turn in the heap
}

// Due is its turn.
func (b *beat) Due() time.Time { return b.at }

// NewWatchdog makes a Watchdog. missed is called for each missed heartbeat; when it is false, it is called again.
func NewWatchdog(now func() time.Time, missed func(context.Context, broker.DelegationID) bool) *Watchdog {
	return &Watchdog{now: now, missed: missed, beats: map[broker.DelegationID]*beat{}, wake: sched.NewSignal()}
}

// Beat notes a heartbeat of the delegation's holder, and watches for the next.
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

// BeatAgain notes a heartbeat of a holder that is watched.
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

// Run reports missed heartbeats until ctx ends.
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

// takeLate takes out of the heap those whose heartbeat is late, and gives how long the next can wait.
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

// report treats a missed heartbeat as its holder's breach. The holder is watched again from its next heartbeat on.
func (w *Watchdog) report(ctx context.Context, b *beat) {
	reportCtx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if w.missed(reportCtx, b.id) || ctx.Err() != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, rewatched := w.beats[b.id]; !rewatched {
		b.at = w.now().Add(time.Second) // once more: it is not on record
		w.watchLocked(b)
	}
}
