package records

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// TestNoWindowHoldsMore lets steps come at random times against a limit, and counts the admitted ones in each window of
// that length: never more than the limit. It also checks that the limit is not far too strict, and the size.
func TestNoWindowHoldsMore(t *testing.T) {
	r := rand.New(rand.NewPCG(12, 2))
	for _, window := range []time.Duration{time.Minute, 7 * time.Minute, time.Hour, 2 * time.Hour, 24 * time.Hour, broker.MaxWindow} {
		const limit = 10
		var tally Tally
		var admitted []time.Time
		now := moment
		for range 3000 {
			now = now.Add(time.Duration(r.Int64N(int64(window) / 20)))
			past, frees := tally.Within(window, now)
			if past.Count >= limit {
				if again, _ := tally.Within(window, frees); again.Count >= limit || !frees.After(now) {
					t.Fatalf("window %v: at %v the limit frees at %v, and then holds %d", window, now, frees, again.Count)
				}
				continue
			}
			tally = tally.Add(now)
			admitted = append(admitted, now)
			first := 0
			for i, at := range admitted {
				if at.After(now.Add(-window)) {
					first = i
					break
				}
			}
			if in := len(admitted) - first; in > limit {
				t.Fatalf("window %v: %d steps in the one that ends at %v, limit %d", window, in, now, limit)
			}
			if len(tally.Buckets) > 121+170 {
				t.Fatalf("window %v: %d buckets", window, len(tally.Buckets))
			}
		}
		// A bucket counts whole, so up to a bucket's length more than the window may pass for each ten.
		unit := time.Minute
		if window > time.Hour {
			unit = time.Hour
		}
		if most := now.Sub(moment)/(window+2*unit)*limit - limit; len(admitted) < int(most) {
			t.Errorf("window %v: %d steps admitted in %v, want at least %d", window, len(admitted), now.Sub(moment), most)
		}
	}
}

// TestClockBack checks that a clock that steps forward and back, by less than the longest window, frees nothing.
func TestClockBack(t *testing.T) {
	var tally Tally
	for i := range 10 {
		tally = tally.Add(moment.Add(time.Duration(i) * time.Second))
	}
	ahead := tally.Add(moment.Add(3 * time.Hour)).Add(moment.Add(30 * time.Hour))
	for _, back := range []time.Duration{time.Minute, 10 * time.Minute, 59 * time.Minute} {
		if past, _ := ahead.Within(time.Hour, moment.Add(back)); past.Count < 10 {
			t.Errorf("%v after ten steps, with a clock that was ahead meanwhile, %d count", back, past.Count)
		}
	}
	if past, _ := tally.Within(time.Hour, moment.Add(-time.Hour)); past.Count != 10 {
		t.Errorf("an hour before the steps %d count, want 10", past.Count)
	}
}

// TestGiveBackStep checks that a step that came to nothing is taken out of its bucket, after its minute became an hour too.
func TestGiveBackStep(t *testing.T) {
	tally := Tally{}.Add(moment).Add(moment.Add(time.Second)).Add(moment.Add(2 * time.Hour))
	tally = tally.Change(moment, -1)
	if past, _ := tally.Within(24*time.Hour, moment.Add(2*time.Hour)); past.Count != 2 {
		t.Errorf("%d count, want 2 of 3", past.Count)
	}
	if again := tally.Change(moment, 1); again.Buckets[0].Count != 2 || tally.Buckets[0].Count != 1 {
		t.Errorf("counting it again gives %+v of %+v", again, tally)
	}
	if gone := tally.Change(moment, -1); len(gone.Buckets) != 1 {
		t.Errorf("an empty bucket stays: %+v", gone)
	}
	if same := tally.Change(moment.Add(-9*time.Hour), -1); len(same.Buckets) != 2 {
		t.Errorf("another bucket's step changes %+v", same)
	}
}
