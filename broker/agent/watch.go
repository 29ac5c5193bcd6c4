package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/broker/backoff"
)

// watch starts the delegation's one stream of events.
func (d *Delegation) watch() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.watching || d.ctx.Err() != nil {
		return
	}
	d.watching = true
	if after := d.client.failClosed; after > 0 {
		silent := api.NewProblem(ErrUnavailable, api.CodeNoAnswer, fmt.Sprintf("the broker was silent for %s", after))
		d.silence = time.AfterFunc(after, func() { d.cancelSteps(silent) })
	}
	d.client.background(d.follow)
}

// newBackoff returns the waits between attempts.
func newBackoff() backoff.Exponential {
	return backoff.Exponential{First: 100 * time.Millisecond, Most: 15 * time.Second, Jitter: 0.5}
}

// follow keeps the stream open until the delegation ends.
func (d *Delegation) follow() {
	defer d.stopSilence()
	retry := newBackoff()
	for d.ctx.Err() == nil {
		err := d.client.http.Follow(d.ctx, d.path("/events"), func(ev client.Event) error {
			retry.Reset()
			d.resetSilence()
			return d.handle(ev)
		})
		if isFinal(err) {
			d.endAll(err)
			d.acknowledge(err)
			return
		}
		_ = retry.Wait(d.ctx) // the loop ends with its context
	}
	d.endAll(context.Cause(d.ctx))
}

// handle applies one event. An error ends the stream.
func (d *Delegation) handle(ev client.Event) error {
	switch ev.Name {
	case api.EventProblem:
		return ev.Problem()
	case api.EventStanding:
		var status api.Standing
		if err := ev.Read(&status); err != nil {
			return err
		}
		if status.Fence != nil && !status.Fence.Frozen {
			return revokedError(status.Fence.Revocation)
		}
		d.endSteps(status.Ended)
	}
	return nil // a comment, or an event of a later version
}

// isFinal separates the end of a delegation from a fault that may pass, such as a rotated identity or
// a restart of the broker.
func isFinal(err error) bool {
	var p *Error
	if !errors.As(err, &p) || p.Retryable {
		return false
	}
	switch p.Kind {
	case ErrRevoked, ErrExpired, ErrNotFound:
		return true
	}
	return false
}

// sendHeartbeats keeps the promise of a heartbeat. Every is a third of the promised interval: that
// leaves time for a lost answer and for a restart of the broker.
func (d *Delegation) sendHeartbeats(every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-d.ctx.Done():
			return
		case <-tick.C:
		}
		ctx, cancel := context.WithTimeout(d.ctx, every)
		err := d.client.http.Call(ctx, http.MethodPost, d.path("/heartbeat"), nil, api.Nothing{}, nil)
		cancel()
		if isFinal(err) && d.ctx.Err() == nil { // the event was missed
			d.endAll(err)
			d.acknowledge(err)
			return
		}
	}
}

// ackTimeout bounds one attempt to acknowledge a revocation. Close waits for the attempt.
const ackTimeout = 2 * time.Second

// acknowledge confirms to the broker that the revocation in err has arrived and that the contexts of
// the delegation's steps have ended. It does not wait for the functions that run under them: a hung
// function must not hide that its agent was notified. It retries until the broker answers.
func (d *Delegation) acknowledge(err error) {
	var p *Error
	if !errors.As(err, &p) || p.Kind != ErrRevoked || p.Revocation == "" {
		return
	}
	in := api.AcknowledgeRequest{Revocation: p.Revocation}
	retry := newBackoff()
	for d.client.ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(d.client.ctx), ackTimeout)
		err := d.client.http.Call(ctx, http.MethodPost, d.path("/acknowledge"), nil, in, nil)
		cancel()
		if !errors.Is(err, ErrUnavailable) {
			return
		}
		_ = retry.Wait(d.client.ctx) // the loop ends with its context
	}
}

// resetSilence restarts the time of Config.FailClosed: the broker has sent something.
func (d *Delegation) resetSilence() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.silence != nil {
		d.silence.Reset(d.client.failClosed)
	}
}

func (d *Delegation) stopSilence() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.silence != nil {
		d.silence.Stop()
	}
	d.silence = nil
}
