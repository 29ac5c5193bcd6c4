package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/broker/backoff"
)

// Delegation is a node of a chain that the agent holds. It is safe for concurrent use.
type Delegation struct {
	client *Client
	info   Info

	ctx context.Context // ends when the delegation ends, with the reason as its cause
	end context.CancelCauseFunc

	mu       sync.Mutex                          // guards everything below
	running  map[GrantID]context.CancelCauseFunc // steps by their grant
	ended    map[GrantID]bool                    // grants that the broker has ended
	watching bool
	silence  *time.Timer // of Config.FailClosed; nil: not set, or the stream is not watched
}

// hold makes the delegation of a record, and keeps its promise of heartbeats.
func (c *Client) hold(info Info) *Delegation {
	d := &Delegation{
		client: c, info: info,
		running: map[GrantID]context.CancelCauseFunc{}, ended: map[GrantID]bool{},
	}
	d.ctx, d.end = context.WithCancelCause(c.ctx)
	if info.Heartbeat > 0 {
		c.background(func() { d.sendHeartbeats(info.Heartbeat / 3) })
	}
	return d
}

// ID is the id by which the holder joins the delegation.
func (d *Delegation) ID() DelegationID { return d.info.ID }

// Info is the broker's record of the delegation, as of Open or Join.
func (d *Delegation) Info() Info { return d.info }

// Share is the part of a delegation that is passed on.
type Share struct {
	Rights []Right       // within the rights that the delegation may pass on
	Budget Budget        // zero fields take the delegation's limits
	Depth  int           // how many times the receiver may pass it on; less than the delegation's
	TTL    time.Duration // its lifetime, in whole seconds; zero: as long as the delegation

	// Heartbeat is the interval, in whole seconds, within which the receiver must send a request,
	// from its first one on. It is at most this agent's own; zero: the same.
	Heartbeat time.Duration
}

// Delegate passes a part of the delegation on to the agent with the SPIFFE ID to. That agent joins the
// delegation by the id that Delegate returns. The id is no secret: it is useless to every other agent.
// Delegate blocks for one request.
func (d *Delegation) Delegate(ctx context.Context, to string, s Share) (DelegationID, error) {
	child, err := d.delegate(ctx, to, s)
	if err != nil {
		return "", fmt.Errorf("delegating: %w", err)
	}
	return child.ID, nil
}

func (d *Delegation) delegate(ctx context.Context, to string, s Share) (Info, error) {
	rights, err := wireRights(s.Rights)
	if err != nil {
		return Info{}, err
	}
	in := api.DelegateRequest{
		To: to, Rights: rights, Budget: s.Budget, Depth: s.Depth, TTLSeconds: seconds(s.TTL),
		HeartbeatSeconds: seconds(s.Heartbeat),
	}
	var out api.Delegation
	if err := d.client.http.Call(ctx, http.MethodPost, d.path("/delegate"), nil, in, &out); err != nil {
		return Info{}, err
	}
	return infoOf(out)
}

// Context ends when the broker reports that the delegation is revoked or has expired, or when the
// client closes. context.Cause gives the reason: ErrRevoked, ErrExpired or context.Canceled. The
// client watches the delegation from the first call of Context or the first step on.
func (d *Delegation) Context() context.Context {
	d.watch()
	return d.ctx
}

// Leave stops watching the delegation and ends the contexts of its running steps. The delegation
// remains open at the broker. Leave does not block.
func (d *Delegation) Leave() { d.endAll(context.Canceled) }

// endAll ends the delegation and all its steps.
func (d *Delegation) endAll(cause error) {
	d.end(cause)
	d.cancelSteps(context.Cause(d.ctx))
}

func (d *Delegation) cancelSteps(cause error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, cancel := range d.running {
		cancel(cause)
	}
}

// endSteps ends the steps of the given grants. A grant may be listed before the answer to its own
// step: [Delegation.start] ends such a step.
func (d *Delegation) endSteps(grants []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, text := range grants {
		id := GrantID(text) // text of another form matches no step
		d.ended[id] = true
		if cancel := d.running[id]; cancel != nil {
			cancel(revokedError(""))
		}
	}
}

func (d *Delegation) path(rest string) string { return "/v1/delegations/" + segment(d.info.ID) + rest }

func revokedError(revocation string) *Error {
	p := api.NewProblem(ErrRevoked, "fenced", "the broker has revoked it")
	p.Revocation = revocation
	return p
}

// seconds rounds up, so that a duration under a second does not become the default.
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }

// segment keeps an id inside its segment of a path: any text can be converted to an id.
func segment[ID ~string](id ID) string { return url.PathEscape(string(id)) }

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
		wait := retry.Next()
		if p := new(Error); errors.As(err, &p) {
			wait = max(wait, p.RetryAfter())
		}
		_ = backoff.Sleep(d.ctx, wait) // the loop ends with its context
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
		if !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrOverLimit) {
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
