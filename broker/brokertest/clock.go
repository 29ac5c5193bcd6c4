package brokertest

import (
	"sync"
	"time"
)

// Clock is a clock that moves only by Advance. Its zero value shows Epoch. It is safe for concurrent use.
type Clock struct {
	mu  sync.Mutex // guards ran
	ran time.Duration
}

// Epoch is the time at which a Clock starts.
var Epoch = time.Date(2026, time.January, 5, 9, 0, 0, 0, time.UTC)

// Now returns the time, in UTC.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return Epoch.Add(c.ran)
}

// Advance moves the clock by d, backwards when d is negative, and returns the new time.
func (c *Clock) Advance(d time.Duration) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ran += d
	return Epoch.Add(c.ran)
}
