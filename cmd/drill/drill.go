// Package drill rehearses an incident on real parts of its own and measures it: agents hold live
// secrets under a tree of delegations, one of them breaks policy, and everything must die.
package drill

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/dev"
)

// Config says how to drill.
type Config struct {
	Out        io.Writer // the table for people; required
	Progress   io.Writer // what is being started and done; nil: nobody is told
	Secrets    int       // live when policy is broken; zero: 100, at most 1000
	NoPostgres bool      // certificates alone, as on a machine without PostgreSQL
	SVG, JSON  string    // files of the chart and of the figures; empty: none
}

// MaxSecrets is as many as can be made before the first of them ends by itself.
const MaxSecrets = 1000

// The tree that holds the secrets:
//
//	planner -> {writer -> helper, reviewer}
//
// writer is the one that breaks policy.
var holders = []string{"planner", "writer", "helper", "reviewer"}

// drill is one run.
type drill struct {
	Config
	env      *dev.Env
	operator *operator.Client
	clients  []*agent.Client
	tree     map[string]*agent.Delegation
	live     []*secret
	asked    time.Time // when policy was broken
	result   Result
}

// Run drills once, prints the table and writes the files. An error says what went otherwise than
// it must; secrets that never died are one.
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
	defer d.leave()
	for _, scene := range []func(context.Context) error{d.gather, d.arm, d.breach} {
		if err := scene(ctx); err != nil {
			return Result{}, fmt.Errorf("the drill went wrong: %w", err)
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

func (d *drill) say(format string, args ...any) {
	fmt.Fprintf(d.Progress, "pawl: "+format+"\n", args...)
}

func (d *drill) leave() {
	if d.operator != nil {
		d.operator.Close()
	}
	for _, c := range d.clients {
		_ = c.Close() // the broker goes next
	}
}

// gather makes the agents and their tree.
func (d *drill) gather(ctx context.Context) (err error) {
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
	for _, edge := range []struct{ from, to string }{{"planner", "writer"}, {"writer", "helper"}, {"planner", "reviewer"}} {
		from := d.tree[edge.from]
		id, err := from.Delegate(ctx, dev.Agent(edge.to).String(), agent.Share{Rights: rights, Depth: from.Info().Depth - 1})
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

// hands is how many secrets are made, or tried beforehand, at once.
const hands = 8

// arm has the agents take their steps, in turn, and sees that every secret works.
func (d *drill) arm(ctx context.Context) error {
	d.say("making %d secrets", d.Secrets)
	d.live = make([]*secret, d.Secrets)
	if err := each(ctx, d.Secrets, func(ctx context.Context, i int) (err error) {
		d.live[i], err = d.take(ctx, i)
		return err
	}); err != nil {
		return err
	}
	d.say("trying each of them")
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
		return errors.New("the first secrets are about to end by themselves: this machine is too slow for so many")
	}
	return nil
}

// each calls f with 0 to n-1, several at a time, and gives the first error.
func each(ctx context.Context, n int, f func(context.Context, int) error) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	next := make(chan int)
	var work sync.WaitGroup
	for range min(n, hands) {
		work.Go(func() {
			for i := range next {
				if err := f(ctx, i); err != nil {
					fail(err)
				}
			}
		})
	}
	for i := 0; i < n && ctx.Err() == nil; i++ {
		next <- i
	}
	close(next)
	work.Wait()
	return context.Cause(ctx)
}

// breach has writer ask for what policy forbids with revoke-chain, and measures what follows.
func (d *drill) breach(ctx context.Context) error {
	d.say("writer breaks policy")
	watch := d.listen(ctx)
	tool, args := "tls.call", agent.Args{"name": "root.agents.pawl.dev"}
	d.asked = time.Now()
	_, err := d.tree["writer"].Begin(ctx, agent.Call{Tool: tool, Args: args})
	d.result.FencedMS = d.since()
	var refusal *agent.Error
	if !errors.As(err, &refusal) || refusal.Revocation == "" {
		return fmt.Errorf("the forbidden step was answered with %w", err)
	}
	var work sync.WaitGroup
	var followed error
	work.Go(func() { followed = d.follow(ctx, refusal.Revocation) })
	hunted := d.hunt(ctx)
	work.Wait()
	d.result.HeardMS, d.result.Unheard = watch()
	d.result.Agents, d.result.Secrets = len(d.tree), len(d.live)
	return errors.Join(followed, hunted)
}

func (d *drill) since() float64 { return float64(time.Since(d.asked).Microseconds()) / 1000 }

// patience is how long anything is waited for before it counts as never.
const patience = 30 * time.Second

// listen notes when each agent's SDK says that it is over; call what it gives to wait for that.
func (d *drill) listen(ctx context.Context) (wait func() (heard []float64, unheard int)) {
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	var mu sync.Mutex // guards heard
	var heard []float64
	for _, delegation := range d.tree {
		over := delegation.Context()
		work.Go(func() {
			select {
			case <-over.Done():
				at := d.since()
				mu.Lock()
				defer mu.Unlock()
				heard = append(heard, at)
			case <-ctx.Done():
			}
		})
	}
	return func() ([]float64, int) {
		late := time.AfterFunc(patience, cancel)
		defer late.Stop()
		work.Wait()
		cancel()
		return sorted(heard), len(d.tree) - len(heard)
	}
}

// follow notes when the broker itself called the revocation CLOSED, and with what.
func (d *drill) follow(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	err := d.operator.Follow(ctx, id, func(rv api.Revocation) error {
		d.result.Closure, d.result.ProvenDead = rv.Closure, rv.Dead
		return nil
	})
	d.result.ClosedMS = d.since()
	return err
}
