package records

import (
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Tally counts the steps of one subject over time, in buckets: by the minute, and by the hour once the whole hour lies an
// hour back. A bucket counts whole as long as a part of it is in the window, so no window of that length holds more
// steps than a limit. It has at most some 290 buckets.
type Tally struct {
	Tool    broker.ToolName // of a history; empty: of a limit
	Buckets []Bucket        // in the order of their beginnings
	Last    time.Time       // the latest step
}

// Bucket counts the steps in one minute or one hour of the clock.
type Bucket struct {
	First   time.Time // the first step in it
	Minutes int       // its length: 1 or 60
	Count   int
}

func (b Bucket) length() time.Duration { return time.Duration(b.Minutes) * time.Minute }
func (b Bucket) start() time.Time      { return b.First.Truncate(b.length()) }
func (b Bucket) end() time.Time        { return b.start().Add(b.length()) }

// Within returns the steps in the window that ends now, and when the oldest of them leave it. In a window of more than
// an hour a minute counts like its hour, which it becomes. Buckets that begin later than now count too: a clock that
// steps back frees nothing.
func (t Tally) Within(window time.Duration, now time.Time) (past broker.Past, frees time.Time) {
	for _, b := range t.Buckets {
		end := b.end()
		if window > time.Hour {
			end = Bucket{First: b.First, Minutes: 60}.end()
		}
		if !end.After(now.Add(-window)) {
			continue
		}
		if past.Count == 0 {
			past.First, past.Last, frees = b.First, t.Last, end.Add(window)
		}
		past.Count += b.Count
	}
	return past, frees
}

// Add counts a step. It makes hours of old minutes, and drops buckets that no window can reach. The buckets of t are not
// changed: other readers share them.
func (t Tally) Add(now time.Time) Tally {
	next := Tally{Tool: t.Tool, Last: now}
	if t.Last.After(now) {
		next.Last = t.Last
	}
	for _, b := range t.Buckets {
		if !b.end().After(now.Add(-broker.MaxWindow)) {
			continue
		}
		if hour := (Bucket{First: b.First, Minutes: 60}); b.Minutes == 1 && !hour.end().After(now.Add(-time.Hour)) {
			b.Minutes = 60
		}
		next.put(b)
	}
	next.put(Bucket{First: now, Minutes: 1, Count: 1})
	return next
}

// put adds a bucket, or its count to the same one.
func (t *Tally) put(b Bucket) {
	for i, other := range t.Buckets {
		if other.Minutes == b.Minutes && other.start().Equal(b.start()) {
			if b.First.Before(other.First) {
				t.Buckets[i].First = b.First
			}
			t.Buckets[i].Count += b.Count
			return
		}
	}
	at := len(t.Buckets)
	for at > 0 && t.Buckets[at-1].start().After(b.start()) {
		at--
	}
	t.Buckets = slices.Insert(t.Buckets, at, b)
}

// Change adds n to the bucket that a step was counted in: -1 gives it back. It does nothing when the bucket is gone.
func (t Tally) Change(at time.Time, n int) Tally {
	next := t
	next.Buckets = slices.Clone(t.Buckets)
	for i := len(next.Buckets) - 1; i >= 0; i-- {
		if b := &next.Buckets[i]; !at.Before(b.start()) && at.Before(b.end()) {
			if b.Count = max(0, b.Count+n); b.Count == 0 {
				next.Buckets = slices.Delete(next.Buckets, i, i+1)
			}
			return next
		}
	}
	return next
}

// over reports whether no window can reach a bucket of it any more.
func (t Tally) over(now time.Time) bool {
	return !slices.ContainsFunc(t.Buckets, func(b Bucket) bool { return b.end().After(now.Add(-broker.MaxWindow)) })
}
