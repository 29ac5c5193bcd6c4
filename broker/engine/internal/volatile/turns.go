package volatile

import (
	"cmp"
	"container/list"
	"context"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
)

// Turns lets callers mint in turn. A number of steps run at a time for each backend, and the callers with steps that
// wait for that backend get the next place in rounds: a caller with many steps waits for itself. A backend that hangs
// holds up its own steps only. A restart loses the steps that wait, and nothing was recorded for them.
type Turns struct {
	AtOnce  int           // steps of one backend that run at a time; zero means 64
	Each    int           // steps of one caller that wait; zero means 64
	Longest time.Duration // that a step waits
	Refused func()        // is called for each step that Each refuses; nil means no call

	mu       sync.Mutex // guards the fields below
	backends map[string]*turns
	waiting  map[spiffeid.ID]int
}

// turns are those of one backend.
type turns struct {
	running int
	callers list.List                     // of *queue: those with waiting steps, the next one first
	queues  map[spiffeid.ID]*list.Element // in callers
}

// queue has the waiting steps of one caller, oldest first.
type queue struct {
	caller spiffeid.ID
	steps  list.List // of chan struct{}, each closed when its turn has come
}

// Take waits for the caller's turn at a backend. The caller must call done when the step has ended.
//
// Errors: OverLimit when too many steps of the caller wait, Unavailable when the turn does not come in time.
func (t *Turns) Take(ctx context.Context, backend string, caller spiffeid.ID) (done func(), err error) {
	t.mu.Lock()
	b := t.backends[backend]
	if b == nil {
		b = &turns{queues: map[spiffeid.ID]*list.Element{}}
		if t.backends == nil {
			t.backends, t.waiting = map[string]*turns{}, map[spiffeid.ID]int{}
		}
		t.backends[backend] = b
	}
	done = func() { t.done(backend, b) }
	if b.running < cmp.Or(t.AtOnce, 64) {
		b.running++
		t.mu.Unlock()
		return done, nil
	}
	most := cmp.Or(t.Each, 64)
	if t.waiting[caller] >= most {
		t.mu.Unlock()
		if t.Refused != nil {
			t.Refused()
		}
		return nil, broker.Errorf(broker.OverLimit, "issue", "%d steps of %s wait for their mint", most, caller).
			With(broker.CodeTooManyMints).After(time.Second)
	}
	turn := make(chan struct{})
	e := t.waitLocked(b, caller, turn)
	t.mu.Unlock()
	longest := time.NewTimer(t.Longest)
	defer longest.Stop()
	select {
	case <-turn:
		return done, nil
	case <-ctx.Done():
	case <-longest.C:
	}
	if !t.leave(b, caller, e, turn) {
		done() // the turn came at the same moment
	}
	return nil, broker.Errorf(broker.Unavailable, "issue",
		"other steps at this backend take too long; nothing was minted").
		With(broker.CodeBackendDown).After(time.Second)
}

func (t *Turns) waitLocked(b *turns, caller spiffeid.ID, turn chan struct{}) *list.Element {
	t.waiting[caller]++
	at := b.queues[caller]
	if at == nil {
		at = b.callers.PushBack(&queue{caller: caller})
		b.queues[caller] = at
	}
	return at.Value.(*queue).steps.PushBack(turn)
}

// leave takes a waiting step out of its queue. It is false when its turn has come.
func (t *Turns) leave(b *turns, caller spiffeid.ID, e *list.Element, turn chan struct{}) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-turn:
		return false
	default:
	}
	at := b.queues[caller]
	at.Value.(*queue).steps.Remove(e)
	t.leftLocked(b, at)
	return true
}

// done gives a place to the first step of the next caller.
func (t *Turns) done(name string, b *turns) {
	t.mu.Lock()
	defer t.mu.Unlock()
	at := b.callers.Front()
	if at == nil {
		if b.running--; b.running == 0 {
			delete(t.backends, name)
		}
		return
	}
	steps := &at.Value.(*queue).steps
	close(steps.Remove(steps.Front()).(chan struct{}))
	b.callers.MoveToBack(at)
	t.leftLocked(b, at)
}

// leftLocked forgets a step that waits no more, and a queue without steps.
func (t *Turns) leftLocked(b *turns, at *list.Element) {
	q := at.Value.(*queue)
	if t.waiting[q.caller]--; t.waiting[q.caller] == 0 {
		delete(t.waiting, q.caller)
	}
	if q.steps.Len() == 0 {
		b.callers.Remove(at)
		delete(b.queues, q.caller)
	}
}

// Waiting returns the number of steps that wait.
func (t *Turns) Waiting() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, w := range t.waiting {
		n += w
	}
	return n
}
