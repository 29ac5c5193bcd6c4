package attest

import (
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// maxVerified is the limit of cached entries, of about 300 bytes each.
const maxVerified = 8192

// vouched is a caller with verified signatures.
type vouched struct {
	caller      broker.Caller
	by          any       // the *pool or the JWT key that verified it; an equal copy of it is not accepted
	from, until time.Time // the validity period, until excluded
}

// verified caches verified signatures. A valid signature stays valid, so a hit needs only the checks that can change:
// the time, and whether the authorities are still the same.
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

// put empties a full cache first. That is rare, and costs one signature check for each caller.
func (c *verified) put(digest [32]byte, v vouched) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil || len(c.m) >= maxVerified {
		c.m = map[[32]byte]vouched{}
	}
	c.m[digest] = v
}
