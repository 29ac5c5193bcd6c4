package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
)

// Delegation is what the agent may do, until it is over. It is safe for concurrent use.
type Delegation struct {
	client *Client
	info   Info

	ctx context.Context // ends when the delegation is over, with that as its cause
	end context.CancelCauseFunc

	mu       sync.Mutex                          // guards everything below
	running  map[GrantID]context.CancelCauseFunc // steps by their grant
	ended    map[GrantID]bool                    // grants that the broker has ended
	watching bool
	silence  *time.Timer // of Config.FailClosed; nil: off, or nothing is watched
}

func (c *Client) delegation(info Info) *Delegation {
	d := &Delegation{client: c, info: info, running: map[GrantID]context.CancelCauseFunc{}, ended: map[GrantID]bool{}}
	d.ctx, d.end = context.WithCancelCause(c.ctx)
	return d
}

// inUse is a delegation whose holder keeps the promise to be heard.
func (c *Client) inUse(info Info) *Delegation {
	d := c.delegation(info)
	if info.Heartbeat > 0 {
		c.background(func() { d.beat(info.Heartbeat / 3) })
	}
	return d
}

// beat tells the broker that the agent is there. A third of the interval leaves time for a lost
// answer, and for a broker that is being restarted.
func (d *Delegation) beat(every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-d.ctx.Done():
			return
		case <-tick.C:
		}
		ctx, cancel := context.WithTimeout(d.ctx, every)
		err := d.client.http.Call(ctx, http.MethodPost, d.path("/heard"), nil, api.HeardRequest{}, nil)
		cancel()
		if final(err) && d.ctx.Err() == nil { // the push of it was missed
			d.over(err)
			d.acknowledge(err)
			return
		}
	}
}

// ID is what another agent joins, if the delegation is that agent's.
func (d *Delegation) ID() DelegationID { return d.info.ID }

// Info is what the delegation allowed when the broker last said so in full.
func (d *Delegation) Info() Info { return d.info }

// Share is the part of a delegation that is passed on.
type Share struct {
	Rights []Right       // inside what the delegation may pass on
	Budget Budget        // zero fields take the delegation's limits
	Depth  int           // how many times the receiver may pass it on
	TTL    time.Duration // its life, in whole seconds; zero: as long as the delegation

	// Heartbeat is how often the receiver must be heard from its first request on, in whole seconds
	// and not less often than this agent; zero: as often.
	Heartbeat time.Duration
}

// Delegate passes less on to the agent with the SPIFFE ID to, which joins the id that it
// returns. It blocks for one request.
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

// Context ends when the broker says that the delegation is revoked or past its time, or when the
// client closes; context.Cause tells which, as ErrRevoked, ErrExpired or context.Canceled. From
// the first call on, or the first step, the client listens.
func (d *Delegation) Context() context.Context {
	d.watch()
	return d.ctx
}

// Leave stops listening and ends the contexts of the steps that are running. The delegation
// lives on at the broker. It does not block.
func (d *Delegation) Leave() { d.over(context.Canceled) }

func (d *Delegation) path(rest string) string { return "/v1/delegations/" + segment(d.info.ID) + rest }

// watch starts the one stream of the delegation.
func (d *Delegation) watch() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.watching || d.ctx.Err() != nil {
		return
	}
	d.watching = true
	if after := d.client.failClosed; after > 0 {
		d.silence = time.AfterFunc(after, func() {
			d.cancelRunning(api.NewProblem(ErrUnavailable, api.CodeNoAnswer, fmt.Sprintf("the broker was not heard of for %s", after)))
		})
	}
	d.client.background(d.follow)
}

// The waits between attempts to open a stream again: doubled each time, of which a random half.
const (
	firstWait = 100 * time.Millisecond
	longest   = 15 * time.Second
)

// follow keeps the stream open until the delegation is over.
func (d *Delegation) follow() {
	defer d.quiet()
	wait := firstWait
	for d.ctx.Err() == nil {
		err := d.client.http.Follow(d.ctx, d.path("/events"), func(ev client.Event) error {
			wait = firstWait
			d.heard()
			return d.hear(ev)
		})
		if final(err) {
			d.over(err)
			d.acknowledge(err)
			return
		}
		pause(d.ctx, wait)
		wait = min(2*wait, longest)
	}
	d.over(context.Cause(d.ctx))
}

// ackTime is how long one attempt to acknowledge a revocation may take. Close waits for it.
const ackTime = 2 * time.Second

// acknowledge tells the broker that the revocation was heard of and that the contexts of the
// delegation's steps have ended. Whether the functions under them have returned is not waited for:
// one that hangs must not hide that its agent knows.
func (d *Delegation) acknowledge(heard error) {
	var p *Error
	if !errors.As(heard, &p) || p.Kind != ErrRevoked || p.Revocation == "" {
		return
	}
	for wait := firstWait; d.client.ctx.Err() == nil; wait = min(2*wait, longest) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(d.client.ctx), ackTime)
		err := d.client.http.Call(ctx, http.MethodPost, d.path("/heard"), nil, api.HeardRequest{Revocation: p.Revocation}, nil)
		cancel()
		if !errors.Is(err, ErrUnavailable) {
			return
		}
		pause(d.client.ctx, wait)
	}
}

// pause waits for d, of which a random half, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d/2 + rand.N(d/2))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// final tells an end from what may pass.
func final(err error) bool {
	var p *Error
	if !errors.As(err, &p) || p.Retryable {
		return false
	}
	switch p.Kind {
	case ErrRevoked, ErrExpired, ErrNotFound:
		return true
	}
	return false // an identity that is being rotated, a broker that is being restarted
}

// hear takes one event in.
func (d *Delegation) hear(ev client.Event) error {
	switch ev.Name {
	case api.EventProblem:
		return ev.Problem()
	case api.EventStanding:
		var st api.Standing
		if err := ev.Read(&st); err != nil {
			return err
		}
		if st.Fence != nil && !st.Fence.Frozen {
			return revoked(st.Fence.Revocation)
		}
		d.stop(st.Ended)
	}
	return nil // a comment, or an event of a later version
}

// stop ends the steps of the given grants, those that are still being answered included.
func (d *Delegation) stop(grants []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, text := range grants {
		id := GrantID(text) // what is no grant's id matches no step
		d.ended[id] = true
		if cancel := d.running[id]; cancel != nil {
			cancel(revoked(""))
		}
	}
}

// over ends the delegation and all its steps.
func (d *Delegation) over(cause error) {
	d.end(cause)
	d.cancelRunning(context.Cause(d.ctx))
}

func (d *Delegation) cancelRunning(cause error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, cancel := range d.running {
		cancel(cause)
	}
}

// heard puts Config.FailClosed off.
func (d *Delegation) heard() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.silence != nil {
		d.silence.Reset(d.client.failClosed)
	}
}

func (d *Delegation) quiet() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.silence != nil {
		d.silence.Stop()
	}
	d.silence = nil
}

func revoked(revocation string) *Error {
	p := api.NewProblem(ErrRevoked, "fenced", "the broker has revoked it")
	p.Revocation = revocation
	return p
}

// seconds rounds up, so that a life under a second does not become the default.
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }

// segment keeps an id that came from elsewhere inside its segment of the path.
func segment[ID ~string](id ID) string { return url.PathEscape(string(id)) }
