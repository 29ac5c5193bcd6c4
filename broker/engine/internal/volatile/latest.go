package volatile

import "sync"

// Latest keeps the values of the latest keys. It is a cache, or something that can be made again: a restart empties it.
type Latest[K comparable, V any] struct {
	Most int // keys that are kept

	mu    sync.Mutex // guards what follows
	kept  map[K]V
	order []K // the oldest first
}

// Put keeps a value, and forgets the oldest where there are too many.
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

// Get gives the value of a key that is kept.
func (l *Latest[K, V]) Get(key K) (value V, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	value, ok = l.kept[key]
	return value, ok
}
