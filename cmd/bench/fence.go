package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/cmd/bench/report"
)

// load is the number of issues a second while fences are measured.
const load = 50

// measureFence times fences over chains of 10 to 100,000 live grants, in turns, while other chains take steps. To
// repeat a fence on one chain it freezes the chain: that is the same transaction as a final fence, and can be lifted.
func measureFence(ctx context.Context, b *bench) (err error) {
	e, err := newEngine(ctx, filepath.Join(b.dir, "fence.db"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.close()) }()
	sizes := []int{10, 100, 1000, 10_000, 100_000}
	chains := make([]broker.ChainID, len(sizes))
	for i, n := range sizes {
		d, err := e.grow(ctx, n)
		if err != nil {
			return err
		}
		chains[i] = d.Chain
	}
	stop, err := e.busy(ctx)
	if err != nil {
		return err
	}
	took := make([]report.Samples, len(sizes))
	for range pick(b, 500, 100) {
		for _, i := range rand.Perm(len(sizes)) {
			d, err := e.freeze(ctx, chains[i])
			if err != nil {
				stop()
				return err
			}
			took[i] = append(took[i], ms(d))
		}
	}
	large := len(chains) - pick(b, 1, 2)
	closing, seconds, err := e.fenceWhileClosing(ctx, chains[0], chains[large], pick(b, 200, 50))
	issued := stop()
	if err != nil {
		return err
	}
	for i, n := range sizes {
		b.report.AddQuantile(report.Row{Name: fmt.Sprintf("fence.%d.p99_ms", n), Unit: "ms", Against: "a chain of 10 grants",
			Note: fmt.Sprintf("both under a load of %d steps", issued)}, 0.99, took[i], took[0])
	}
	b.report.AddQuantile(report.Row{Name: "fence.flatness", Unit: "ms, p50",
		Against: "a chain of 10 grants; ours is a chain of 100,000"}, 0.5, took[len(took)-1], took[0])
	b.report.AddQuantile(report.Row{Name: "fence.while_closing.p99_ms", Unit: "ms",
		Against: "the same chain of 10 while nothing is closed",
		Note:    fmt.Sprintf("ours while %d grants of another chain are closed", sizes[large])}, 0.99, closing, took[0])
	b.report.Add(report.Row{Name: fmt.Sprintf("close.engine.%d.seconds", sizes[large]), Unit: "s", N: sizes[large],
		Note: "from the command until each grant's end is proven and recorded; Vault and target in memory"}, report.Samples{seconds}, nil)
	return nil
}

// busy takes and closes steps on a chain of its own, [load] a second, until stop.
func (e *embedded) busy(ctx context.Context) (stop func() int, err error) {
	d, err := e.open(ctx)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex // guards issued
	issued := 0
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		pace(load, end, func(int) {
			got, err := e.issue(ctx, d)
			if err != nil {
				return
			}
			if _, err := e.Close(ctx, caller(), got.Grant.ID); err == nil {
				mu.Lock()
				issued++
				mu.Unlock()
			}
		})
	}()
	return func() int {
		close(end)
		<-done
		return issued
	}, nil
}

// freeze times one fence and lifts it again.
func (e *embedded) freeze(ctx context.Context, chain broker.ChainID) (time.Duration, error) {
	s, err := selector.Parse("chain:" + string(chain))
	if err != nil {
		return 0, err
	}
	began := time.Now()
	rv, err := e.Revoke(ctx, broker.Operator{Name: "ada"}, selector.Request{Selector: s, Reason: "bench", Freeze: true})
	took := time.Since(began)
	if err != nil {
		return 0, err
	}
	_, _ = e.Unfreeze(ctx, broker.Operator{Name: "ada"}, rv.ID) // "a second person is needed"
	_, err = e.Unfreeze(ctx, broker.Operator{Name: "grace"}, rv.ID)
	return took, err
}

// fenceWhileClosing revokes a large chain for good and meanwhile times fences on another one. It also gives the time
// until the large one is CLOSED.
func (e *embedded) fenceWhileClosing(
	ctx context.Context, small, large broker.ChainID, n int,
) (took report.Samples, seconds float64, err error) {
	s, err := selector.Parse("chain:" + string(large))
	if err != nil {
		return nil, 0, err
	}
	began := time.Now()
	rv, err := e.Revoke(ctx, broker.Operator{Name: "ada"}, selector.Request{Selector: s, Reason: "bench"})
	if err != nil {
		return nil, 0, err
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if len(took) < n {
			d, err := e.freeze(ctx, small)
			if err != nil {
				return nil, 0, err
			}
			took = append(took, ms(d))
		}
		if rv, err = e.Revocation(ctx, rv.ID); err != nil {
			return nil, 0, err
		}
		if !rv.Settled.IsZero() {
			return took, rv.Settled.Sub(began).Seconds(), nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
}

// measureVaultDown times fences over the operators' interface of the real broker: with the real Vault up, then paused
// (SIGSTOP), then killed. Each chain has a live secret.
func measureVaultDown(ctx context.Context, b *bench) error {
	w := b.world
	defer func() { w.close(); b.world = nil }() // its Vault has been killed by then
	client, err := w.agent("bench-down")
	if err != nil {
		return err
	}
	defer client.Close() //nolint:errcheck // it always succeeds
	n := pick(b, 200, 60)
	chains := make([]string, 3*n)
	if err := each(8, len(chains), func(i int) error {
		d, err := client.Open(ctx, agent.Chain{Task: "bench", Rights: []agent.Right{{Tool: "api.call", Use: true}}})
		if err != nil {
			return err
		}
		chains[i] = string(d.Info().Chain)
		_, err = d.Begin(ctx, agent.Call{Tool: "api.call", Args: agent.Args{"audience": "https://orders.pawl.dev"}})
		d.Leave()
		return err
	}); err != nil {
		return err
	}
	busy, err := client.Open(ctx, agent.Chain{Task: "busy", Rights: []agent.Right{{Tool: "notes.read", Use: true}}})
	if err != nil {
		return err
	}
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		pace(load, end, func(int) {
			one, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			_, _ = busy.Begin(one, agent.Call{Tool: "notes.read"}) // refused while Vault is down: then the refusals are the load
		})
	}()
	defer func() { close(end); <-done }()
	up, err := w.fences(ctx, chains[:n])
	if err != nil {
		return err
	}
	if err := w.env.Vault.Pause(); err != nil {
		return err
	}
	hanging, err := w.fences(ctx, chains[n:2*n])
	if err != nil {
		return errors.Join(err, w.env.Vault.Continue())
	}
	if err := w.env.Vault.Kill(); err != nil {
		return err
	}
	down, err := w.fences(ctx, chains[2*n:])
	if err != nil {
		return err
	}
	b.report.AddQuantile(report.Row{Name: "fence.vault_down.p99_ms", Unit: "ms",
		Against: "the same with Vault up; both over the operators' socket"}, 0.99, down, up)
	b.report.AddQuantile(report.Row{Name: "fence.vault_hanging.p99_ms", Unit: "ms",
		Against: "the same with Vault up"}, 0.99, hanging, up)
	return nil
}

func (w *world) fences(ctx context.Context, chains []string) (took report.Samples, err error) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for _, chain := range chains {
		<-tick.C
		began := time.Now()
		if _, err := w.operator.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + chain, Reason: "bench"}); err != nil {
			return took, err
		}
		took = append(took, ms(time.Since(began)))
	}
	return took, nil
}
