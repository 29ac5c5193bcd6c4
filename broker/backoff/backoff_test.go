package backoff_test

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker/backoff"
)

const (
	ms  = time.Millisecond
	sec = time.Second
)

// TestNext checks the series without jitter, and At, which has the same waits.
func TestNext(t *testing.T) {
	for _, row := range []struct {
		name string
		e    backoff.Exponential
		want []time.Duration
	}{
		{"zero value", backoff.Exponential{}, []time.Duration{100 * ms, 200 * ms, 400 * ms, 800 * ms, 1600 * ms, 3200 * ms,
			6400 * ms, 12800 * ms, 25600 * ms, 51200 * ms, time.Minute, time.Minute}},
		{"negative", backoff.Exponential{First: -1, Most: -1, Jitter: -1}, []time.Duration{100 * ms, 200 * ms}},
		{"bound between two powers", backoff.Exponential{First: 10 * ms, Most: 50 * ms},
			[]time.Duration{10 * ms, 20 * ms, 40 * ms, 50 * ms, 50 * ms}},
		{"bound at a power", backoff.Exponential{First: 10 * ms, Most: 40 * ms},
			[]time.Duration{10 * ms, 20 * ms, 40 * ms, 40 * ms}},
		{"constant", backoff.Exponential{First: sec, Most: sec}, []time.Duration{sec, sec, sec}},
		{"bound below the first wait", backoff.Exponential{First: time.Hour, Most: sec}, []time.Duration{sec, sec}},
		{"bound below the default first wait", backoff.Exponential{Most: ms}, []time.Duration{ms, ms}},
		{"first wait over the default bound", backoff.Exponential{First: time.Hour},
			[]time.Duration{time.Minute, time.Minute}},
		{"jitter that is not a number", backoff.Exponential{First: sec, Jitter: math.NaN()}, []time.Duration{sec, 2 * sec}},
	} {
		for n, want := range row.want {
			if got := row.e.At(n); got != want {
				t.Errorf("%s: At(%d) = %v, want %v", row.name, n, got, want)
			}
			if got := row.e.Next(); got != want {
				t.Errorf("%s: Next() = %v as wait %d, want %v", row.name, got, n, want)
			}
		}
		row.e.Reset()
		if got := row.e.Next(); got != row.want[0] {
			t.Errorf("%s: Next() after Reset() = %v, want %v", row.name, got, row.want[0])
		}
	}
}

// TestNoOverflow checks that a wait neither overflows nor shrinks, however many attempts there were.
func TestNoOverflow(t *testing.T) {
	for _, most := range []time.Duration{1, 3, time.Hour, math.MaxInt64} {
		for _, jitter := range []float64{0, 1} {
			e := backoff.Exponential{First: 1, Most: most, Jitter: jitter, Random: func() float64 { return 0 }}
			for last := time.Duration(0); e.At(1000) != last; {
				next := e.Next()
				if next < last || next > most {
					t.Fatalf("Next() = %v after %v, with the bound %v", next, last, most)
				}
				last = next
			}
			for _, n := range []int{63, 64, 65, 1000, math.MaxInt} {
				if got := e.At(n); got != most {
					t.Errorf("At(%d) = %v, want %v", n, got, most)
				}
			}
			if got := e.At(-1); got != 1 {
				t.Errorf("At(-1) = %v, want 1ns", got)
			}
		}
	}
}

// TestJitter checks the two ends and the middle of the random share.
func TestJitter(t *testing.T) {
	almostOne := math.Nextafter(1, 0)
	for _, row := range []struct {
		jitter, random float64
		want           []time.Duration
	}{
		{0.5, 0, []time.Duration{sec, 2 * sec, 3 * sec}},
		{0.5, 0.5, []time.Duration{750 * ms, 1500 * ms, 2250 * ms}},
		{0.5, almostOne, []time.Duration{500 * ms, sec, 1500 * ms}},
		{0.1, 0.5, []time.Duration{950 * ms, 1900 * ms, 2850 * ms}},
		{1, 0.75, []time.Duration{250 * ms, 500 * ms, 750 * ms}},
		{7, 0.75, []time.Duration{250 * ms, 500 * ms, 750 * ms}},
		{0, almostOne, []time.Duration{sec, 2 * sec, 3 * sec}},
	} {
		e := backoff.Exponential{First: sec, Most: 3 * sec, Jitter: row.jitter, Random: func() float64 { return row.random }}
		for n, want := range row.want {
			if got := e.Next(); got < want || got > want+1 { // rounding
				t.Errorf("jitter %v, random %v: Next() = %v as wait %d, want %v", row.jitter, row.random, got, n, want)
			}
		}
	}
}

// TestJitterRange draws from a fixed source and from the default one. Both must fill the range and stay in it.
func TestJitterRange(t *testing.T) {
	for name, random := range map[string]func() float64{"fixed": rand.New(rand.NewPCG(1, 2)).Float64, "default": nil} {
		e := backoff.Exponential{First: sec, Most: sec, Jitter: 0.5, Random: random}
		var waits []time.Duration
		for range 1000 {
			waits = append(waits, e.Next())
		}
		if low, high := slices.Min(waits), slices.Max(waits); low < sec/2 || low > 550*ms || high > sec || high < 950*ms {
			t.Errorf("%s: 1,000 waits are between %v and %v, want them to fill 500ms to 1s", name, low, high)
		}
	}
}

// TestCopy checks that a copy is a series of its own.
func TestCopy(t *testing.T) {
	e := backoff.Exponential{First: sec}
	e.Next()
	c := e
	c.Next()
	if got, of := e.Next(), c.Next(); got != 2*sec || of != 4*sec {
		t.Errorf("Next() = %v, and %v of the copy, want 2s and 4s", got, of)
	}
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := backoff.Exponential{First: sec, Most: 3 * sec}
		for _, want := range []time.Duration{sec, 2 * sec, 3 * sec, 3 * sec} {
			began := time.Now()
			if err := e.Wait(t.Context()); err != nil || time.Since(began) != want {
				t.Errorf("Wait() = %v after %v, want nil after %v", err, time.Since(began), want)
			}
		}
	})
}

// TestWaitEnds checks that the end of the context ends a wait at once, and that its cause is the error. synctest fails
// if a goroutine remains.
func TestWaitEnds(t *testing.T) {
	cause := errors.New("the broker stops")
	for name, row := range map[string]struct {
		after time.Duration // from the start of the wait until the context ends
		wait  time.Duration
		want  error
	}{
		"before the wait":           {0, time.Hour, cause},
		"before a wait of no time":  {0, -1, cause},
		"during the wait":           {sec, time.Hour, cause},
		"after the wait":            {2 * sec, sec, nil},
		"after a wait of no time":   {sec, 0, nil},
		"never, with a short wait":  {time.Hour, ms, nil},
		"after a negative duration": {sec, -sec, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				if row.after == 0 {
					cancel(cause)
				} else {
					defer time.AfterFunc(row.after, func() { cancel(cause) }).Stop()
				}
				began := time.Now()
				err := backoff.Sleep(ctx, row.wait)
				if took := time.Since(began); took != max(0, min(row.after, row.wait)) {
					t.Errorf("Sleep(%v) took %v, with a context that ends after %v", row.wait, took, row.after)
				}
				if !errors.Is(err, row.want) {
					t.Errorf("Sleep(%v) = %v, want %v", row.wait, err, row.want)
				}
			})
		})
	}
}

// TestWaitEndsMidway checks that an ended context ends the wait of a series too, and counts as a wait.
func TestWaitEndsMidway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := backoff.Exponential{First: time.Hour, Most: 4 * time.Hour}
		ctx, cancel := context.WithTimeout(t.Context(), sec)
		defer cancel()
		began := time.Now()
		if err := e.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != sec {
			t.Errorf("Wait() = %v after %v, want %v after 1s", err, time.Since(began), context.DeadlineExceeded)
		}
		if got := e.Next(); got != 2*time.Hour {
			t.Errorf("Next() = %v, want 2h", got)
		}
	})
}
