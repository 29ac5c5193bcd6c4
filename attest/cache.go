package attest

import (
	"maps"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Bounds of what is remembered, in entries of about 300 bytes.
const (
	maxVerified = 8192
	maxReplay   = 65536
)

// vouched is a caller whose signatures were checked.
type vouched struct {
	caller      broker.Caller
	by          any       // what vouches: the *pool or the JWT key. Another one, even an equal one, does not
	from, until time.Time // the window in which it holds, until excluded
}

// verified remembers checked signatures. A signature does not become wrong, so only what can
// change is looked at again: the clock, and whether the same authorities still vouch.
type verified struct {
	mu sync.Mutex // guards m
	m  map[[32]byte]vouched
}

func (c *verified) get(digest [32]byte, by any, now time.Time) (vouched, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.m[digest]
	return v, ok && v.by == by && !now.Before(v.from) && now.Before(v.until)
}

// put starts again from nothing when full: rare, bounded, and costs one check per caller.
func (c *verified) put(digest [32]byte, v vouched) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil || len(c.m) >= maxVerified {
		c.m = map[[32]byte]vouched{}
	}
	c.m[digest] = v
}

// replayed remembers tokens that were used, by the digest of header.payload: an ECDSA
// signature has a second spelling that verifies too.
type replayed struct {
	mu    sync.Mutex // guards until
	until map[[32]byte]time.Time
	limit int
}

func newReplayed(limit int) *replayed {
	return &replayed{until: map[[32]byte]time.Time{}, limit: limit}
}

// use marks a token as used up to its end. Full of tokens that can still be replayed, it
// refuses new ones: forgetting one would let it in again.
func (r *replayed) use(digest [32]byte, until, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if end, used := r.until[digest]; used && now.Before(end) {
		return refuse("the token was used before")
	}
	if len(r.until) >= r.limit {
		maps.DeleteFunc(r.until, func(_ [32]byte, end time.Time) bool { return !now.Before(end) })
	}
	if len(r.until) >= r.limit {
		return broker.Errorf(broker.Unavailable, "identify", "too many tokens at once").After(time.Second)
	}
	r.until[digest] = until
	return nil
}
