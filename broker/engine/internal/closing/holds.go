package closing

import (
	"context"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// The graces of a held step, in which a request must hold it again.
const (
	HoldGrace   = 1500 * time.Millisecond
	ResumeGrace = 30 * time.Second // after a start: its holder may still connect to the last process
)

// Process has the calls about the secrets that end with this process, or with that of their holder. The engine embeds
// it.
type Process struct {
	Reaper  *Reaper
	Holds   *Holds
	Waiting func() []broker.GrantID // the sealed secrets that wait to be collected

	Beat func(broker.DelegationID, time.Time) // notes a sign of life of a holder
}

// Hold holds a step that was taken to be held, until release is called. Without any request that holds it, the step's
// secret ends after a grace.
//
// Errors: Unauthenticated, NotFound, Expired (it has ended, or was not taken to be held), Unavailable.
func (p Process) Hold(ctx context.Context, c broker.Caller, id broker.GrantID) (release func(), err error) {
	const op = "hold"
	if err := c.Check(op, p.Reaper.cfg.Now()); err != nil {
		return nil, err
	}
	var g broker.Grant
	if err := p.Reaper.cfg.View(ctx, op, func(tx *records.Tx) error { return tx.OwnGrant(op, c, id, &g) }); err != nil {
		return nil, err
	}
	release, held := p.Holds.hold(id, HoldGrace)
	if !held {
		return nil, broker.Errorf(broker.Expired, op, "the step has ended, or was not taken to be held").With(broker.CodeExpired)
	}
	return release, nil
}

// EndWaiting ends each sealed secret that waits to be collected, before this process ends and loses it. It waits as ctx
// allows for the proofs that they are dead, and returns their grants.
//
// Errors: Unavailable: the end is not recorded, and the Resume of the next engine ends them.
func (p Process) EndWaiting(ctx context.Context) ([]broker.Grant, error) {
	ended, err := p.Reaper.End(ctx, "stop", broker.EndingFailed,
		"the broker stopped before the sealed secret was collected", p.Waiting()...)
	p.Reaper.AwaitClosed(ctx, "stop", ended)
	return ended, err
}

// Holds watches the grants of held steps: those that end when no request of their holder holds them. It is in memory
// only. After a restart each holder has a longer grace to come back.
type Holds struct {
	r *Reaper

	mu   sync.Mutex // guards the fields below
	held map[broker.GrantID]*hold
	done bool
}

type hold struct {
	requests int
	lost     bool        // it is too late for another request
	timer    *time.Timer // ends the grace; stopped while a request holds the grant
}

// NewHolds makes a Holds that ends grants with r.
func NewHolds(r *Reaper) *Holds { return &Holds{r: r, held: map[broker.GrantID]*hold{}} }

// Expect begins to watch a grant, which must be held before grace has passed.
func (h *Holds) Expect(id broker.GrantID, grace time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held[id] == nil && !h.done {
		one := &hold{}
		h.held[id] = one
		one.timer = time.AfterFunc(grace, func() { h.end(id, one, grace) })
	}
}

// end is the end of a grace. While the ledger fails, another one follows.
func (h *Holds) end(id broker.GrantID, one *hold, grace time.Duration) {
	h.mu.Lock()
	if one.requests > 0 || h.done {
		h.mu.Unlock()
		return
	}
	one.lost = true
	h.mu.Unlock()
	_, err := h.r.End(h.r.cfg.Context, "hold", broker.EndingLost, "no connection of its holder is left", id)
	if err != nil && h.r.cfg.Context.Err() == nil {
		h.r.cfg.Alarm("ending a step whose holder is gone", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil {
		delete(h.held, id)
	} else if !h.done {
		one.timer.Reset(grace)
	}
}

// hold notes a request that holds the grant. ok is false for one that was lost, or is not watched. When release was
// called for each request, the grant has grace until it is lost.
func (h *Holds) hold(id broker.GrantID, grace time.Duration) (release func(), ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	one := h.held[id]
	if one == nil || one.lost {
		return nil, false
	}
	one.requests++
	one.timer.Stop()
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if one.requests--; one.requests == 0 && !h.done {
			one.timer.Reset(grace)
		}
	}, true
}

// Stop ends the watch: this process gives up no grant any more.
func (h *Holds) Stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.done = true
	for _, one := range h.held {
		one.timer.Stop()
	}
}

// Leftovers counts the leases that Vault has still to remove for closed grants, and those of them that are stuck.
func (p Process) Leftovers() (n, stuck int) {
	l, now := &p.Reaper.left, p.Reaper.cfg.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.by), l.stuckLocked(now)
}
