package e2e_test

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
)

// TestFenceWhileIssuing blocks an issue at each of its acts, revokes the chain, and continues the issue only after the
// fence was acknowledged: nothing is handed out, and nothing stays alive.
func TestFenceWhileIssuing(t *testing.T) {
	t.Parallel()
	need(t, true)
	env := newEnv(t, dev.Config{})
	for _, point := range []string{
		"after commit of intent #1", "before branch #1", "after branch #1", "after commit of token #1", "before prepare #1", "after prepare #1",
		"before child #1", "after child #1", "after commit of handle #1", "before mint #1", "after mint #1",
	} {
		t.Run(point, func(t *testing.T) { fenceAt(t, newWorld(t, env, nil), point) })
	}
}

func fenceAt(t *testing.T, w *world, point string) {
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
	d, err := w.agent("planner").Open(ctx, agent.Chain{Task: "hold", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() {
		_, _, err := take(ctx, d, 0)
		answered <- err
	}()
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
	// Its token may be dead before the mint.
	if err := <-answered; !errors.Is(err, agent.ErrRevoked) && !errors.Is(err, agent.ErrUnavailable) {
		t.Errorf("a step in progress when its chain was fenced = %v, want a refusal", err)
	}
	if err := o.Follow(ctx, rv.ID, func(now api.Revocation) error { rv = now; return nil }); err != nil {
		t.Fatal(err)
	}
	if rv.Closure != string(broker.ClosureClosed) || rv.Grants != 1 || rv.Dead != 1 {
		t.Errorf("closure = %s with %d of %d dead, want CLOSED with 1 of 1", rv.Closure, rv.Dead, rv.Grants)
	}
	w.allClosed(bound)
	w.oracle.untilNone(w.before, 2*time.Second)
}

// TestPausedIssuer stops the whole broker in the middle of an issue, as a hypervisor may, until the secret has expired.
func TestPausedIssuer(t *testing.T) {
	t.Parallel()
	need(t, true)
	env := newEnv(t, dev.Config{})
	for _, point := range []string{"before child #1", "before mint #1", "after mint #1"} {
		t.Run(point, func(t *testing.T) { pauseAt(t, newWorld(t, env, nil), point) })
	}
}

func pauseAt(t *testing.T, w *world, point string) {
	const life = 2 * time.Second
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p := startProcess(t, w.file, with(envStop, point))
	d, err := w.agent("planner").Open(ctx, agent.Chain{Task: "pause", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() {
		_, _, err := take(ctx, d, life)
		answered <- err
	}()
	p.reached(t, point)
	stopped := time.Now() // the secret's life began earlier
	within(2*life, func() bool { return time.Since(stopped) > life })
	if err := p.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	// The mint has timed out, too.
	if err := <-answered; !errors.Is(err, agent.ErrExpired) && !errors.Is(err, agent.ErrUnavailable) {
		t.Errorf("a step that was paused for longer than its secret's life = %v, want a refusal", err)
	}
	w.allClosed(4 * bound)
	w.oracle.untilNone(w.before, 2*time.Second)
	p.end(t)
}
