package volatile

// Kept returns the number of backends and callers that are remembered.
func (t *Turns) Kept() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.backends) + len(t.waiting)
}
