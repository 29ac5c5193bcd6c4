package wire

import (
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// The times of a stop, for an end within 15 s of the signal.
const (
	// mintWait is how long steps that have begun may take. It covers the default of vault.mint_timeout, after which the
	// procedure records a mint without an answer as unknown. The next start ends what takes longer.
	mintWait = 10500 * time.Millisecond
	// sealedWait is how long the proof is awaited that the sealed secrets are dead.
	sealedWait = 1500 * time.Millisecond
	// closeWait is how long requests may take that have begun when the listeners close.
	closeWait = 1500 * time.Millisecond
)

// gate counts the requests that give out authority, and refuses them while the broker stops.
type gate struct {
	mu      sync.Mutex // guards the fields below
	stopped bool
	inside  int
	idle    chan struct{} // closed when the last one leaves a gate that is stopped; nil while it is open
}

// enter counts a request. It fails once the gate is stopped.
func (g *gate) enter() (leave func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stopped {
		return nil, stopping()
	}
	g.inside++
	return g.leave, nil
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inside--; g.inside == 0 && g.stopped {
		close(g.idle)
	}
}

// stop refuses all further requests. idle is closed when no earlier one is left.
func (g *gate) stop() (inside int, idle <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.stopped {
		g.stopped, g.idle = true, make(chan struct{})
		if g.inside == 0 {
			close(g.idle)
		}
	}
	return g.inside, g.idle
}

// open returns an error once the gate is stopped.
func (g *gate) open() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stopped {
		return stopping()
	}
	return nil
}

func stopping() *broker.Error {
	return broker.Errorf(broker.Unavailable, "issue", "this broker is stopping; nothing was handed out").
		With(broker.CodeStopping).After(time.Second)
}
