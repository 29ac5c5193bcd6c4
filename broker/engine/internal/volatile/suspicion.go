package volatile

import (
	"sync"
	"time"
)

// Suspicion notes that Vault may hold leases that the ledger does not know, until a comparison shows that it holds none.
// It is safe for concurrent use.
type Suspicion struct {
	mu     sync.Mutex // guards raised and until
	raised bool
	until  time.Time // an unknown lease may still appear until then
}

// Raise notes a cause for suspicion. An unknown lease may appear as late as until.
func (s *Suspicion) Raise(until time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.raised = true; until.After(s.until) {
		s.until = until
	}
}

// Raised reports whether there is a suspicion.
func (s *Suspicion) Raised() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.raised
}

// Settle ends the suspicion after a comparison that began at the given time and found no orphaned lease. A suspicion
// with a later end remains.
func (s *Suspicion) Settle(began time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if began.After(s.until) {
		s.raised = false
	}
}
