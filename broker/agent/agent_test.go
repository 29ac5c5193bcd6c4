package agent_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/goleak"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestStep: the secret works during the call and is wiped after it, for every way in which the call ends.
func TestStep(t *testing.T) {
	failed := errors.New("the work failed")
	for name, row := range map[string]struct {
		f    func(cancel func()) error
		want error
	}{
		"good":      {func(func()) error { return nil }, nil},
		"fails":     {func(func()) error { return failed }, failed},
		"cancelled": {func(cancel func()) error { cancel(); return nil }, nil},
		"panics":    {func(func()) error { panic(failed) }, failed},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScript(t)
			d := s.open(agent.Config{})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var kept *agent.Secret
			var inside context.Context
			err := func() (err error) {
				defer func() {
					if p := recover(); p != nil {
						err = p.(error)
					}
				}()
				return d.Step(ctx, agent.Call{Tool: "db"}, func(ctx context.Context, secret *agent.Secret) error {
					kept, inside = secret, ctx
					got := [...]string{secret.Field("password"), secret.Field("port"), secret.Field("absent")}
					if got != [...]string{marker, "5432", ""} {
						t.Error("the secret's members differ from those that the broker sent")
					}
					return row.f(cancel)
				})
			}()
			if !errors.Is(err, row.want) || row.want == nil && err != nil {
				t.Errorf("Step = %v, want %v", err, row.want)
			}
			if len(s.closed) != 1 || kept.JSON() != nil || kept.Field("password") != "" || inside.Err() == nil {
				t.Errorf("after the step: closed %v, context %v; want one closing, an ended context and a wiped secret",
					s.closed, inside.Err())
			}
		})
	}
}

// TestPushed: an event on the stream ends the step or the delegation that it names, and no other.
func TestPushed(t *testing.T) {
	final := &api.Fence{Revocation: revocation}
	problem := func(kind api.Kind) text { return event(api.EventProblem, api.NewProblem(kind, "", "")) }
	for name, row := range map[string]struct {
		event      text
		kind       error // how the first step ends; nil: it continues
		all        bool  // the second step and the delegation end, too
		revocation string
	}{
		"nothing yet":        {status(api.Standing{}), nil, false, ""},
		"one grant":          {status(api.Standing{Ended: []string{grant(1)}}), agent.ErrRevoked, false, ""},
		"frozen":             {status(api.Standing{Fence: &api.Fence{Frozen: true}}), nil, false, ""},
		"revoked":            {status(api.Standing{Fence: final}), agent.ErrRevoked, true, revocation},
		"expired":            {problem(api.KindExpired), agent.ErrExpired, true, ""},
		"no longer ours":     {problem(api.KindNotFound), agent.ErrNotFound, true, ""},
		"of a later version": {event("news", map[string]int{"x": 1}), nil, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScript(t)
			d := s.open(agent.Config{})
			one, two := s.begin(d), s.begin(d)
			s.awaitStream()
			s.send(row.event)
			s.send(status(api.Standing{Ended: []string{grant(3)}})) // the handshake: grant 3 is begun below
			if row.kind != nil {
				wantEnd(t, one.Context(), row.kind)
			}
			if row.all {
				wantEnd(t, two.Context(), row.kind)
				wantEnd(t, d.Context(), row.kind)
				var p *agent.Error
				_, err := d.Begin(t.Context(), agent.Call{Tool: "db"})
				if !errors.As(err, &p) || !errors.Is(err, row.kind) || p.Revocation != row.revocation || s.steps != 2 {
					t.Errorf("Begin afterwards = %v after %d requests, want %v without a third", err, s.steps, row.kind)
				}
				return
			}
			// The event arrived before the answer to the step that it ends.
			wantEnd(t, s.begin(d).Context(), agent.ErrRevoked)
			if row.kind == nil {
				wantRunning(t, one.Context())
			}
			wantRunning(t, two.Context())
			wantRunning(t, d.Context())
		})
	}
}

// TestAcknowledge: a revocation is acknowledged after the contexts of the steps have ended, although the
// function of one hangs. The client retries when the answer is lost.
func TestAcknowledge(t *testing.T) {
	s := newScript(t)
	d := s.open(agent.Config{})
	step := s.begin(d) // never closed: its function hangs
	s.awaitStream()
	lost := 2
	s.mu.Lock()
	s.refusal = func() *api.Problem {
		if step.Context().Err() == nil {
			t.Error("the client acknowledged before the step's context ended")
		}
		switch lost--; lost {
		case 1:
			return api.NewProblem(api.KindUnavailable, "ledger_unavailable", "")
		case 0:
			return api.NewProblem(api.KindOverLimit, api.CodeTooManyRequests, "").After(time.Millisecond)
		}
		return nil
	}
	s.mu.Unlock()
	s.send(status(api.Standing{Fence: &api.Fence{Revocation: revocation}}))
	await(t, s.beaten, "the acknowledgement")
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.beats) != 3 || s.beats[2] != `{"revocation":"`+revocation+`"}` {
		t.Errorf("the broker received %q, want the revocation three times", s.beats)
	}
}

// TestAcknowledgesOnlyRevocations: an end without a revocation's id is not acknowledged.
func TestAcknowledgesOnlyRevocations(t *testing.T) {
	for _, event := range []text{
		event(api.EventProblem, api.NewProblem(api.KindExpired, "", "")),
		status(api.Standing{Fence: &api.Fence{}}),
	} {
		s := newScript(t)
		c := s.client(agent.Config{})
		d, err := c.Open(t.Context(), agent.Chain{Task: "t"})
		if err != nil {
			t.Fatal(err)
		}
		ctx := d.Context()
		s.awaitStream()
		s.send(event)
		await(t, ctx.Done(), "the delegation to end")
		if err := c.Close(); err != nil || len(s.beats) != 0 {
			t.Errorf("Close = %v and the broker received %q, want nil and no acknowledgement", err, s.beats)
		}
	}
}

// TestHeartbeat: the client sends heartbeats until the agent leaves the delegation. A revocation in the
// answer to one ends the delegation.
func TestHeartbeat(t *testing.T) {
	s := newScript(t)
	s.heartbeat = 1
	d := s.open(agent.Config{})
	await(t, s.beaten, "a heartbeat")
	await(t, s.beaten, "another heartbeat")
	s.mu.Lock()
	if s.beats[0] != "{}" || s.streams != 0 {
		t.Errorf("the broker received %q and %d streams, want a heartbeat without a stream", s.beats, s.streams)
	}
	p := api.NewProblem(api.KindRevoked, "fenced", "")
	p.Revocation = revocation
	s.refusal = func() *api.Problem {
		if s.beats[len(s.beats)-1] == "{}" {
			return p
		}
		return nil
	}
	s.mu.Unlock()
	wantEnd(t, d.Context(), agent.ErrRevoked)
	await(t, s.beaten, "the acknowledgement")

	s = newScript(t)
	s.heartbeat = 1
	c := s.client(agent.Config{})
	left, err := c.Open(t.Context(), agent.Chain{Task: "t"})
	if err != nil {
		t.Fatal(err)
	}
	await(t, s.beaten, "a heartbeat")
	left.Leave()
	if err := c.Close(); err != nil { // it waits for the heartbeats to stop
		t.Error(err)
	}
}

// TestReconnect: the client reopens a lost stream, and events on the new one arrive.
func TestReconnect(t *testing.T) {
	s := newScript(t)
	d := s.open(agent.Config{})
	step := s.begin(d)
	for range 3 {
		s.awaitStream()
		s.send("")
	}
	s.awaitStream()
	wantRunning(t, step.Context())
	s.send(status(api.Standing{Fence: &api.Fence{}}))
	wantEnd(t, step.Context(), agent.ErrRevoked)
}

// TestFailClosed: with the option, the loss of the broker ends steps. Without it, steps continue.
func TestFailClosed(t *testing.T) {
	for after, want := range map[time.Duration]error{50 * time.Millisecond: agent.ErrUnavailable, 0: nil} {
		s := newScript(t)
		s.refuseStreams = true
		step := s.begin(s.open(agent.Config{FailClosed: after}))
		if want != nil {
			wantEnd(t, step.Context(), want)
			continue
		}
		for deadline := time.Now().Add(10 * time.Second); ; {
			s.mu.Lock()
			tried := s.streams
			s.mu.Unlock()
			if tried >= 3 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("waited 10 s for three attempts at a stream")
			}
			<-time.After(time.Millisecond)
		}
		wantRunning(t, step.Context())
	}
}

// TestDeadline: a step's context ends with its secret, although the broker's clock is wrong.
func TestDeadline(t *testing.T) {
	s := newScript(t)
	s.lifetime = 30 * time.Millisecond
	wantEnd(t, s.begin(s.open(agent.Config{})).Context(), agent.ErrExpired)
}

// TestNoRetry: Begin sends one request, for every kind of refusal.
func TestNoRetry(t *testing.T) {
	for _, p := range []*api.Problem{
		api.NewProblem(api.KindUnavailable, "outcome_unknown", "").After(time.Millisecond),
		api.NewProblem(api.KindDenied, "too_fast", "").After(time.Millisecond),
		api.NewProblem(api.KindInternal, "", ""),
	} {
		s := newScript(t)
		d := s.open(agent.Config{})
		s.refusal = func() *api.Problem { return p }
		var got *agent.Error
		_, err := d.Begin(t.Context(), agent.Call{Tool: "db", IdempotencyKey: "k1"})
		same := errors.As(err, &got) && errors.Is(err, p.Kind) && got.Code == p.Code
		if !same || got.RetryAfter() != p.RetryAfter() || s.steps != 1 {
			t.Errorf("Begin = %v after %d requests, want %v after one", err, s.steps, p)
		}
		if s.keys[0] != "k1" {
			t.Errorf("the idempotency key arrived as %q, want k1", s.keys[0])
		}
	}
}

// TestCloseAgain: Close may be repeated until it succeeds. After that it sends no request.
func TestCloseAgain(t *testing.T) {
	s := newScript(t)
	step := s.begin(s.open(agent.Config{}))
	s.refusal = func() *api.Problem { return api.NewProblem(api.KindUnavailable, "", "") }
	if err := step.Close(t.Context()); !errors.Is(err, agent.ErrUnavailable) || step.Secret().JSON() != nil {
		t.Errorf("Close = %v, want unavailable and a wiped secret", err)
	}
	s.refusal = nil
	for range 2 {
		if err := step.Close(t.Context()); err != nil || len(s.closed) != 1 {
			t.Errorf("Close = %v and the broker closed %v, want nil and one closing", err, s.closed)
		}
	}
}

// TestClosedUnderWork: the error of interrupted work has the reason, and the failure to close.
func TestClosedUnderWork(t *testing.T) {
	s := newScript(t)
	d := s.open(agent.Config{})
	err := d.Step(t.Context(), agent.Call{Tool: "db"}, func(ctx context.Context, _ *agent.Secret) error {
		s.awaitStream()
		s.send(status(api.Standing{Fence: &api.Fence{}}))
		<-ctx.Done()
		s.mu.Lock()
		s.refusal = func() *api.Problem { return api.NewProblem(api.KindInternal, "", "") }
		s.mu.Unlock()
		return ctx.Err()
	})
	for _, want := range []error{context.Canceled, agent.ErrRevoked, agent.ErrInternal} {
		if !errors.Is(err, want) {
			t.Errorf("Step = %v, want %v among its causes", err, want)
		}
	}
}

func TestClientClose(t *testing.T) {
	s := newScript(t)
	c := s.client(agent.Config{FailClosed: time.Hour})
	d, err := c.Open(t.Context(), agent.Chain{Task: "t"})
	if err != nil {
		t.Fatal(err)
	}
	step := s.begin(d)
	s.awaitStream()
	for range 2 {
		if err := c.Close(); err != nil {
			t.Errorf("Close = %v, want nil", err)
		}
		if step.Context().Err() == nil {
			t.Error("Close returned before the step's context ended")
		}
	}
	wantEnd(t, step.Context(), context.Canceled)
	if _, err := d.Begin(t.Context(), agent.Call{Tool: "db"}); !errors.Is(err, context.Canceled) {
		t.Errorf("Begin after Close = %v, want canceled", err)
	}
}

func TestLeave(t *testing.T) {
	s := newScript(t)
	d := s.open(agent.Config{})
	step := s.begin(d)
	s.awaitStream()
	d.Leave()
	wantEnd(t, step.Context(), context.Canceled)
	if err := step.Close(t.Context()); err != nil {
		t.Errorf("Close of a step after Leave = %v, want nil", err)
	}
}

func TestJoin(t *testing.T) {
	good := api.Delegation{ID: root, Chain: chain}
	for name, row := range map[string]struct {
		st   api.Standing
		want error
	}{
		"good":    {api.Standing{Delegation: &good}, nil},
		"frozen":  {api.Standing{Delegation: &good, Fence: &api.Fence{Frozen: true}}, nil},
		"revoked": {api.Standing{Delegation: &good, Fence: &api.Fence{}}, agent.ErrRevoked},
		"absent":  {api.Standing{}, agent.ErrUnavailable},
		"garbage": {api.Standing{Delegation: &api.Delegation{ID: child[:25], Chain: chain}}, agent.ErrUnavailable},
	} {
		s := newScript(t)
		s.joined = row.st
		d, err := s.client(agent.Config{}).Join(t.Context(), root)
		if !errors.Is(err, row.want) || row.want == nil && (err != nil || d.ID() != root) {
			t.Errorf("Join, %s: %v, want %v", name, err, row.want)
		}
	}
	path := agent.DelegationID("../grants/" + grant(1) + "/close")
	if _, err := newScript(t).client(agent.Config{}).Join(t.Context(), path); !errors.Is(err, agent.ErrNotFound) {
		t.Errorf("Join of a path = %v, want not found", err)
	}
}

// TestCollect: a sealed secret opens for its key and its grant alone, and wipes itself when it expires.
func TestCollect(t *testing.T) {
	s := newScript(t)
	s.lifetime = 200 * time.Millisecond
	c := s.client(agent.Config{})
	d, err := c.Open(t.Context(), agent.Chain{Task: "t"})
	if err != nil {
		t.Fatal(err)
	}
	key, err := agent.NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	other, err := agent.NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	sealed := func() agent.GrantID {
		t.Helper()
		step, err := d.Begin(t.Context(), agent.Call{Tool: "db", Seal: &agent.Seal{Key: key.Public()}})
		if err != nil {
			t.Fatal(err)
		}
		return step.Grant().ID
	}
	if _, err := c.Collect(t.Context(), sealed(), other); !errors.Is(err, agent.ErrUnavailable) {
		t.Errorf("Collect with another key = %v, want unavailable", err)
	}
	one, two := sealed(), sealed()
	s.mu.Lock()
	s.sealed[string(one)] = s.sealed[string(two)]
	s.mu.Unlock()
	if _, err := c.Collect(t.Context(), one, key); !errors.Is(err, agent.ErrUnavailable) {
		t.Errorf("Collect of the secret of another grant = %v, want unavailable", err)
	}
	secret, err := c.Collect(t.Context(), two, key)
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); secret.JSON() != nil; <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited 10 s for the secret to wipe itself")
		}
	}
}

func TestDelegate(t *testing.T) {
	id, err := newScript(t).open(agent.Config{}).Delegate(t.Context(), "spiffe://example.org/b", agent.Share{})
	if err != nil || id != child {
		t.Errorf("Delegate = %q, %v, want %s", id, err, child)
	}
}

// TestRedaction: printing, logging and encoding show nothing of a secret.
func TestRedaction(t *testing.T) {
	s := newScript(t)
	step := s.begin(s.open(agent.Config{}))
	var out strings.Builder
	secret := step.Secret()
	log := slog.New(slog.NewJSONHandler(&out, nil))
	log.Info("m", "pointer", secret, "value", *secret, "step", step.Grant())
	holder := struct{ S *agent.Secret }{secret}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%c", "%U", "%t", "%e", "%p"} {
		fmt.Fprintf(&out, verb+verb+verb, secret, *secret, holder)
	}
	fmt.Fprintln(&out, secret, *secret, struct{ s agent.Secret }{*secret})
	for _, v := range []any{secret, *secret, holder} {
		if err := json.MarshalWrite(&out, v); err != nil {
			t.Error(err)
		}
	}
	decimal := strings.Trim(fmt.Sprint([]byte(marker)), "[]")
	for _, form := range []string{marker, fmt.Sprintf("%x", marker), fmt.Sprintf("%X", marker), decimal} {
		if strings.Contains(out.String(), form) {
			t.Error("a printed secret shows")
		}
	}
	if !strings.Contains(out.String(), "[redacted]") {
		t.Errorf("the output has no [redacted]: %s", out.String())
	}
	if (agent.Secret{}).Field("x") != "" || (agent.Secret{}).JSON() != nil {
		t.Error("the zero Secret is not empty")
	}
}
