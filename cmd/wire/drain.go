package wire

import (
	"context"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// The times of [Server.Drain], for an end within 15 s of the signal.
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

// enterIssuing lets in a request that gives out authority, unless the ledger was not checked or the broker stops.
func (s *Server) enterIssuing() (leave func(), err error) {
	if err := s.checked("issue"); err != nil {
		return nil, err
	}
	return s.gate.enter()
}

// Drain prepares for [Server.Close]. From its first moment the broker is not ready and refuses to open chains, to
// delegate and to take steps. Everything else goes on, so fences are taken until Close. Drain waits for the steps that
// have begun, until their mints have ended or were given up. Then it ends the sealed secrets that were not collected,
// which live in this process alone. It returns within 12 s.
func (s *Server) Drain() {
	inside, idle := s.gate.stop()
	s.log.Info("stopping: no new steps; steps under way end", "steps", inside)
	if s.stopSelfTest != nil {
		s.stopSelfTest()
	}
	wait := time.NewTimer(mintWait)
	defer wait.Stop()
	select {
	case <-idle:
	case <-wait.C:
		inside, _ = s.gate.stop()
		s.log.Error("stopping although steps are under way; the next start ends what they made", "steps", inside)
	}
	if s.Broker == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), sealedWait)
	defer cancel()
	ended, err := s.Broker.EndWaiting(ctx)
	for _, g := range ended {
		s.log.Warn("a sealed secret was not collected, and is ended", "grant", g.ID, "chain", g.Chain,
			"collector", g.Collector.String(), "dead", g.State == broker.StateClosed)
	}
	if err != nil {
		s.log.Error("ending sealed secrets that were not collected; the next start ends them", "error", err)
	}
}

// checked returns nil once the ledger's file was checked. Until then, and if the check failed, nothing may be handed out:
// a fence may be missing.
func (s *Server) checked(op string) error {
	select {
	case <-s.Ledger.Checked():
	default:
		return broker.Errorf(broker.Unavailable, op, "the broker has just started and checks its ledger").
			With(broker.CodeLedgerChecking).After(time.Second)
	}
	if err := s.Ledger.Unchecked(); err != nil {
		return broker.Errorf(broker.Unavailable, op, "the broker's ledger is damaged; operators must replace it").
			With(broker.CodeIssuingStopped).Because(err).After(time.Minute)
	}
	return nil
}

// watchCheck reports the end of the ledger's check.
func (s *Server) watchCheck(alarm func(string, error)) {
	began := time.Now()
	done := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-stop:
			return
		case <-s.Ledger.Checked():
		}
		if err := s.Ledger.Unchecked(); err != nil {
			alarm("the ledger failed its check: only fences and endings are taken", err)
			return
		}
		s.log.Info("the ledger was checked", "took", time.Since(began))
	}()
	s.onClose(func() { close(stop); <-done })
}
