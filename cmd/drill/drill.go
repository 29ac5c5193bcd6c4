// Package drill rehearses an incident in its own environment of real parts and measures it. Agents hold live
// secrets under a tree of delegations, one agent breaks policy, and every secret must die.
package drill

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/dev"
)

// Config configures a drill.
type Config struct {
	Out        io.Writer // gets the table; required
	Progress   io.Writer // gets a line for each part and each step of the drill; nil discards it
	Secrets    int       // number of live secrets when policy is broken; zero: 100, at most [MaxSecrets]
	NoPostgres bool      // only certificates, even if PostgreSQL is installed
	SVG, JSON  string    // files to write the chart and the figures to; empty: none
}

// MaxSecrets is the number of secrets that can be made before the first of them expires.
const MaxSecrets = 1000

// holders are the agents with secrets. Their delegations form the tree
//
//	planner -> {writer -> helper, reviewer}
//
// and writer breaks policy.
var holders = []string{"planner", "writer", "helper", "reviewer"}

// drill is one run.
type drill struct {
	Config
	env      *dev.Env
	operator *operator.Client
	clients  []*agent.Client
	tree     map[string]*agent.Delegation
	live     []*secret
	began    time.Time // when writer requested the forbidden step
	result   Result
}

// Run drills once, prints the table and writes the files. It returns an error for a failed step of the drill and
// for a result that is not as required, such as a secret that did not die.
func Run(ctx context.Context, c Config) (Result, error) {
	c.Secrets = cmp.Or(c.Secrets, 100)
	if c.Progress == nil {
		c.Progress = io.Discard
	}
	if c.Secrets < len(holders) || c.Secrets > MaxSecrets {
		return Result{}, fmt.Errorf("a drill takes %d to %d secrets", len(holders), MaxSecrets)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	env, err := dev.Start(ctx, dev.Config{Progress: c.Progress, NoPostgres: c.NoPostgres})
	if err != nil {
		return Result{}, err
	}
	defer env.Close()
	d := &drill{Config: c, env: env, tree: map[string]*agent.Delegation{}}
	defer d.close()
	for _, stage := range []func(context.Context) error{d.connect, d.issue, d.breach} {
		if err := stage(ctx); err != nil {
			return Result{}, fmt.Errorf("the drill failed: %w", err)
		}
	}
	if err := d.result.print(c.Out); err != nil {
		return d.result, err
	}
	if err := d.result.write(c.SVG, c.JSON); err != nil {
		return d.result, err
	}
	return d.result, d.result.verdict()
}

func (d *drill) report(format string, args ...any) {
	fmt.Fprintf(d.Progress, "pawl: "+format+"\n", args...)
}

func (d *drill) close() {
	if d.operator != nil {
		d.operator.Close()
	}
	for _, c := range d.clients {
		_ = c.Close() // the broker is closed next
	}
}

// connect makes the agents' clients and their tree of delegations.
func (d *drill) connect(ctx context.Context) (err error) {
	if d.operator, err = operator.New(operator.Config{Address: "unix:" + d.env.Config.Listen.Socket}); err != nil {
		return err
	}
	root, err := d.agent("planner")
	if err != nil {
		return err
	}
	rights := []agent.Right{{Tool: "tls.call", Use: true, Delegate: true}}
	if d.env.Postgres != nil {
		rights = append(rights, agent.Right{Tool: "db.read", Use: true, Delegate: true})
	}
	if d.tree["planner"], err = root.Open(ctx, agent.Chain{Task: "drill", Rights: rights, Depth: 2}); err != nil {
		return err
	}
	for _, edge := range []struct{ from, to string }{
		{"planner", "writer"}, {"writer", "helper"}, {"planner", "reviewer"},
	} {
		from := d.tree[edge.from]
		id, err := from.Delegate(ctx, dev.Agent(edge.to).String(),
			agent.Share{Rights: rights, Depth: from.Info().Depth - 1})
		if err != nil {
			return err
		}
		to, err := d.agent(edge.to)
		if err != nil {
			return err
		}
		if d.tree[edge.to], err = to.Join(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

func (d *drill) agent(name string) (*agent.Client, error) {
	c, err := agent.New(agent.Config{Address: "https://" + d.env.Broker.Agents().String(),
		Source: d.env.Identities.Source(dev.Agent(name)), ServerID: dev.BrokerID})
	if err == nil {
		d.clients = append(d.clients, c)
	}
	return c, err
}

// workers is the number of secrets that are made, or tried, at the same time.
const workers = 8

// issue takes the agents' steps and checks that every secret works.
func (d *drill) issue(ctx context.Context) error {
	d.report("making %d secrets", d.Secrets)
	d.live = make([]*secret, d.Secrets)
	if err := each(ctx, d.Secrets, func(ctx context.Context, i int) (err error) {
		d.live[i], err = d.take(ctx, i)
		return err
	}); err != nil {
		return err
	}
	d.report("trying each of them")
	first := time.Now().Add(time.Hour)
	for _, s := range d.live {
		if s.ends.Before(first) {
			first = s.ends
		}
		if d.result.Logins++; s.cert != nil {
			d.result.Logins--
			d.result.Certificates++
		}
	}
	if err := each(ctx, len(d.live), func(ctx context.Context, i int) error {
		works, err := d.live[i].works(ctx, d.env)
		if err == nil && !works {
			err = fmt.Errorf("a live %s does not work", d.live[i].kind())
		}
		return err
	}); err != nil {
		return err
	}
	if time.Until(first) < 10*time.Second {
		return errors.New("the first secrets are about to expire: this machine is too slow for this number of secrets")
	}
	return nil
}

// each calls f with 0 to n-1 in several goroutines, and returns the first error. The error ends the context of f.
func each(ctx context.Context, n int, f func(context.Context, int) error) error {
	g, inner := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for i := 0; i < n && inner.Err() == nil; i++ {
		g.Go(func() error { return f(inner, i) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// breach requests a step as writer that policy forbids with revoke-chain, and measures the consequences.
func (d *drill) breach(ctx context.Context) error {
	d.report("writer breaks policy")
	awaitNotified := d.watchAgents(ctx)
	tool, args := "tls.call", agent.Args{"name": "root.agents.pawl.dev"}
	d.began = time.Now()
	_, err := d.tree["writer"].Begin(ctx, agent.Call{Tool: tool, Args: args})
	d.result.FencedMS = d.since()
	var refusal *agent.Error
	if !errors.As(err, &refusal) || refusal.Revocation == "" {
		return fmt.Errorf("the forbidden step was answered with %w", err)
	}
	var work sync.WaitGroup
	var followErr error
	work.Go(func() { followErr = d.follow(ctx, refusal.Revocation) })
	probeErr := d.probe(ctx)
	work.Wait()
	d.result.NotifiedMS, d.result.Unnotified = awaitNotified()
	d.result.Agents, d.result.Secrets = len(d.tree), len(d.live)
	return errors.Join(followErr, probeErr)
}

func (d *drill) since() float64 { return float64(time.Since(d.began).Microseconds()) / 1000 }

// limit is the longest wait for a notification or a death. After it they count as never.
const limit = 30 * time.Second

// watchAgents records when each agent's SDK cancels its steps. The returned function waits for all of them, up to
// limit.
func (d *drill) watchAgents(ctx context.Context) (wait func() (notified []float64, unnotified int)) {
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	var mu sync.Mutex // guards notified
	var notified []float64
	for _, delegation := range d.tree {
		revoked := delegation.Context()
		work.Go(func() {
			select {
			case <-revoked.Done():
				at := d.since()
				mu.Lock()
				defer mu.Unlock()
				notified = append(notified, at)
			case <-ctx.Done():
			}
		})
	}
	return func() ([]float64, int) {
		late := time.AfterFunc(limit, cancel)
		defer late.Stop()
		work.Wait()
		cancel()
		return sorted(notified), len(d.tree) - len(notified)
	}
}

// follow follows the revocation until it is settled, and records when that was and the last closure.
func (d *drill) follow(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*limit)
	defer cancel()
	err := d.operator.Follow(ctx, id, func(rv api.Revocation) error {
		d.result.Closure, d.result.ProvenDead = rv.Closure, rv.Dead
		return nil
	})
	d.result.ClosedMS = d.since()
	return err
}
