package operator

import (
	"context"
	"errors"
	"net/url"
	"time"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/broker/backoff"
)

// Follow calls f with the progress of a revocation, at once and after each change. It returns nil when the revocation
// is settled. If f returns an error, Follow returns the same error. A stream that is lost after its first event is
// reopened, until [Config].Patience has passed since the last event. The new stream begins with the present state, so
// no change is missed. The revocation itself does not depend on Follow.
func (c *Client) Follow(ctx context.Context, id string, f func(api.Revocation) error) error {
	w := follower{path: "/v1/revocations/" + url.PathEscape(id) + "/events", f: f}
	retry := backoff.Exponential{First: 50 * time.Millisecond, Most: 5 * time.Second, Jitter: 0.5}
	var waited time.Duration // in the waits since the last event
	for {
		before := w.events
		err := c.http.Follow(ctx, w.path, w.handle)
		if w.events > before {
			retry.Reset()
			waited = 0
		}
		if w.stopped || w.settled || w.events == 0 && err != nil || err != nil && !retryable(err) {
			return err
		}
		if err == nil {
			err = api.NewProblem(api.KindUnavailable, api.CodeNoAnswer, "the stream ended before the revocation was settled")
		}
		if waited >= c.patience || ctx.Err() != nil {
			return err
		}
		wait := retry.Next()
		if backoff.Sleep(ctx, wait) != nil {
			return err
		}
		waited += wait
	}
}

// follower is the state of one Follow.
type follower struct {
	path    string
	f       func(api.Revocation) error
	last    api.Revocation
	events  int
	settled bool
	stopped bool // by f, or by the broker
}

func (w *follower) handle(ev client.Event) error {
	switch ev.Name {
	case api.EventProblem:
		w.stopped = true // a new stream would return the same problem
		return ev.Problem()
	case api.EventRevocation:
		var rv api.Revocation
		if err := ev.Read(&rv); err != nil {
			return err
		}
		w.events++
		w.settled = rv.Freeze || !rv.Settled.IsZero()
		if w.events > 1 && rv == w.last {
			return nil // a reopened stream begins with a known state
		}
		w.last = rv
		if err := w.f(rv); err != nil {
			w.stopped = true
			return err
		}
	}
	return nil // a comment, or an event of a later version
}

// retryable reports whether a stream that could not be opened may open later.
func retryable(err error) bool {
	var p *api.Problem
	return errors.As(err, &p) && (p.Kind == api.KindUnavailable || p.Code == api.CodeTooManyStreams)
}
