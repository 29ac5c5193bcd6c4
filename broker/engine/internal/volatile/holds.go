package volatile

import (
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Holds watches the grants of held steps: those that end when no request of their holder holds them. It is in memory
// only. After a restart each holder has a longer grace to come back.
type Holds struct {
	// Lost ends a grant that was not held for its grace. It is called again until it returns true. Set it first.
	Lost func(broker.GrantID) (recorded bool)

	mu   sync.Mutex // guards the fields below
	held map[broker.GrantID]*hold
	done bool
}

type hold struct {
	requests int
	lost     bool        // Lost was called: it is too late for another request
	timer    *time.Timer // calls Lost; stopped while a request holds the grant
}

// Expect begins to watch a grant, which must be held before grace has passed.
func (h *Holds) Expect(id broker.GrantID, grace time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held == nil {
		h.held = map[broker.GrantID]*hold{}
	}
	if h.held[id] == nil && !h.done {
		one := &hold{}
		h.held[id] = one
		one.timer = time.AfterFunc(grace, func() { h.end(id, one, grace) })
	}
}

// end is the end of a grace.
func (h *Holds) end(id broker.GrantID, one *hold, grace time.Duration) {
	h.mu.Lock()
	if one.requests > 0 || h.done {
		h.mu.Unlock()
		return
	}
	one.lost = true
	h.mu.Unlock()
	recorded := h.Lost(id)
	h.mu.Lock()
	defer h.mu.Unlock()
	if recorded {
		delete(h.held, id)
	} else if !h.done {
		one.timer.Reset(grace)
	}
}

// Hold notes a request that holds the grant. ok is false for one that was lost, or is not watched. When release was
// called for each request, the grant has grace until it is lost.
func (h *Holds) Hold(id broker.GrantID, grace time.Duration) (release func(), ok bool) {
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
