// Package sched has the small parts of background work: a heap of due items, a set of busy keys, locks by key, and a
// signal.
package sched

import (
	"container/heap"
	"sync"
	"time"
)

// Item has a due time.
type Item interface{ Due() time.Time }

// Heap orders items by due time, the earliest first. The zero Heap is empty. It is not safe for concurrent use.
type Heap[T Item] struct{ items items[T] }

// Len counts the items.
func (h *Heap[T]) Len() int { return len(h.items) }

// First returns the earliest item. There must be one.
func (h *Heap[T]) First() T { return h.items[0] }

// Add adds an item, and reports whether it is the earliest.
func (h *Heap[T]) Add(item T) (first bool) {
	heap.Push(&h.items, item)
	return h.items[0].Due().Equal(item.Due())
}

// Pop removes and returns the earliest item. There must be one.
func (h *Heap[T]) Pop() T { return heap.Pop(&h.items).(T) }

// Each replaces every item by f of it.
func (h *Heap[T]) Each(f func(T) T) {
	for i := range h.items {
		h.items[i] = f(h.items[i])
	}
	heap.Init(&h.items)
}

// Fill adds many items at once.
func (h *Heap[T]) Fill(more []T) {
	h.items = append(h.items, more...)
	heap.Init(&h.items)
}

type items[T Item] []T

func (h items[T]) Len() int           { return len(h) }
func (h items[T]) Less(i, j int) bool { return h[i].Due().Before(h[j].Due()) }
func (h items[T]) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *items[T]) Push(x any)        { *h = append(*h, x.(T)) }
func (h *items[T]) Pop() any {
	old := *h
	last := old[len(old)-1]
	*h = old[:len(old)-1]
	return last
}

// Busy is a set of keys with work in progress. The zero Busy is empty. It is safe for concurrent use.
type Busy[K comparable] struct {
	Most int // concurrent keys; zero: no limit

	mu   sync.Mutex // guards keys
	keys map[K]bool
}

// Begin adds a key. It returns false when the key is in the set already, or the set is full.
func (b *Busy[K]) Begin(k K) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.keys[k] || b.Most > 0 && len(b.keys) >= b.Most {
		return false
	}
	if b.keys == nil {
		b.keys = map[K]bool{}
	}
	b.keys[k] = true
	return true
}

// End removes a key.
func (b *Busy[K]) End(k K) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.keys, k)
}

// Has reports whether a key is in the set.
func (b *Busy[K]) Has(k K) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.keys[k]
}

// Signal wakes one goroutine, which then reads the state again. It carries no data, and may merge notifications.
type Signal chan struct{}

// NewSignal makes a Signal.
func NewSignal() Signal { return make(Signal, 1) }

// Notify wakes the goroutine. It never blocks.
func (s Signal) Notify() {
	select {
	case s <- struct{}{}:
	default:
	}
}
