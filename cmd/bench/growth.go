package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/bench/process"
	"github.com/pawlsec/pawl/cmd/bench/report"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

const (
	dailyShare = 2_000_000_000 // the default of limits.ledger_per_day
	smallShare = 8_000_000     // of the measurement: a quarter of it, which a caller may write at once, takes seconds
	unrefused  = 2 * time.Minute
)

// measureGrowth measures how much one caller makes the ledger grow. Callers write until their share refuses them, each
// in its own way. The last one goes on for two minutes with the requests that no share refuses.
func measureGrowth(ctx context.Context, b *bench) error {
	if b.quick {
		return errors.New("it takes three minutes; a quick run has three in all")
	}
	dir := filepath.Join(b.dir, "growth")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	w, err := openWorld(ctx, b, dir, dev.Config{NoPostgres: true}, wire.Limits{LedgerPerDay: smallShare})
	if err != nil {
		return err
	}
	defer w.close()
	g := grower{world: w, file: filepath.Join(dir, "ledger.db")}
	ratio := report.Samples{}
	var each []string
	for _, way := range []struct {
		name string
		act  action
	}{{"opens", openLarge}, {"delegations", delegate}, {"steps", takeStep}, {"reports", mixedActs}} {
		grown, err := g.until(ctx, way.name, way.act)
		if err != nil {
			return fmt.Errorf("a caller of %s: %w", way.name, err)
		}
		ratio = append(ratio, grown/(smallShare/4))
		each = append(each, fmt.Sprintf("%s by %s", report.Figure(grown/(smallShare/4)), way.name))
	}
	more, err := g.during(ctx, unrefused, unsharedActs)
	if err != nil {
		return err
	}
	daily := more / unrefused.Seconds() * 86400
	factor := ratio.Quantile(1)
	b.report.Add(report.Row{Name: "growth.gb_per_day", Unit: "GB a day", N: len(ratio),
		Note: "one caller with the default limits: a quarter of its share of the ledger at once, then the rest of the share or what no " +
			"share refuses, whichever is more; pages of the file in use"},
		report.Samples{(factor*dailyShare/4 + max(factor*dailyShare*3/4, daily)) / 1e9}, nil)
	b.report.Add(report.Row{Name: "growth.unshared.gb_per_day", Unit: "GB a day",
		Note: fmt.Sprintf("of it, reports with new codes, denied steps and endings after the share is used up, over %s; "+
			"a heartbeat writes nothing", unrefused)},
		report.Samples{daily / 1e9}, nil)
	b.report.Add(report.Row{Name: "growth.per_share", Unit: "bytes of the file per byte of the share", Note: strings.Join(each, ", ")},
		report.Samples{factor}, nil)
	return nil
}

// action is one request of a caller that fills the ledger.
type action func(ctx context.Context, c *agent.Client, d *agent.Delegation, i int) error

// grower fills a ledger.
type grower struct {
	*world
	file   string
	client *agent.Client // of the last caller
	held   *agent.Delegation
	acts   atomic.Int64
}

// until acts as a new caller until its share of the ledger refuses it. It returns by how much the file grew.
func (g *grower) until(ctx context.Context, name string, act action) (grown float64, err error) {
	if g.client, err = g.agent("bench-" + name); err != nil {
		return 0, err
	}
	g.later(func() { _ = g.client.Close() }) // it always succeeds
	if g.held, err = g.client.Open(ctx, largeChain()); err != nil {
		return 0, err
	}
	before, err := process.UsedBytes(g.file)
	if err != nil {
		return 0, err
	}
	full := errors.New("the share is used up")
	err = each(32, 1<<20, func(int) error {
		var p *agent.Error
		if err := act(ctx, g.client, g.held, int(g.acts.Add(1))); errors.As(err, &p) && p.Code == "ledger_share" {
			return full
		} else if err != nil && (p == nil || p.Kind == agent.ErrMalformed) {
			return err // the action is wrong
		}
		return ctx.Err()
	})
	if !errors.Is(err, full) {
		return 0, fmt.Errorf("it ended with %w", err)
	}
	after, err := process.UsedBytes(g.file)
	return after - before, err
}

// during acts as the last caller for a time. It returns by how much the file grew.
func (g *grower) during(ctx context.Context, d time.Duration, act action) (grown float64, err error) {
	before, err := process.UsedBytes(g.file)
	if err != nil {
		return 0, err
	}
	l := closedLoop(16, d, 1<<30, func(int) error {
		_ = act(ctx, g.client, g.held, int(g.acts.Add(1))) // it may be refused: the file shows whether it was recorded
		return ctx.Err()
	})
	after, err := process.UsedBytes(g.file)
	return after - before, errors.Join(l.err, err)
}

func largeChain() agent.Chain {
	labels := map[string]string{}
	for i := range broker.MaxLabels {
		labels[fmt.Sprintf("label_%02d_%s", i, strings.Repeat("n", 50))] = strings.Repeat("v", broker.MaxLabel)
	}
	return agent.Chain{Task: strings.Repeat("t", broker.MaxTask), Labels: labels, Depth: 1,
		Rights: []agent.Right{{Tool: "notes.read", Use: true, Delegate: true}}}
}

func openLarge(ctx context.Context, c *agent.Client, _ *agent.Delegation, _ int) error {
	_, err := c.Open(ctx, largeChain())
	return err
}

func delegate(ctx context.Context, _ *agent.Client, d *agent.Delegation, _ int) error {
	_, err := d.Delegate(ctx, dev.Agent("bench-receiver").String(),
		agent.Share{Rights: []agent.Right{{Tool: "notes.read", Use: true}}})
	return err
}

func takeStep(ctx context.Context, _ *agent.Client, d *agent.Delegation, i int) error {
	_, err := d.Begin(ctx, agent.Call{Tool: "notes.read", Purpose: strings.Repeat("p", broker.MaxTask),
		IdempotencyKey: fmt.Sprintf("%0128d", i)})
	return err
}

// mixedActs is unsharedActs with chains between: they show the end of the share.
func mixedActs(ctx context.Context, c *agent.Client, d *agent.Delegation, i int) error {
	if i%2 == 0 {
		return openLarge(ctx, c, d, i)
	}
	return unsharedActs(ctx, c, d, i/2)
}

// unsharedActs sends in turns the requests that are taken from a caller without a share of the ledger left.
func unsharedActs(ctx context.Context, c *agent.Client, d *agent.Delegation, i int) error {
	var err error
	switch i % 4 {
	case 0, 1:
		_, err = c.Report(ctx, agent.Violation{Code: fmt.Sprintf("%s%d", strings.Repeat("v", 50), i), Delegation: d.ID(),
			Detail: strings.Repeat("d", broker.MaxTask)})
	case 2:
		_, err = d.Begin(ctx, agent.Call{Tool: "api.call", Args: agent.Args{"audience": "https://orders.pawl.dev"}})
	case 3:
		_, err = c.EndGrant(ctx, agent.GrantID(fmt.Sprintf("gr%024d", i)))
	}
	return err
}
