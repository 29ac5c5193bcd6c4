package volatile

import "sync"

// Latest keeps the values of the latest keys. It is for values that can be computed again: a restart empties it.
type Latest[K comparable, V any] struct {
	Most int // keys to keep

	mu    sync.Mutex // guards the fields below
	kept  map[K]V
	order []K // the oldest first
}

// Put keeps a value. When there are too many keys, it drops the oldest.
func (l *Latest[K, V]) Put(key K, value V) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.kept == nil {
		l.kept = map[K]V{}
	}
	if _, known := l.kept[key]; !known {
		l.order = append(l.order, key)
	}
	l.kept[key] = value
	if len(l.order) > l.Most {
		delete(l.kept, l.order[0])
		l.order = l.order[1:]
	}
}

// Get returns the value of a kept key.
func (l *Latest[K, V]) Get(key K) (value V, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	value, ok = l.kept[key]
	return value, ok
}
