package e2e_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// stepTTL is the life of secrets where the broker is killed: the tests wait for the expiry of unrevoked secrets.
const stepTTL = 3 * time.Second

// play has the requests of an agent, and the answers, while the broker may be killed.
type play struct {
	w    *world
	root *agent.Delegation
	got  []login
}

// run opens a chain, closes one step and keeps another one open. An error means that the broker was killed.
func (p *play) run(ctx context.Context) (err error) {
	client := p.w.agent("planner")
	if p.root, err = client.Open(ctx, agent.Chain{Task: "walk", Rights: []agent.Right{{Tool: "db.read", Use: true}}}); err != nil {
		return err
	}
	first, err := p.step(ctx)
	if err != nil {
		return err
	}
	if err := first.Close(ctx); err != nil {
		return err
	}
	_, err = p.step(ctx)
	return err
}

func (p *play) step(ctx context.Context) (*agent.Step, error) {
	s, l, err := take(ctx, p.root, stepTTL)
	if err == nil {
		p.got = append(p.got, l)
	}
	return s, err
}

// TestKillWalk kills the broker before and after each act of issuing, closing and expiring, one run for each. Then it
// restarts the broker and asks the oracle. Nothing is revoked, and the chain continues. TestChaos has the other faults
// at these points, and the points of revoking.
func TestKillWalk(t *testing.T) {
	t.Parallel()
	need(t, true)
	envs := environments(t)
	points := walk(t, envs)
	t.Logf("%d points: %s", len(points), strings.Join(points, ", "))
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			env := <-envs
			defer func() { envs <- env }()
			killAt(t, newBounded(t, env), point)
		})
	}
}

// The bounds of the agent in the walk: of steps in an hour, and of open chains. The walk takes at most three steps.
const (
	walkSteps  = 4
	walkChains = 2
)

// newBounded is a world in which every step is counted for its caller, in a limit and in the history that policy sees.
func newBounded(t *testing.T, env *dev.Env) *world {
	t.Helper()
	cedar := strings.ReplaceAll(tenAnHour, "10 per hour", fmt.Sprint(walkSteps, " per hour")) + `
@id("no-admin-after-reads")
@window("1h")
forbid (principal, action == Action::"use", resource == Tool::"db.admin") when { context.caller.history has "db.read" };
`
	return newWorld(t, env, func(c *wire.Config) {
		c.Policy = sign(t, limited(t, env, newHelpDesk(t), cedar))
		c.Limits.OpenChains = walkChains
	})
}

// environments starts one environment for each parallel run.
func environments(t *testing.T) chan *dev.Env {
	envs := make(chan *dev.Env, sideBySide())
	for range sideBySide() {
		envs <- newEnv(t, dev.Config{})
	}
	return envs
}

// walk plays once without a kill and gives the points that were passed, at most two of a kind.
func walk(t *testing.T, envs chan *dev.Env) []string {
	env := <-envs
	defer func() { envs <- env }()
	w := newBounded(t, env)
	p := startProcess(t, w.file)
	if err := (&play{w: w}).run(t.Context()); err != nil {
		t.Fatalf("%v\n%s", err, p.said())
	}
	w.allClosed(stepTTL + 10*time.Second)
	w.oracle.untilNone(w.before, 10*time.Second)
	p.end(t)
	points := firstTwo(p.walked())
	mustPass(t, points, "commit of open", "commit of token", "commit of intent", "commit of handle", "commit of issued", "commit of end",
		"commit of closed", "branch", "child", "mint", "kill", "prepare", "sever", "prove", "gone")
	return points
}

// firstTwo keeps the first two points of each kind.
func firstTwo(walked []string) (points []string) {
	for _, point := range walked {
		if place, n, _ := strings.Cut(point, " #"); n == "1" || n == "2" && !strings.Contains(place, "evidence") {
			points = append(points, point)
		}
	}
	return points
}

// mustPass fails unless the points include each of the acts.
func mustPass(t *testing.T, points []string, acts ...string) {
	t.Helper()
	for _, act := range acts {
		if !slices.Contains(points, "before "+act+" #1") || !slices.Contains(points, "after "+act+" #1") {
			t.Errorf("the walk has no points around %q", act)
		}
	}
}

func killAt(t *testing.T, w *world, point string) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p := startProcess(t, w.file, with(envKill, point))
	played := &play{w: w}
	if err := played.run(ctx); err == nil {
		select {
		case <-p.exited:
		case <-time.After(stepTTL + bound): // background work varies: this run does not reach the point
			p.kill()
		}
	}
	p.gone(t)

	p = startProcess(t, w.file)
	w.known(w.grants())
	played.continues(ctx)
	w.allClosed(stepTTL + 3*bound)
	played.exhausts(ctx)
	for _, l := range played.got {
		if w.oracle.works(l) {
			t.Errorf("login %s works", l.Username)
		}
	}
	w.oracle.untilNone(w.before, 5*time.Second)
	if t.Failed() {
		t.Log(p.said())
	}
	p.end(t)
}

// continues takes one more step after the restart: an agent notices only one lost answer of the kill.
func (p *play) continues(ctx context.Context) {
	p.w.t.Helper()
	if p.root == nil {
		return
	}
	s, err := p.step(ctx)
	if err == nil {
		err = s.Close(ctx)
	}
	if err != nil {
		p.w.t.Errorf("a step after the restart: %v", err)
	}
}

// exhausts opens chains and takes steps until the caller's limits refuse more. As many must count as there are: of chains
// by the broker's own list, of steps those for which a mint may have been sent.
func (p *play) exhausts(ctx context.Context) {
	p.w.t.Helper()
	client := p.w.agent("planner")
	var err error
	for range walkChains + 1 {
		var d *agent.Delegation
		if d, err = client.Open(ctx, agent.Chain{Task: "walk", Rights: rights("db.read")}); err != nil {
			break
		}
		p.root = d
	}
	refusal(p.w.t, "one chain too many", err, api.KindDenied, broker.CodeManyChains)
	chains, err := p.w.operator().Chains(ctx, false)
	if err != nil || len(chains) != walkChains {
		p.w.t.Errorf("%d chains are open, %v, want %d", len(chains), err, walkChains)
	}
	for range walkSteps + 1 {
		var s *agent.Step
		if s, err = p.step(ctx); err != nil {
			break
		}
		if err := s.Close(ctx); err != nil {
			p.w.t.Errorf("closing a step: %v", err)
		}
	}
	refusal(p.w.t, "one step too many", err, api.KindDenied, broker.CodeCallerLimit)
	counted := 0
	for _, e := range p.w.entries() {
		switch {
		case e.Op == string(broker.OpHandle):
			counted++
		case e.Op == string(broker.OpEnd) && e.Detail == "nothing was made":
			counted--
		}
	}
	if counted != walkSteps {
		p.w.t.Errorf("the limit is reached after %d steps for which a mint may have been sent, want %d", counted, walkSteps)
	}
}
