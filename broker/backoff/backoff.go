// Package backoff waits between the attempts of an operation that failed, twice as long after each attempt.
package backoff

import (
	"context"
	"math/rand/v2"
	"time"
)

// Exponential is a series of waits. The first is First, and each is twice the one before, up to Most. The zero value is
// ready for use: 100 ms, then up to a minute, without jitter. A copy continues by itself. Not safe for concurrent use.
type Exponential struct {
	First time.Duration // the first wait; zero or less: 100 ms
	Most  time.Duration // no wait is longer, not even the first; zero or less: 1 min
	// Jitter is the share of a wait that is random, from 0 to 1: a wait of d becomes one between (1-Jitter)*d and d.
	// So clients that failed together do not retry together, and Most stays the bound. Zero or less: none; over 1: 1.
	Jitter float64
	Random func() float64 // returns a number in [0, 1); nil: math/rand/v2

	waits int // made since the start or the last Reset
}

const (
	defaultFirst = 100 * time.Millisecond
	defaultMost  = time.Minute
)

// Next returns the next wait of the series. The caller waits itself, with [Sleep] or beside other events.
func (e *Exponential) Next() time.Duration {
	d := e.At(e.waits)
	e.waits++
	if e.Jitter > 0 {
		random := rand.Float64
		if e.Random != nil {
			random = e.Random
		}
		d -= time.Duration(min(e.Jitter, 1) * random() * float64(d))
	}
	return d
}

// At returns the wait after attempt n, which counts from 0, without jitter. It does not change the series. It is for a
// caller that keeps the number of attempts elsewhere.
func (e *Exponential) At(n int) time.Duration {
	first, most := e.First, e.Most
	if first <= 0 {
		first = defaultFirst
	}
	if most <= 0 {
		most = defaultMost
	}
	if n = max(n, 0); first > most>>n { // first<<n may overflow
		return most
	}
	return first << n
}

// Reset restarts the series: the next wait is the first one.
func (e *Exponential) Reset() { e.waits = 0 }

// Wait waits for [Exponential.Next]. It returns nil after the wait, or the cause of ctx as soon as ctx has ended.
func (e *Exponential) Wait(ctx context.Context) error { return Sleep(ctx, e.Next()) }

// Sleep waits for d. It returns nil after the wait, or the cause of ctx as soon as ctx has ended.
func Sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
	return context.Cause(ctx) // nil unless ctx has ended
}
