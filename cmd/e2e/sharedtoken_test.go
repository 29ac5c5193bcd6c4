package e2e_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
)

// tokenPlay is [play] with a tool whose secrets have no lease: its delegation's token mints them.
type tokenPlay struct {
	w      *world
	root   *agent.Delegation
	tokens map[string]string // by grant
}

// run opens a chain, closes one step and keeps another one open. An error means that the broker was killed.
func (p *tokenPlay) run(ctx context.Context) (err error) {
	client := p.w.agent("planner")
	if p.root, err = client.Open(ctx, agent.Chain{Task: "walk", Rights: rights("api.call")}); err != nil {
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

func (p *tokenPlay) step(ctx context.Context) (*agent.Step, error) {
	s, err := p.root.Begin(ctx, agent.Call{Tool: "api.call", Args: ordersCall, TTL: stepTTL})
	if err != nil {
		return nil, err
	}
	token := s.Secret().Field("token")
	p.tokens[string(s.Grant().ID)] = token
	return s, keepSecret(token)
}

// TestKillWithoutALease is [TestKillWalk] for steps without a token of their own. After the restart each token that the
// agent has is in the ledger with an end that is true, and is refused from then on; the chain goes on.
func TestKillWithoutALease(t *testing.T) {
	t.Parallel()
	need(t, false)
	envs := make(chan *dev.Env, sideBySide())
	for range sideBySide() {
		envs <- newEnv(t, dev.Config{NoPostgres: true})
	}
	env := <-envs
	w := newWorld(t, env, nil)
	p := startProcess(t, w.file)
	if err := (&tokenPlay{w: w, tokens: map[string]string{}}).run(t.Context()); err != nil {
		t.Fatalf("%v\n%s", err, p.said())
	}
	w.allClosed(stepTTL + 10*time.Second)
	p.end(t)
	envs <- env
	points := firstTwo(p.walked())
	mustPass(t, points, "commit of token", "commit of intent", "commit of handle", "commit of intent+handle",
		"commit of issued", "commit of closed", "branch", "mint")
	for _, point := range points {
		if strings.HasSuffix(point, "child #1") || strings.HasSuffix(point, "kill #1") {
			t.Errorf("the walk passes %q: a step without a lease has no token of its own", point)
		}
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			env := <-envs
			defer func() { envs <- env }()
			killTokensAt(t, newWorld(t, env, nil), point)
		})
	}
}

func killTokensAt(t *testing.T, w *world, point string) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p := startProcess(t, w.file, with(envKill, point))
	played := &tokenPlay{w: w, tokens: map[string]string{}}
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
	known := map[string]bool{}
	for _, g := range w.grants() {
		known[g.ID] = g.State != string(broker.StateIntent)
	}
	s := newService(w)
	for id, token := range played.tokens {
		if !known[id] {
			t.Errorf("the ledger does not know the token of grant %s that the agent has", id)
		}
		if !within(stepTTL+bound, func() bool { return !s.ask(token).Active }) {
			t.Errorf("the token of grant %s is active after its end", id)
		}
	}
	if played.root != nil {
		step, err := played.step(ctx)
		if err == nil {
			err = step.Close(ctx)
		}
		if err != nil {
			t.Errorf("a step after the restart: %v", err)
		}
	}
	w.allClosed(stepTTL + 3*bound)
	if t.Failed() {
		t.Log(p.said())
	}
	p.end(t)
}

// TestFenceWithoutALease is [TestFenceWhileIssuing] for steps without a token of their own.
func TestFenceWithoutALease(t *testing.T) {
	t.Parallel()
	need(t, false)
	env := newEnv(t, dev.Config{NoPostgres: true})
	for _, point := range []string{
		"after branch #1", "after commit of token #1", "after commit of handle #1", "before mint #1", "after mint #1",
		"after commit of intent+handle #1", "before mint #2", "after mint #2",
	} {
		t.Run(point, func(t *testing.T) { fenceTokenAt(t, newWorld(t, env, nil), point) })
	}
}

func fenceTokenAt(t *testing.T, w *world, point string) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	reached, goOn := make(chan struct{}), make(chan struct{})
	w.here(nil, newFaults(func(p string) error {
		if p == point {
			close(reached)
			<-goOn
		}
		return nil
	}).install)
	d, err := w.agent("planner").Open(ctx, agent.Chain{Task: "hold", Rights: rights("api.call")})
	if err != nil {
		t.Fatal(err)
	}
	played := &tokenPlay{w: w, root: d, tokens: map[string]string{}}
	answered := make(chan error, 2)
	go func() {
		for err := error(nil); err == nil && len(played.tokens) < 2; {
			_, err = played.step(ctx)
			answered <- err
		}
	}()
	if strings.HasSuffix(point, "#2") || strings.Contains(point, "+") {
		if err := <-answered; err != nil {
			t.Fatalf("the first step = %v", err)
		}
	}
	select {
	case <-reached:
	case err := <-answered:
		t.Fatalf("the step was answered before %q: %v", point, err)
	}
	o := w.operator()
	rv, err := o.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + string(d.Info().Chain), Reason: "while issuing"})
	if err != nil {
		t.Fatal(err)
	}
	close(goOn)
	if err := <-answered; !errors.Is(err, agent.ErrRevoked) && !errors.Is(err, agent.ErrUnavailable) {
		t.Errorf("a step in progress when its chain was fenced = %v, want a refusal", err)
	}
	if err := o.Follow(ctx, rv.ID, func(now api.Revocation) error { rv = now; return nil }); err != nil {
		t.Fatal(err)
	}
	if rv.Closure != string(broker.ClosureClosed) || rv.Dead != rv.Grants {
		t.Errorf("closure = %s with %d of %d dead, want CLOSED with all", rv.Closure, rv.Dead, rv.Grants)
	}
	w.allClosed(bound)
	s := newService(w)
	for id, token := range played.tokens {
		if s.ask(token).Active {
			t.Errorf("the token of grant %s is active under a closed revocation", id)
		}
	}
}
