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
func (k *Locks[K]) Lock(ctx context.Context, id K) (unlock func(), err error) {
	for {
		k.mu.Lock()
		busy, taken := k.held[id]
		if !taken {
			if k.held == nil {
				k.held = map[K]chan struct{}{}
			}
			mine := make(chan struct{})
			k.held[id] = mine
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				delete(k.held, id)
				k.mu.Unlock()
				close(mine)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
