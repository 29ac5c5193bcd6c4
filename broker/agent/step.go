package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/broker/backoff"
)

// Call describes the tool call that a step is for.
type Call struct {
	Tool    string        // the tool's name; required
	Args    Args          // the arguments of the call; nil: none
	Purpose string        // for the audit; at most 256 bytes
	TTL     time.Duration // the secret's lifetime, in whole seconds; zero: the longest that is allowed

	// IdempotencyKey makes it safe to send the same call again after a lost answer: the broker takes
	// one step per key and delivers its secret once. A second answer is a *Repeated. At most 128
	// bytes; empty: no key.
	IdempotencyKey string

	// Held ends the secret when this process ends, also when it is killed: the broker ends it about two
	// seconds after the last connection that holds the step is gone, and within 12 s when this machine
	// vanishes. A broker that restarts gives the step 30 s. A network that fails for longer than 1.5 s
	// ends the step too.
	Held bool

	// Seal delivers the secret encrypted to a key, for its collector. The step's own Secret is then
	// empty. Nil: the secret arrives with the step.
	Seal *Seal
}

// Repeated is the error for a key that was used before, for the same call. It is an ErrConflict. The
// secret is not delivered again. If it was lost, end its step with [Client.EndGrant] and take another.
type Repeated struct {
	Grant Grant // the grant of the first step, in its present state
}

func (r *Repeated) Error() string { return "the step was taken before, as grant " + string(r.Grant.ID) }

// Unwrap gives the kind and the code.
func (r *Repeated) Unwrap() error { return api.NewProblem(ErrConflict, api.CodeRepeated, "") }

// Step is one tool call with a secret of its own. Close it: that revokes the secret. It is safe for
// concurrent use.
type Step struct {
	delegation *Delegation
	grant      Grant
	secret     *Secret
	ctx        context.Context
	cancel     context.CancelCauseFunc
	release    func() // frees the timer of ctx's deadline

	mu     sync.Mutex // guards closed
	closed bool
}

// Context is derived from the context of Begin. It ends when the step is revoked (cause ErrRevoked),
// when its secret expires (ErrExpired), or when the step or the client is closed (context.Canceled).
func (s *Step) Context() context.Context { return s.ctx }

// Secret is the step's secret. It is empty once the step is closed.
func (s *Step) Secret() *Secret { return s.secret }

// Grant is the broker's record of the step, as of Begin.
func (s *Step) Grant() Grant { return s.grant }

// Begin takes a step and returns it with its secret. The caller must close it. Begin blocks for one
// request, which it never retries. After ErrUnavailable with the code "no_answer" the broker may have
// taken the step. Only an IdempotencyKey makes it safe to ask again.
func (d *Delegation) Begin(ctx context.Context, call Call) (*Step, error) {
	s, err := d.begin(ctx, call)
	if err != nil {
		return nil, fmt.Errorf("taking a step with %q: %w", call.Tool, err)
	}
	return s, nil
}

func (d *Delegation) begin(ctx context.Context, call Call) (*Step, error) {
	if d.ctx.Err() != nil {
		return nil, context.Cause(d.ctx)
	}
	in := api.StepRequest{Tool: call.Tool, Purpose: call.Purpose, TTLSeconds: seconds(call.TTL), Held: call.Held}
	if len(call.Args) > 0 {
		raw, err := json.Marshal(call.Args)
		if err != nil {
			return nil, api.NewProblem(ErrMalformed, "", "the arguments do not encode as JSON").Because(err)
		}
		in.Args = raw
	}
	if call.Seal != nil {
		in.Seal = &api.Seal{Key: call.Seal.Key, Collector: call.Seal.Collector}
	}
	header := http.Header{}
	if call.IdempotencyKey != "" {
		name := strings.ToLower(api.IdempotencyKey) // client.Call explains the lower case
		header[name] = []string{call.IdempotencyKey}
	}
	d.watch()
	asked := time.Now()
	var out api.Issued
	if err := d.client.http.Call(ctx, http.MethodPost, d.path("/steps"), header, in, &out); err != nil {
		return nil, err
	}
	g, err := grantOf(out.Grant)
	if err != nil {
		clear(out.Secret)
		return nil, err
	}
	if out.Repeated {
		return nil, &Repeated{Grant: g}
	}
	d.resetSilence()
	s := d.start(ctx, asked, g, newSecret(out.Secret))
	if call.Held {
		d.client.background(s.hold)
	}
	return s, nil
}

// hold holds the step at the broker until its context ends. The broker ends each request after some seconds.
func (s *Step) hold() {
	path := "/v1/grants/" + segment(s.grant.ID) + "/hold"
	retry := backoff.Exponential{First: 20 * time.Millisecond, Most: time.Second, Jitter: 0.5}
	for s.ctx.Err() == nil {
		err := s.delegation.client.http.Follow(s.ctx, path, func(client.Event) error { retry.Reset(); return nil })
		if isFinal(err) {
			s.cancel(err)
			return
		}
		if err != nil {
			_ = retry.Wait(s.ctx) // the loop ends with its context
		}
	}
}

// start makes the step of an answer. Its deadline counts from before the request. So it is never later
// than the secret's expiry, even if the two clocks differ.
func (d *Delegation) start(ctx context.Context, asked time.Time, g Grant, secret *Secret) *Step {
	s := &Step{delegation: d, grant: g, secret: secret}
	deadline := asked.Add(g.Expires.Sub(g.Created))
	expired := api.NewProblem(ErrExpired, "expired", "the secret has expired")
	timed, release := context.WithDeadlineCause(ctx, deadline, expired)
	s.ctx, s.cancel = context.WithCancelCause(timed)
	s.release = release
	d.mu.Lock()
	defer d.mu.Unlock()
	d.running[g.ID] = s.cancel
	switch {
	case d.ctx.Err() != nil:
		s.cancel(context.Cause(d.ctx))
	case d.ended[g.ID]:
		s.cancel(revokedError(""))
	}
	return s
}

// Close ends the step's context, wipes the secret and revokes it at the broker. It blocks until the
// secret is dead or the broker has waited long enough for that. After an error it may be called again.
// After success it does nothing.
func (s *Step) Close(ctx context.Context) error {
	d := s.delegation
	d.mu.Lock()
	delete(d.running, s.grant.ID)
	d.mu.Unlock()
	s.cancel(context.Canceled)
	s.release()
	s.secret.Wipe()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	_, err := d.client.EndGrant(ctx, s.grant.ID)
	s.closed = err == nil
	return err
}

// closeTimeout bounds the attempt of [Delegation.Step] to close its step.
const closeTimeout = 10 * time.Second

// Step takes a step, calls f with the step's context and secret, and closes the step. It closes the
// step after a panic of f and after the end of ctx, too; closing takes at most 10 s. The error joins up
// to three: that of f; the cause, when the context ended before f returned an error; and that of
// closing. The work may be complete although its secret could not be closed: closing then adds an
// error such as ErrUnavailable.
func (d *Delegation) Step(ctx context.Context, call Call, f func(context.Context, *Secret) error) (err error) {
	s, err := d.Begin(ctx, call)
	if err != nil {
		return err
	}
	defer func() {
		after, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		if closing := s.Close(after); closing != nil {
			err = errors.Join(err, closing)
		}
	}()
	if err = f(s.Context(), s.Secret()); err != nil && s.ctx.Err() != nil {
		if cause := context.Cause(s.ctx); !errors.Is(err, cause) {
			err = errors.Join(err, cause)
		}
	}
	return err
}
