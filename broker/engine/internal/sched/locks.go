package sched

import (
	"context"
	"sync"
)

// Locks serializes work on one key without stopping work on others. The zero Locks are open.
type Locks[K comparable] struct {
	mu   sync.Mutex // guards held
	held map[K]chan struct{}
}

// Lock waits for the key; the returned function gives it back.
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
