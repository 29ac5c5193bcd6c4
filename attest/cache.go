package attest

import (
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// maxVerified bounds what is remembered, in entries of about 300 bytes.
const maxVerified = 8192

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
