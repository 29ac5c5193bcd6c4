package engine

import (
	"container/heap"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

func checkHeartbeat(op string, d time.Duration) error {
	if d != 0 && (d < broker.MinHeartbeat || d > broker.MaxChainTTL) {
		return broker.Errorf(broker.Malformed, op, "the heartbeat must be %s to %s, or none", broker.MinHeartbeat, broker.MaxChainTTL)
	}
	return nil
}

// watchdog notices holders who promised to be heard and are not. It is in memory alone: a sign of
// life is worth no write, and after a restart every holder has its whole interval again.
//
// A root is watched from its opening on. What was passed on is watched from its holder's first
// request on: an agent that was never started has been handed nothing.
type watchdog struct {
	b *Engine

	mu    sync.Mutex // guards what follows
	beats map[broker.DelegationID]*beat
	due   beatHeap
	wake  chan struct{} // the heap has an earlier head
}

// beat is one delegation that is watched, until it is over or was missed. Being heard does not move
// it in the heap: when its turn comes it is put off.
type beat struct {
	id    broker.DelegationID
	every time.Duration
	over  time.Time // the delegation's own end
	heard time.Time
	at    time.Time // its turn in the heap
}

type beatHeap []*beat

func (h beatHeap) Len() int           { return len(h) }
func (h beatHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h beatHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *beatHeap) Push(x any)        { *h = append(*h, x.(*beat)) }
func (h *beatHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	*h = old[:len(old)-1]
	return last
}

func newWatchdog(b *Engine) *watchdog {
	return &watchdog{b: b, beats: map[broker.DelegationID]*beat{}, wake: make(chan struct{}, 1)}
}

// heard notes a sign of life of the delegation's holder, and watches for the next.
func (w *watchdog) heard(d broker.Delegation, now time.Time) {
	if d.Heartbeat == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if t, known := w.beats[d.ID]; known {
		t.heard = now
		return
	}
	w.watchLocked(&beat{id: d.ID, every: d.Heartbeat, over: d.Expires, heard: now, at: now.Add(d.Heartbeat)})
}

// again notes a sign of life of somebody who is watched.
func (w *watchdog) again(id broker.DelegationID, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t, known := w.beats[id]; known {
		t.heard = now
	}
}

func (w *watchdog) watchLocked(t *beat) {
	w.beats[t.id] = t
	heap.Push(&w.due, t)
	if w.due[0] == t {
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

// run raises what was missed until the broker stops.
func (w *watchdog) run() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		missed, next := w.turn(w.b.cfg.Now())
		for _, t := range missed {
			w.raise(t)
		}
		timer.Reset(next)
		select {
		case <-w.b.ctx.Done():
			return
		case <-w.wake:
		case <-timer.C:
		}
	}
}

// turn takes those out of the heap that were not heard in time, and gives how long the next can wait.
func (w *watchdog) turn(now time.Time) (missed []*beat, next time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.due) > 0 {
		t := w.due[0]
		if wait := t.at.Sub(now); wait > 0 {
			return missed, min(wait, time.Minute)
		}
		if late := t.heard.Add(t.every); now.Before(late) && now.Before(t.over) {
			t.at = late
			heap.Fix(&w.due, 0)
			continue
		}
		heap.Pop(&w.due)
		delete(w.beats, t.id)
		if now.Before(t.over) {
			missed = append(missed, t)
		}
	}
	return missed, time.Minute
}

// raise treats a missed heartbeat as its holder's breach. It is watched again when it is heard again.
func (w *watchdog) raise(t *beat) {
	ctx, cancel := context.WithTimeout(w.b.ctx, 10*time.Second)
	defer cancel()
	err := w.b.lostHeartbeat(ctx, t.id)
	if err == nil || w.b.ctx.Err() != nil {
		return
	}
	w.b.cfg.Alarm("recording a lost heartbeat", err)
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, back := w.beats[t.id]; !back {
		t.at = w.b.cfg.Now().Add(time.Second) // once more: it is not on record
		w.watchLocked(t)
	}
}

// lostHeartbeat records the violation and what policy says follows; without a word of policy nothing
// does. Of a delegation that is over, or revoked, nothing is expected.
func (b *Engine) lostHeartbeat(ctx context.Context, id broker.DelegationID) error {
	const op = "heartbeat"
	now := b.cfg.Now()
	var p path
	var open bool
	err := b.view(ctx, op, func(tx broker.Tx) (err error) {
		if p, err = b.readPath(tx, op, id); err == nil {
			open, err = b.stillOpen(tx, p, now)
		}
		return err
	})
	if err != nil || !open {
		return err
	}
	holder := p.leaf().Holder
	d := b.cfg.Policy().Decide(violationQuestion(broker.Caller{ID: holder}, p, broker.ViolationHeartbeat, broker.Tool{}, now))
	_, err = b.applyConsequence(ctx, breach{op: op, code: broker.ViolationHeartbeat, actor: holder.String(), path: p, decision: d, freeze: holder, now: now})
	return err
}

// stillOpen reports whether nothing on the path is revoked or past its time. A freeze may be lifted.
func (b *Engine) stillOpen(tx broker.Tx, p path, now time.Time) (bool, error) {
	over, err := b.finalOver(tx, p)
	return err == nil && len(over) == 0 && !slices.ContainsFunc(p.nodes, func(d broker.Delegation) bool { return !now.Before(d.Expires) }), err
}

// watched gives the delegations that the watchdog takes up at a start: roots, and what was passed on
// to somebody who has used it. Those that are over leave the list of what is watched.
func (b *Engine) watched(tx broker.Tx, now time.Time) (list []broker.Delegation, err error) {
	var ids []broker.DelegationID
	if err := tx.Scan(keyBeat(""), "", func(key string, _ []byte) bool {
		ids = append(ids, broker.DelegationID(key[len(keyBeat("")):]))
		return true
	}); err != nil {
		return nil, err
	}
	for _, id := range ids {
		p, err := b.readPath(tx, "resume", id)
		if err != nil {
			return nil, err
		}
		open, err := b.stillOpen(tx, p, now)
		if err == nil && !open {
			err = tx.Put(keyBeat(id), nil)
		}
		if err != nil {
			return nil, err
		}
		if d := p.leaf(); open && (d.Parent == "" || len(d.Tokens) > 0) {
			list = append(list, d)
		}
	}
	return list, nil
}
