// Package soak keeps a broker under a steady load for a long time, and shows whether its memory, files or ledger grow.
package soak

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Sample has the figures of the broker's process at one time.
type Sample struct {
	At         time.Duration // since the load began
	Steps      int           // taken and closed until then
	Goroutines float64
	Files      float64 // open file descriptors
	Heap       float64 // bytes that the last garbage collection left
	Free       float64 // pages of the ledger that no record uses
	Size       float64 // bytes of the ledger's file
}

// Config is a soak.
type Config struct {
	For    time.Duration
	Every  time.Duration // between samples, and between revocations
	Rate   float64       // steps a second
	Step   func(ctx context.Context, i int) error
	Revoke func(ctx context.Context) error // until it is closed
	Read   func(ctx context.Context) (Sample, error)
}

// MostFailed is the share of the steps that may fail: a step that meets a revocation does.
const MostFailed = 0.001

// Run puts the load on the broker and samples its figures. It returns the samples so far with any error: of a sample,
// of a revocation, or that too many steps failed.
func Run(ctx context.Context, c Config) (samples []Sample, err error) {
	ctx, stop := context.WithTimeout(ctx, c.For)
	defer stop()
	began := time.Now()
	var taken, failed atomic.Int64
	var first error // of the steps
	var once sync.Once
	load := make(chan struct{})
	go func() {
		defer close(load)
		pace(ctx, c.Rate, func(i int) {
			if err := c.Step(ctx, i); err == nil {
				taken.Add(1)
			} else if ctx.Err() == nil {
				failed.Add(1)
				once.Do(func() { first = err })
			}
		})
	}()
	tick := time.NewTicker(c.Every)
	defer tick.Stop()
	for err == nil {
		select {
		case <-ctx.Done():
			<-load
			return samples, outcome(taken.Load(), failed.Load(), first)
		case <-tick.C:
		}
		if err = c.Revoke(ctx); err == nil {
			var s Sample
			s, err = c.Read(ctx)
			if s.At, s.Steps = time.Since(began), int(taken.Load()); err == nil {
				samples = append(samples, s)
			}
		}
		if ctx.Err() != nil {
			err = nil
		}
	}
	stop()
	<-load
	return samples, err
}

func outcome(taken, failed int64, first error) error {
	switch {
	case taken == 0:
		return errors.Join(errors.New("no step was taken"), first)
	case float64(failed) > MostFailed*float64(taken):
		return fmt.Errorf("%d steps failed and %d were taken; the first failed with: %w", failed, taken, first)
	}
	return nil
}

// pace calls f perSecond times a second until ctx ends, without waiting for earlier calls, and returns when all have
// returned.
func pace(ctx context.Context, perSecond float64, f func(i int)) {
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(time.Duration(float64(time.Second) / perSecond))
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			wg.Go(func() { f(i) })
		}
	}
}

// Ends gives the medians of the samples around minute ten (or a sixth of the time, where that is sooner) and of the last
// ones, as many.
func Ends(samples []Sample, f func(Sample) float64) (early, late []float64) {
	const wide = 5
	if len(samples) < 2*wide {
		return nil, nil
	}
	at := min(10*time.Minute, samples[len(samples)-1].At/6)
	from := 0
	for i, s := range samples {
		if s.At <= at {
			from = i
		}
	}
	from = max(0, min(from-wide/2, len(samples)-2*wide))
	for i := range wide {
		early = append(early, f(samples[from+i]))
		late = append(late, f(samples[len(samples)-wide+i]))
	}
	return early, late
}
