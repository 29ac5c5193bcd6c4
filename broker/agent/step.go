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
)

// Call describes the tool call that a step is for.
type Call struct {
	Tool    string        // the tool's name; required
	Args    Args          // the arguments of the call; nil: none
	Purpose string        // for the audit; at most 256 bytes
	TTL     time.Duration // the secret's lifetime, in whole seconds; zero: the longest that policy allows

	// IdempotencyKey makes it safe to send the same call again after a lost answer: the broker takes
	// one step per key and delivers its secret once. A second answer is a *Repeated. At most 128
	// bytes; empty: no key.
	IdempotencyKey string

	// Seal delivers the secret encrypted to a key, for its collector. The step's own Secret is then
	// empty. Nil: the secret arrives with the step.
	Seal *Seal
}

// Repeated says that the key was used for the same step before. It is an ErrConflict. Whoever
// has no secret of that step ends it with [Client.EndGrant] and takes another.
type Repeated struct {
	Grant Grant // the step's, as it is now
}

func (r *Repeated) Error() string { return "the step was taken before, as grant " + string(r.Grant.ID) }

// Unwrap gives the kind and code.
func (r *Repeated) Unwrap() error { return api.NewProblem(ErrConflict, api.CodeRepeated, "") }

// Step is one tool call with a secret of its own. Close it: that revokes the secret.
type Step struct {
	delegation *Delegation
	grant      Grant
	secret     *Secret
	ctx        context.Context
	cancel     context.CancelCauseFunc
	release    func() // of ctx's deadline

	mu     sync.Mutex // guards closed
	closed bool
}

// Context is the context of Begin. It ends sooner when the step is revoked (cause ErrRevoked),
// its secret is over (ErrExpired), the step is closed or the client is (context.Canceled).
func (s *Step) Context() context.Context { return s.ctx }

// Secret is the step's secret, empty once the step is closed.
func (s *Step) Secret() *Secret { return s.secret }

// Grant is what the broker recorded, as of Begin.
func (s *Step) Grant() Grant { return s.grant }

// Begin takes a step and gives it with its secret. The caller must close it. It blocks for one
// request, which it never repeats: after ErrUnavailable with the code "no_answer" the step may
// have been taken, and only an IdempotencyKey makes asking again safe.
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
	in := api.StepRequest{Tool: call.Tool, Purpose: call.Purpose, TTLSeconds: seconds(call.TTL)}
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
		header[strings.ToLower(api.IdempotencyKey)] = []string{call.IdempotencyKey} // see client.Call for the spelling
	}
	d.watch()
	begun := time.Now()
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
	d.heard()
	return d.start(ctx, begun, g, newSecret(out.Secret)), nil
}

// start makes the step of an answer. Its deadline counts from before the request, so that it
// is never later than the secret's end, whatever the two clocks say.
func (d *Delegation) start(ctx context.Context, begun time.Time, g Grant, secret *Secret) *Step {
	s := &Step{delegation: d, grant: g, secret: secret}
	life := g.Expires.Sub(g.Created)
	timed, release := context.WithDeadlineCause(ctx, begun.Add(life), api.NewProblem(ErrExpired, "expired", "the secret's time is over"))
	s.ctx, s.cancel = context.WithCancelCause(timed)
	s.release = release
	d.mu.Lock()
	defer d.mu.Unlock()
	d.running[s.grant.ID] = s.cancel
	switch {
	case d.ctx.Err() != nil:
		s.cancel(context.Cause(d.ctx))
	case d.ended[s.grant.ID]:
		s.cancel(revoked(""))
	}
	return s
}

// Close ends the step's context, wipes the secret and revokes it at the broker. It blocks until
// the secret is dead or the broker has waited long enough for that. After an error it may be
// called again; after success it does nothing.
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

// closeTime is how long Step tries to close after its function has returned.
const closeTime = 10 * time.Second

// Step takes a step, calls f with the step's context and secret, and closes the step, also when
// f panics or ctx has ended. The error is that of f, joined with the cause when the context
// ended under it and with that of closing: work may be done although its secret could not be
// closed, and then errors.Is(err, ErrUnavailable).
func (d *Delegation) Step(ctx context.Context, call Call, f func(context.Context, *Secret) error) (err error) {
	s, err := d.Begin(ctx, call)
	if err != nil {
		return err
	}
	defer func() {
		after, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTime)
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
