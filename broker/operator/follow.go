package operator

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/url"
	"time"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
)

// Follow calls f with how far a revocation has come, at once and whenever that has changed,
// until it is settled, which is nil, or f returns an error, which it gives back. A stream that is lost
// after its first event is opened again, for as long as [Config].Patience from the last event on; it
// begins with the present, so nothing is missed. The revocation itself goes on whether anybody follows it.
func (c *Client) Follow(ctx context.Context, id string, f func(api.Revocation) error) error {
	w := watching{path: "/v1/revocations/" + url.PathEscape(id) + "/events", f: f}
	var wait, waited time.Duration
	for {
		heard := w.events
		err := c.http.Follow(ctx, w.path, w.hear)
		if w.events > heard {
			wait, waited = firstWait, 0
		}
		if w.stopped || w.settled || w.events == 0 && err != nil || err != nil && !passing(err) {
			return err
		}
		if err == nil {
			err = api.NewProblem(api.KindUnavailable, api.CodeNoAnswer, "the stream ended before the revocation was settled")
		}
		if waited >= c.patience || ctx.Err() != nil {
			return err
		}
		if !pause(ctx, wait+rand.N(wait/2+1)) {
			return err
		}
		waited += wait
		wait = min(2*wait, longestWait)
	}
}

// The waits between two attempts to open a lost stream again.
const (
	firstWait   = 50 * time.Millisecond
	longestWait = 5 * time.Second
)

// watching is what a Follow has heard.
type watching struct {
	path    string
	f       func(api.Revocation) error
	last    api.Revocation
	events  int
	settled bool
	stopped bool // by f, or by the broker
}

func (w *watching) hear(ev client.Event) error {
	switch ev.Name {
	case api.EventProblem:
		w.stopped = true // opening it again gives the same
		return ev.Problem()
	case api.EventRevocation:
		var rv api.Revocation
		if err := ev.Read(&rv); err != nil {
			return err
		}
		w.events++
		w.settled = rv.Freeze || !rv.Settled.IsZero()
		if w.events > 1 && rv == w.last {
			return nil // a stream that was opened again begins with what is known
		}
		w.last = rv
		if err := w.f(rv); err != nil {
			w.stopped = true
			return err
		}
	}
	return nil // a comment, or an event of a later version
}

// passing reports whether a stream that could not be opened may be later.
func passing(err error) bool {
	var p *api.Problem
	return errors.As(err, &p) && (p.Kind == api.KindUnavailable || p.Code == api.CodeTooManyStreams)
}

// pause waits; false means that ctx is over.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
