package wire

import (
	"container/list"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/pawlsec/pawl/broker"
)

// shares bounds what each caller writes into the ledger. A caller may write a quarter of a day's share at once, and the
// rest over the day. Entries and records count with an estimate of the space that they take in the file;
// TestShareCountsTheFile compares it with a file of delegations. A restart forgets the sum.
type shares struct {
	perDay int64 // bytes

	mu      sync.Mutex               // guards the fields below
	byActor map[string]*list.Element // in recent
	recent  list.List                // of *share, the last one first
}

type share struct {
	actor   string
	limiter *rate.Limiter
}

const (
	maxShares = 10_000
	// entryOverhead is what an entry takes besides its texts: its other fields, digests and index.
	entryOverhead = 600
	// fileFactor is how much more than its records the file grows: the pages of a tree are not full, and the end of a
	// step is recorded by the broker itself.
	fileFactor = 2
)

func newShares(perDay int64) *shares {
	return &shares{perDay: perDay, byActor: map[string]*list.Element{}}
}

// charge counts bytes that an actor has written.
func (s *shares) charge(actor string, bytes int, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.byActor[actor]
	if e == nil {
		if s.recent.Len() >= maxShares {
			delete(s.byActor, s.recent.Remove(s.recent.Back()).(*share).actor)
		}
		limiter := rate.NewLimiter(rate.Limit(float64(s.perDay)*3/4/86400), int(s.perDay/4))
		e = s.recent.PushFront(&share{actor, limiter})
		s.byActor[actor] = e
	}
	s.recent.MoveToFront(e)
	l := e.Value.(*share).limiter
	l.ReserveN(now, min(bytes*fileFactor, l.Burst()))
}

// wait returns zero, or the time after which the caller may write again.
func (s *shares) wait(actor string, now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.byActor[actor]
	if e == nil {
		return 0
	}
	l := e.Value.(*share).limiter
	if left := l.TokensAt(now); left < 0 {
		return time.Duration(-left/float64(l.Limit())*float64(time.Second)) + time.Second
	}
	return 0
}

// sizeOf estimates what an entry takes in the ledger.
func sizeOf(e broker.Entry) int {
	n := entryOverhead + len(e.Actor) + len(e.Detail)
	for _, p := range e.Policies {
		n += len(p)
	}
	return n
}
