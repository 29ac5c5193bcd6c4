package sched

import (
	"context"
	"sync"
)

// Locks serializes the work on each key. Work on different keys runs concurrently. The zero Locks are unlocked.
type Locks[K comparable] struct {
	mu   sync.Mutex // guards held
	held map[K]chan struct{}
}

// Lock locks the key. It waits until the key is free or ctx ends.
func (l *Locks[K]) Lock(ctx context.Context, id K) (unlock func(), err error) {
	for {
		l.mu.Lock()
		busy, taken := l.held[id]
		if !taken {
			if l.held == nil {
				l.held = map[K]chan struct{}{}
			}
			released := make(chan struct{})
			l.held[id] = released
			l.mu.Unlock()
			return func() {
				l.mu.Lock()
				delete(l.held, id)
				l.mu.Unlock()
				close(released)
			}, nil
		}
		l.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
