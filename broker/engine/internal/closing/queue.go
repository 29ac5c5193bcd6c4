package closing

import (
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/sched"
)

// Due is a grant to check at a time.
type Due struct {
	At      time.Time
	ID      broker.GrantID
	Backend string

	attempt int           // checks before this one
	alive   bool          // the target has not shown that the secret is dead: sever again
	grant   *broker.Grant // as read after its fence, which makes it end; nil: not read yet
}

// Due is the time of the check.
func (d Due) Due() time.Time { return d.At }

// queue collects grants until its one reader takes them all.
type queue struct {
	mu   sync.Mutex // guards due and busy
	due  map[broker.GrantID]Due
	busy bool // the reader works on the taken grants
	wake sched.Signal
}

func newQueue() *queue {
	return &queue{due: map[broker.GrantID]Due{}, wake: sched.NewSignal()}
}

// push adds all grants under one lock, so that the reader takes all of them. Otherwise it would work on the first of a
// thousand, and on the rest in a second pass.
func (q *queue) push(ds []Due) {
	if len(ds) == 0 {
		return
	}
	q.mu.Lock()
	for _, d := range ds {
		before := q.due[d.ID]
		d.attempt = max(before.attempt, d.attempt)
		if d.grant == nil {
			d.grant = before.grant
		}
		q.due[d.ID] = d
	}
	q.mu.Unlock()
	q.wake.Notify()
}

func (q *queue) take() map[broker.GrantID]Due {
	q.mu.Lock()
	defer q.mu.Unlock()
	taken := q.due
	q.due, q.busy = map[broker.GrantID]Due{}, true
	return taken
}

// done notes that the reader has finished the taken grants.
func (q *queue) done() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.busy = false
}

// isIdle reports whether the reader has finished every pushed grant.
func (q *queue) isIdle() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.due) == 0 && !q.busy
}
