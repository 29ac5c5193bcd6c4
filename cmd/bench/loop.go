package main

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/cmd/bench/report"
)

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// loop is the result of a closed loop of clients.
type loop struct {
	took      time.Duration
	latencies report.Samples // in milliseconds
	err       error          // the first; it stops its client
}

func (l loop) perSecond() float64 { return float64(len(l.latencies)) / l.took.Seconds() }

// closedLoop makes each client call f repeatedly, until d has passed or all of them together have begun most calls.
func closedLoop(clients int, d time.Duration, most int, f func(client int) error) loop {
	var mu sync.Mutex // guards l and begun
	var l loop
	begun := 0
	next := func(end time.Time) bool {
		mu.Lock()
		defer mu.Unlock()
		begun++
		return begun <= most && l.err == nil && time.Now().Before(end)
	}
	var wg sync.WaitGroup
	start := time.Now()
	for c := range clients {
		wg.Go(func() {
			var mine report.Samples
			for next(start.Add(d)) {
				began := time.Now()
				if err := f(c); err != nil {
					mu.Lock()
					l.err = err
					mu.Unlock()
					break
				}
				mine = append(mine, ms(time.Since(began)))
			}
			mu.Lock()
			l.latencies = append(l.latencies, mine...)
			mu.Unlock()
		})
	}
	wg.Wait()
	l.took = time.Since(start)
	return l
}

// each calls f for 0 to n-1 from several workers. The first error stops it.
func each(workers, n int, f func(i int) error) error {
	g, ctx := errgroup.WithContext(context.Background()) // ends with the first error
	g.SetLimit(workers)
	for i := 0; i < n && ctx.Err() == nil; i++ {
		g.Go(func() error { return f(i) })
	}
	return g.Wait()
}

// pace calls f perSecond times a second until stop, without waiting for earlier calls. It returns when all calls have
// returned.
func pace(perSecond float64, stop <-chan struct{}, f func(i int)) {
	var wg sync.WaitGroup
	tick := time.NewTicker(time.Duration(float64(time.Second) / perSecond))
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-stop:
			wg.Wait()
			return
		case <-tick.C:
			wg.Go(func() { f(i) })
		}
	}
}
