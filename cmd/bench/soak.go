package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/bench/process"
	"github.com/pawlsec/pawl/cmd/bench/report"
	"github.com/pawlsec/pawl/cmd/bench/soak"
	"github.com/pawlsec/pawl/cmd/dev"
)

// soaked is the number of agents of a soak.
const soaked = 16

// measureSoak keeps a broker under half of the load that it can take, with sixty revocations, and compares its
// memory, files and goroutines at the end with those at minute ten.
func measureSoak(ctx context.Context, b *bench) error {
	if b.soak == 0 {
		return errors.New("it takes an hour: `make bench FULL=1` has it")
	}
	dir := filepath.Join(b.dir, "soak")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	w, err := openWorld(ctx, b, dir, dev.Config{MaxConnections: 300}, noLimits)
	if err != nil {
		return err
	}
	defer w.close()
	agents, err := w.agents(soaked)
	if err != nil {
		return err
	}
	defer closeAgents(agents)
	s := soaking{world: w, agents: agents, targets: targets(w), ledger: filepath.Join(dir, "ledger.db")}
	quick := closedLoop(soaked, 10*time.Second, 1<<30, func(i int) error { return s.step(ctx, i) })
	if quick.err != nil {
		return quick.err
	}
	samples, err := soak.Run(ctx, soak.Config{For: b.soak + time.Second, Every: b.soak / 60, Rate: quick.perSecond() / 2,
		Step: s.step, Revoke: s.revoke, Read: s.read})
	if len(samples) > 0 {
		err = errors.Join(err, os.WriteFile(filepath.Join(b.root, "build", "soak.svg"), []byte(soak.Chart(samples)), 0o644))
	}
	if err != nil {
		return err
	}
	for _, line := range soak.Lines {
		early, late := soak.Ends(samples, line.Of)
		if early == nil {
			return errors.New("it was too short for a comparison")
		}
		b.report.Add(report.Row{Name: "soak." + line.Name, Unit: "at the end", N: samples[len(samples)-1].Steps,
			Against: "the same at minute ten",
			Note: fmt.Sprintf("after %s at %.0f steps a second, each closed, with a revocation every %s", b.soak,
				quick.perSecond()/2, b.soak/60)}, report.Samples(late), report.Samples(early))
	}
	return nil
}

// soaking takes and closes steps of each kind.
type soaking struct {
	*world
	agents  []*agent.Client
	targets []target
	ledger  string
}

// step opens a chain with one step, and closes the step. Chains end by themselves after a minute.
func (s *soaking) step(ctx context.Context, i int) error {
	t := s.targets[i%len(s.targets)]
	d, err := s.agents[i%soaked].Open(ctx, agent.Chain{Task: "soak", TTL: time.Minute,
		Rights: []agent.Right{{Tool: t.tool, Use: true}}})
	if err != nil {
		return err
	}
	return d.Step(ctx, agent.Call{Tool: t.tool, Args: t.args}, func(context.Context, *agent.Secret) error { return nil })
}

// revoke revokes a chain with one step of each kind, and waits until the revocation is closed.
func (s *soaking) revoke(ctx context.Context) error {
	chain := agent.Chain{Task: "soak"}
	for _, t := range s.targets {
		chain.Rights = append(chain.Rights, agent.Right{Tool: t.tool, Use: true})
	}
	d, err := s.agents[0].Open(ctx, chain)
	if err != nil {
		return err
	}
	defer d.Leave()
	for _, t := range s.targets {
		if _, err := d.Begin(ctx, agent.Call{Tool: t.tool, Args: t.args}); err != nil {
			return err
		}
	}
	return s.world.revoke(ctx, []string{string(d.Info().Chain)})
}

// read samples the broker's process and its ledger.
func (s *soaking) read(ctx context.Context) (one soak.Sample, err error) {
	metrics, err := process.Metrics(ctx, s.env.Config.Listen.Socket)
	if err != nil {
		return one, err
	}
	one.Goroutines, one.Heap = metrics["go_goroutines"], metrics["go_gc_heap_live_bytes"]
	if one.Goroutines == 0 || one.Heap == 0 {
		return one, errors.New("the broker's metrics lack its goroutines or its heap")
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.broker.PID()))
	if err != nil {
		return one, err
	}
	one.Files = float64(len(files))
	one.Free, one.Size, err = process.FreePages(s.ledger)
	return one, err
}
