package main

import (
	"context"
	"fmt"
	"time"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/bench/report"
	"github.com/pawlsec/pawl/cmd/dev"
)

// measureChain times opening a chain, delegating, and closing a step with its proof. One client makes our
// calls and theirs in turns.
func measureChain(ctx context.Context, b *bench) error {
	w := b.world
	client, err := w.agent("bench-chain")
	if err != nil {
		return err
	}
	defer client.Close() //nolint:errcheck // it always succeeds
	rights := func(tools ...string) (list []agent.Right) {
		for _, t := range tools {
			list = append(list, agent.Right{Tool: t, Use: true, Delegate: true})
		}
		return list
	}
	root, err := client.Open(ctx, agent.Chain{Task: "bench", Depth: 2, Rights: rights("notes.read", "tls.call")})
	if err != nil {
		return err
	}
	token, _, err := w.direct.Child(ctx)
	if err != nil {
		return err
	}
	mine := w.direct.As(token)
	defer mine.Close()
	n := pick(b, 500, 100)
	err = b.pair(ctx, report.Row{Name: "open.p50_ms", Unit: "ms",
		Against: "creating a token in Vault; ours creates none before the first step"}, n,
		func() error {
			_, err := client.Open(ctx, agent.Chain{Task: "bench", Rights: rights("notes.read")})
			return err
		},
		func() error { _, _, err := w.direct.Child(ctx); return err })
	if err != nil {
		return err
	}
	if err := b.pair(ctx, report.Row{Name: "delegate.p50_ms", Unit: "ms", Against: "creating a token in Vault"}, n,
		func() error {
			_, err := root.Delegate(ctx, dev.Agent("bench-child").String(), agent.Share{Rights: []agent.Right{{Tool: "notes.read", Use: true}}})
			return err
		},
		func() error { _, _, err := w.direct.Child(ctx); return err }); err != nil {
		return err
	}
	for _, t := range targets(w) {
		if t.ours == "" {
			continue
		}
		err := b.closing(ctx, client, t, pick(b, 100, 20))
		if t.name == "pki" && err == nil { // and of servers that ask the responder
			t.name, t.tool = "pki.asked", "tls.ask"
			err = b.closing(ctx, client, t, pick(b, 100, 20))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// pair times two functions in turns and reports their medians.
func (b *bench) pair(ctx context.Context, w report.Row, n int, ours, theirs func() error) error {
	var took [2]report.Samples
	for range n {
		for i, f := range []func() error{ours, theirs} {
			began := time.Now()
			if err := f(); err != nil {
				return fmt.Errorf("%s: %w", w.Name, err)
			}
			took[i] = append(took[i], ms(time.Since(began)))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	b.report.AddQuantile(w, 0.5, took[0], took[1])
	return nil
}

// longest bounds the time for which secrets of one kind are closed. A certificate is proven dead by the list of
// all revoked certificates, which is long by then.
const longest = 30 * time.Second

// closing times the end of one secret. Ours ends with the proof that the secret is dead.
func (b *bench) closing(ctx context.Context, client *agent.Client, t target, n int) error {
	d, err := client.Open(ctx, agent.Chain{Task: "bench", Rights: []agent.Right{{Tool: t.tool, Use: true}}})
	if err != nil {
		return err
	}
	defer d.Leave()
	var ours, theirs report.Samples
	for start := time.Now(); len(ours) < n && time.Since(start) < longest; {
		s, err := d.Begin(ctx, agent.Call{Tool: t.tool, Args: t.args})
		if err != nil {
			return err
		}
		began := time.Now()
		if err := s.Close(ctx); err != nil {
			return err
		}
		ours = append(ours, ms(time.Since(began)))
		lease, err := b.world.direct.Leased(ctx, t.theirs)
		if err != nil {
			return err
		}
		began = time.Now()
		if _, err := b.world.direct.Ask(ctx, "POST", "sys/leases/revoke", map[string]any{"lease_id": lease, "sync": true}); err != nil {
			return err
		}
		theirs = append(theirs, ms(time.Since(began)))
	}
	b.report.AddQuantile(report.Row{Name: "close." + t.name + ".p50_ms", Unit: "ms",
		Against: "revoking the lease in Vault, synchronously; ours also proves at the target"}, 0.5, ours, theirs)
	return nil
}
