package wire

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine"
)

// metrics counts what the ledger commits. Labels are tools of the bundle and words of ours: no id,
// no name that somebody outside can choose.
type metrics struct {
	registry *prometheus.Registry
	known    func(broker.ToolName) bool

	steps   *prometheus.CounterVec // by tool and outcome
	fences  *prometheus.CounterVec // by kind
	closure prometheus.Histogram
	strays  prometheus.Counter
	alarms  prometheus.Counter
	live    atomic.Int64 // grants that are not over

	differences *prometheus.CounterVec // of a candidate policy, by action and tool
	missed      prometheus.Counter
	candidate   atomic.Bool // whether there is one

	tester spiffeid.ID // whose chains are not counted: they are tests of ours; zero: nobody's

	mu     sync.Mutex // guards what follows
	fenced map[broker.RevocationID]time.Time
	tests  []broker.ChainID // the last of tester's
}

// maxTests bounds the tester's chains that are known, each of which is over within two periods.
const maxTests = 16

// isTest reports whether an entry is of a chain of the tester's, and notes a new one.
func (m *metrics) isTest(e broker.Entry) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e.Op == broker.OpOpen && !m.tester.IsZero() && e.Actor == m.tester.String() {
		m.noteTest(e.Chain)
	}
	return e.Chain != "" && slices.Contains(m.tests, e.Chain)
}

func (m *metrics) noteTest(id broker.ChainID) {
	m.tests = append(m.tests, id)
	m.tests = m.tests[max(len(m.tests)-maxTests, 0):]
}

// maxFenced bounds the revocations whose closure is waited for; one with statics never closes.
const maxFenced = 10_000

// newMetrics makes the metrics of a broker. known says which tools there are, ready whether Vault answers.
func newMetrics(known func(broker.ToolName) bool, ready func() error) *metrics {
	m := &metrics{registry: prometheus.NewRegistry(), known: known, fenced: map[broker.RevocationID]time.Time{}}
	m.steps = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "pawl_steps_total",
		Help: "Steps, and reported violations, by tool and outcome: issued, denied, violation, unknown (whether Vault minted)."}, []string{"tool", "outcome"})
	m.fences = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "pawl_fences_total", Help: "Fences by kind: revoke, freeze."}, []string{"kind"})
	m.closure = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "pawl_closure_seconds", Help: "From fenced to closed with evidence, for revocations fenced since the start.",
		Buckets: []float64{0.01, 0.05, 0.1, 0.4, 1, 4, 15, 60, 300, 3600}})
	m.strays = prometheus.NewCounter(prometheus.CounterOpts{Name: "pawl_strays_total", Help: "Found alive under our names while the ledger did not know them."})
	m.alarms = prometheus.NewCounter(prometheus.CounterOpts{Name: "pawl_alarms_total", Help: "What a person should look at; the log says what."})
	m.differences = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "pawl_shadow_differences_total",
		Help: "Questions that the candidate policy bundle would answer differently, by action and tool."}, []string{"action", "tool"})
	m.missed = prometheus.NewCounter(prometheus.CounterOpts{Name: "pawl_shadow_missed_total", Help: "Questions that the candidate policy bundle was not asked, or broke on."})
	m.registry.MustRegister(m.differences, m.missed, m.steps, m.fences, m.closure, m.strays, m.alarms, collectors.NewGoCollector(),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "pawl_live_grants", Help: "Grants that are not over."},
			func() float64 { return float64(m.live.Load()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "pawl_shadow_candidate", Help: "1 while a candidate policy bundle is compared."},
			func() float64 {
				if m.candidate.Load() {
					return 1
				}
				return 0
			}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "pawl_vault_ready", Help: "1 while the broker is logged in to Vault."},
			func() float64 {
				if ready() != nil {
					return 0
				}
				return 1
			}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "pawl_closure_lag_seconds", Help: "Age of the oldest fence of this process that is not closed yet; 0 when there is none."},
			func() float64 { return m.lag(time.Now()).Seconds() }))
	return m
}

// subscriber adds how far behind one is. Its name is of the configuration.
func (m *metrics) subscriber(name string, lag func() time.Duration) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "pawl_subscriber_lag_seconds",
		Help:        "Age of the oldest event that a subscriber was not told of yet; 0 when there is none.",
		ConstLabels: prometheus.Labels{"subscriber": name}}, func() float64 { return lag().Seconds() }))
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// lag is the age of the oldest fence whose closure is waited for.
func (m *metrics) lag(now time.Time) (lag time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, at := range m.fenced {
		lag = max(lag, now.Sub(at))
	}
	return lag
}

// begin takes over how many grants were alive before anything is counted.
func (m *metrics) begin(ctx context.Context, b *engine.Engine) error {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "pawl_irrevocable_leases",
		Help: "Leases of ours that Vault has given up revoking, as of the last sweep; each needs a person."},
		func() float64 { return float64(b.Irrevocable()) }))
	chains, err := b.Chains(ctx, true)
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range chains {
		if !m.tester.IsZero() && c.Chain.Opener == m.tester {
			m.noteTest(c.Chain.ID)
			continue
		}
		m.live.Add(int64(c.Live))
	}
	return err
}

// alarm counts and then does as f does.
func (m *metrics) alarm(f func(string, error)) func(string, error) {
	return func(op string, err error) {
		m.alarms.Inc()
		f(op, err)
	}
}

// count counts one committed entry.
func (m *metrics) count(e broker.Entry) {
	if m.isTest(e) {
		return
	}
	switch e.Op {
	case broker.OpIntent:
		m.live.Add(1)
	case broker.OpClosed:
		m.live.Add(-1)
	case broker.OpIssued:
		m.step(e.Tool, "issued")
	case broker.OpUnknown:
		m.step(e.Tool, "unknown")
	case broker.OpViolation:
		m.step(e.Tool, "violation")
	case broker.OpDenied:
		if e.Detail == "issue" { // the procedure that refused
			m.step(e.Tool, "denied")
		}
	case broker.OpOrphan:
		m.strays.Inc()
	case broker.OpFreeze:
		m.fences.WithLabelValues("freeze").Inc()
	case broker.OpFence:
		m.fences.WithLabelValues("revoke").Inc()
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.fenced) < maxFenced {
			m.fenced[e.Revocation] = e.At
		}
	case broker.OpClosure:
		m.closed(e)
	}
}

// step counts a step.
func (m *metrics) step(tool broker.ToolName, outcome string) {
	m.steps.WithLabelValues(m.label(tool), outcome).Inc()
}

// differs counts a question that the candidate policy would answer differently.
func (m *metrics) differs(q broker.Question) {
	m.differences.WithLabelValues(string(q.Action), m.label(q.Tool.Name)).Inc()
}

// label is the tool's name. What an agent made up is no label.
func (m *metrics) label(tool broker.ToolName) string {
	if !m.known(tool) {
		tool = "other"
	}
	return string(tool)
}

// closed ends the wait for a revocation; its entry begins with the closure.
func (m *metrics) closed(e broker.Entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	at, waited := m.fenced[e.Revocation]
	if waited && strings.HasPrefix(e.Detail, string(broker.ClosureClosed)+":") {
		m.closure.Observe(e.At.Sub(at).Seconds())
		delete(m.fenced, e.Revocation)
	}
}

// counted is a ledger that counts the entries of what it commits.
type counted struct {
	broker.Ledger
	metrics *metrics
}

// Update implements [broker.Ledger].
func (l counted) Update(ctx context.Context, f func(broker.Tx) error) error {
	var entries []broker.Entry
	err := l.Ledger.Update(ctx, func(tx broker.Tx) error {
		entries = entries[:0] // it may run more than once
		return f(&countedTx{tx, &entries})
	})
	if err == nil {
		for _, e := range entries {
			l.metrics.count(e)
		}
	}
	return err
}

type countedTx struct {
	broker.Tx
	entries *[]broker.Entry
}

// Append implements [broker.Tx].
func (t *countedTx) Append(e broker.Entry) (broker.Revision, error) {
	*t.entries = append(*t.entries, e)
	return t.Tx.Append(e)
}
