package e2e_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
)

// stepTTL is the life of a secret whose broker dies: what nobody revokes is waited for.
const stepTTL = 3 * time.Second

// play is what the agent and the operator do, and what they learn, while the broker may die.
type play struct {
	w    *world
	root *agent.Delegation
	got  []login
}

// run opens a chain, closes one step and holds another one. An error is the broker's death.
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

// revoke revokes every chain there is and waits for the end of each revocation.
func (p *play) revoke(ctx context.Context) error {
	o := p.w.operator()
	chains, err := o.Chains(ctx, true)
	if err != nil {
		return err
	}
	for _, c := range chains {
		rv, err := o.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + c.Chain.ID, Reason: "the walk"})
		if err != nil {
			return err
		}
		if err := o.Follow(ctx, rv.ID, func(now api.Revocation) error { rv = now; return nil }); err != nil {
			return err
		}
		if rv.Closure != string(broker.ClosureClosed) || rv.Dead != rv.Grants {
			p.w.t.Errorf("closure = %s with %d of %d dead, want CLOSED with all", rv.Closure, rv.Dead, rv.Grants)
		}
	}
	return nil
}

// TestKillWalk kills the broker before and after each act of issuing, closing and revoking, one
// run for each, starts it again, and asks the oracle.
func TestKillWalk(t *testing.T) {
	need(t, true)
	envs := make(chan *dev.Env, atOnce)
	for range atOnce {
		go func() { envs <- newEnv(t, dev.Config{}) }()
	}
	points := walk(t, envs)
	t.Logf("%d points: %s", len(points), strings.Join(points, ", "))
	t.Run("revoked", func(t *testing.T) { killAtEach(t, envs, points, true) })
	fence := slices.Index(points, "before commit of fence #1")
	t.Run("left alone", func(t *testing.T) { killAtEach(t, envs, points[:fence], false) })
	t.Run("recovering", func(t *testing.T) { killWhileRecovering(t, envs) })
}

// killWhileRecovering kills a broker that has just minted, and then the next one at each act with
// which it hunts that down.
func killWhileRecovering(t *testing.T, envs chan *dev.Env) {
	var points []string
	for _, act := range []string{"commit of resume", "sever", "kill", "prove", "commit of end", "commit of closed"} {
		points = append(points, "before "+act+" #1", "after "+act+" #1")
	}
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			env := <-envs
			defer func() { envs <- env }()
			w := newWorld(t, env, nil)
			first := startProcess(t, w.file, with(envKill, "after mint #2"))
			if err := (&play{w: w}).run(t.Context()); err == nil {
				t.Fatal("the broker minted twice and lives")
			}
			first.gone(t)
			startProcess(t, w.file, with(envKill, point)).gone(t)
			last := startProcess(t, w.file)
			w.known()
			w.settled(stepTTL + 3*bound)
			w.oracle.untilNone(w.before, 5*time.Second)
			last.end(t)
		})
	}
}

// walk plays once without dying and gives the points it passed, at most two of a kind.
func walk(t *testing.T, envs chan *dev.Env) (points []string) {
	env := <-envs
	defer func() { envs <- env }()
	w := newWorld(t, env, nil)
	p := startProcess(t, w.file)
	played := &play{w: w}
	if err := errors.Join(played.run(t.Context()), played.revoke(t.Context())); err != nil {
		t.Fatalf("%v\n%s", err, p.said())
	}
	w.settled(10 * time.Second)
	w.oracle.untilNone(w.before, 10*time.Second)
	p.end(t)
	for _, point := range p.walked() {
		if place, n, _ := strings.Cut(point, " #"); n == "1" || n == "2" && !strings.Contains(place, "evidence") {
			points = append(points, point)
		}
	}
	for _, act := range []string{"commit of open", "commit of token", "commit of intent", "commit of handle", "commit of issued", "commit of end", "commit of closed",
		"commit of fence", "branch", "child", "mint", "kill", "prepare", "sever", "prove", "gone"} {
		if !slices.Contains(points, "before "+act+" #1") || !slices.Contains(points, "after "+act+" #1") {
			t.Errorf("the walk has no points around %q", act)
		}
	}
	return points
}

func killAtEach(t *testing.T, envs chan *dev.Env, points []string, revoke bool) {
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			env := <-envs
			defer func() { envs <- env }()
			killAt(t, newWorld(t, env, nil), point, revoke)
		})
	}
}

func killAt(t *testing.T, w *world, point string, revoke bool) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p := startProcess(t, w.file, with(envKill, point))
	played := &play{w: w}
	err := played.run(ctx)
	if err == nil && revoke {
		err = played.revoke(ctx)
	}
	if err == nil {
		p.kill() // what the background does varies: this time the point comes later, or not at all
	}
	p.gone(t)

	p = startProcess(t, w.file)
	w.known()
	if !revoke {
		played.goOn(ctx)
	} else if err := played.revoke(ctx); err != nil {
		t.Errorf("revoking after the restart: %v", err)
	}
	if revoke && played.root != nil {
		_, err := played.step(ctx)
		mustRefuse(t, "a step after the chain was revoked", err, agent.ErrRevoked)
	}
	w.settled(stepTTL + 3*bound)
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

// goOn takes one more step after the restart: an agent notices no more of the broker's death than
// one lost answer.
func (p *play) goOn(ctx context.Context) {
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
