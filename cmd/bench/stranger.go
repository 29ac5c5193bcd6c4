package main

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/bench/report"
)

// measureStranger presents the id of another's delegation and one that nobody has, in turns, and reports Welch's t of
// the two times. Above 2.58 they differ at 1%, and a thief could tell by the time which ids exist.
func measureStranger(ctx context.Context, b *bench) error {
	owner, err := b.world.agent("bench-owner")
	if err != nil {
		return err
	}
	defer owner.Close() //nolint:errcheck // it always succeeds
	held, err := owner.Open(ctx, agent.Chain{Task: "bench", Rights: []agent.Right{{Tool: "notes.read", Use: true}}})
	if err != nil {
		return err
	}
	thief, err := b.world.agent("bench-thief")
	if err != nil {
		return err
	}
	defer thief.Close() //nolint:errcheck // it always succeeds
	ids := [2]agent.DelegationID{held.ID(), "dl" + agent.DelegationID(fmt.Sprintf("%024d", 1))}
	var took [2]report.Samples
	n := pick(b, 1000, 250)
	for range n {
		for i, id := range ids {
			began := time.Now()
			if _, err := thief.Join(ctx, id); err == nil {
				return fmt.Errorf("the thief has joined %s", id)
			}
			took[i] = append(took[i], ms(time.Since(began)))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	b.report.Add(report.Row{Name: "stranger.t", Unit: "Welch's t", N: n, Aim: "2.58",
		Against: "of the times of refusals of another's delegation and of one that nobody has"},
		report.Samples{math.Abs(report.Welch(took[0], took[1]))}, nil)
	b.report.AddQuantile(report.Row{Name: "stranger.p50_ms", Unit: "ms", Against: "an id that nobody has"}, 0.5, took[0], took[1])
	return nil
}
