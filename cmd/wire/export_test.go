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

// Plugins gives the table's configuration keys, by plugin.
func Plugins() map[string][]string {
	keys := map[string][]string{}
	for _, p := range plugins {
		keys[p.name] = p.keys
	}
	return keys
}

// Counting puts metrics over a ledger and alarms, as Start does.
func Counting(parts *engine.Config, known func(broker.ToolName) bool, ready func() error) *metrics {
	m := newMetrics(known, ready)
	parts.Ledger, parts.Alarm = counted{parts.Ledger, m}, m.alarm(parts.Alarm)
	return m
}

// Begin and Handler are the metrics' own.
var Begin = (*metrics).begin

// Handler is what is scraped.
func (m *metrics) Handler() http.Handler { return m.handler() }

// Tests puts a self-test over an engine, as Start does, with metrics that leave its chains out.
func Tests(m *metrics, b *engine.Engine, id spiffeid.ID, step broker.StepRequest, every time.Duration, alarm func(string, error)) func(context.Context) {
	t := newSelfTest(b, id, step, every, alarm, slog.New(slog.DiscardHandler))
	m.tester = id
	t.register(m.registry)
	return t.run
}
