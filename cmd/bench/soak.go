package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/bench/report"
	"github.com/pawlsec/pawl/cmd/bench/soak"
	"github.com/pawlsec/pawl/cmd/dev"
)

// soaked is the number of agents of a soak.
const soaked = 16

// measureSoak keeps a broker under half of the load that it can take, with sixty revocations, and compares what it
// holds at the end with what it held at minute ten.
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
	metrics, err := s.metrics(ctx)
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
	one.Free, one.Size, err = freePages(s.ledger)
	return one, err
}

// metrics reads the broker's metrics that have no labels.
func (s *soaking) metrics(ctx context.Context) (map[string]float64, error) {
	c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", s.env.Config.Listen.Socket)
		}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://broker/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close() //nolint:errcheck // it was read
	found := map[string]float64{}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, text, _ := strings.Cut(lines.Text(), " ")
		if f, err := strconv.ParseFloat(text, 64); err == nil {
			found[name] = f
		}
	}
	return found, lines.Err()
}

// freePages counts the pages that no record uses in a ledger that a broker has open, and its bytes. It reads a copy.
func freePages(file string) (free, size float64, err error) {
	copied, err := copyOf(file)
	defer os.Remove(copied) //nolint:errcheck // below build/, which `make clean` removes
	if err != nil {
		return 0, 0, err
	}
	db, err := bbolt.Open(copied, 0o600, &bbolt.Options{ReadOnly: true, PreLoadFreelist: true})
	if err != nil {
		return 0, 0, err
	}
	defer db.Close() //nolint:errcheck // it was only read
	info, err := os.Stat(copied)
	if err != nil {
		return 0, 0, err
	}
	return float64(db.Stats().FreePageN), float64(info.Size()), nil
}
