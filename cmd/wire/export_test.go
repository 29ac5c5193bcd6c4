package wire

import (
	"net/http"

	"github.com/pawlsec/pawl/broker"
)

// Counting puts metrics over a ledger and alarms, as Start does.
func Counting(parts *broker.Config, known func(broker.ToolName) bool, ready func() error) *metrics {
	m := newMetrics(known, ready)
	parts.Ledger, parts.Alarm = counted{parts.Ledger, m}, m.alarm(parts.Alarm)
	return m
}

// Begin and Handler are the metrics' own.
var Begin = (*metrics).begin

// Handler is what is scraped.
func (m *metrics) Handler() http.Handler { return m.handler() }
