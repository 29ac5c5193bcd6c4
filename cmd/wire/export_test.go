package wire

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine"
)

// OpenArchive is openArchive.
var OpenArchive = openArchive

// Plugins gives the table's configuration keys, by plugin.
func Plugins() map[string][]string {
	keys := map[string][]string{}
	for _, p := range plugins {
		keys[p.name] = p.keys
	}
	return keys
}

// Counting wraps the ledger and the alarms of parts with metrics, as Start does.
func Counting(parts *engine.Config, known func(broker.ToolName) bool, ready func() error) *metrics {
	m := newMetrics(known, ready, func() []broker.Condition { return nil })
	parts.Ledger, parts.Alarm = counted{parts.Ledger, m, newShares(1 << 40)}, m.alarm(parts.Alarm)
	return m
}

// Seed is the metrics' seed method.
var Seed = (*metrics).seed

// Handler serves the metrics.
func (m *metrics) Handler() http.Handler { return m.handler() }

// Tests makes a self-test of an engine, as Start does, and returns its run method. m does not count the
// self-test's chains.
func Tests(
	m *metrics, b *engine.Engine, id spiffeid.ID, step broker.StepRequest, every time.Duration, alarm func(string, error),
	try func(context.Context, broker.Issued) (func(context.Context) error, error),
) func(context.Context) {
	t := newSelfTest(b, id, step, every, alarm, slog.New(slog.DiscardHandler))
	t.try = try
	m.tester = id
	t.register(m.registry)
	return t.run
}

// Tokens returns what gives the broker's JWT-SVIDs for Vault, and watch, which begins to watch its identity as Start does.
func Tokens(c Config, audience string) (token func(context.Context) (string, error), watch func() *Server, err error) {
	svids, err := newSVIDSource(c, slog.New(slog.DiscardHandler))
	return jwtFor(svids, audience), func() *Server {
		s := &Server{}
		s.watchIdentity(svids, false)
		return s
	}, err
}

// Charged returns the bytes of the ledger that an actor was charged for.
func (s *Server) Charged(actor string) int64 { return s.shares.charged(actor) }

func (s *shares) charged(actor string) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	one := s.byActor[actor]
	if one == nil {
		return 0
	}
	l := one.Value.(*share).limiter
	return int64(float64(l.Burst()) - l.TokensAt(time.Now()))
}

// ChargedFor returns the bytes that each actor is charged for after one update of a ledger.
func ChargedFor(l broker.Ledger, f func(broker.Tx) error, actors ...string) (bytes []int64, err error) {
	known := func(broker.ToolName) bool { return true }
	c := counted{l, newMetrics(known, func() error { return nil }, func() []broker.Condition { return nil }), newShares(1 << 40)}
	err = c.Update(context.Background(), f)
	for _, actor := range actors {
		bytes = append(bytes, c.shares.charged(actor))
	}
	return bytes, err
}

// Leftovers gives the faults for so many leftover leases, and so many of them stuck.
func Leftovers(n, stuck int) []broker.Condition { return leftovers(n, stuck) }
