package wire

import (
	"context"
	"net/http"
	"regexp"
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

// liveHeap adds go_gc_heap_live_bytes to the metrics: the bytes that the last garbage collection left.
var liveHeap = collectors.GoRuntimeMetricsRule{Matcher: regexp.MustCompile("^/gc/heap/live:bytes$")}

// metrics counts the entries that the ledger commits. Labels are the bundle's tools and fixed words: no id,
// and no name that an outsider can choose.
type metrics struct {
	registry *prometheus.Registry
	known    func(broker.ToolName) bool

	steps   *prometheus.CounterVec // by tool and outcome
	fences  *prometheus.CounterVec // by kind
	closure prometheus.Histogram
	orphans prometheus.Counter
	alarms  prometheus.Counter
	canary  *prometheus.CounterVec // by tool
	live    atomic.Int64           // grants that are not closed

	limited     *prometheus.CounterVec // by listener and limit
	differences *prometheus.CounterVec // of the candidate policy, by action and tool
	missed      prometheus.Counter
	candidate   atomic.Bool // a candidate policy is being compared

	tester spiffeid.ID // the self-test's caller: its chains are not counted; zero: none

	mu     sync.Mutex                        // guards the fields below
	fenced map[broker.RevocationID]time.Time // revocations that are not CLOSED yet
	tests  []broker.ChainID                  // the tester's latest chains
}

// maxTests bounds the tester's chains that are remembered. Each of them ends within two periods.
const maxTests = 16

// isTest reports whether an entry belongs to a chain of the tester. It remembers a new chain.
func (m *metrics) isTest(e broker.Entry) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e.Op == broker.OpOpen && !m.tester.IsZero() && e.Actor == m.tester.String() {
		m.addTestLocked(e.Chain)
	}
	return e.Chain != "" && slices.Contains(m.tests, e.Chain)
}

func (m *metrics) addTestLocked(id broker.ChainID) {
	m.tests = append(m.tests, id)
	m.tests = m.tests[max(len(m.tests)-maxTests, 0):]
}

// maxFenced bounds the revocations that are remembered until they are CLOSED. One with static secrets never is.
const maxFenced = 10_000

func newCounter(name, help string) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
}

func newCounterVec(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
}

func newGauge(name, help string, value func() float64) prometheus.GaugeFunc {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
}

func oneIf(ok bool) float64 {
	if ok {
		return 1
	}
	return 0
}

// newMetrics makes the metrics of a broker. known reports whether the bundle has a tool. ready returns nil while
// Vault answers. conditions returns the faults of the broker.
func newMetrics(known func(broker.ToolName) bool, ready func() error, conditions func() []broker.Condition) *metrics {
	m := &metrics{registry: prometheus.NewRegistry(), known: known, fenced: map[broker.RevocationID]time.Time{}}
	m.steps = newCounterVec("pawl_steps_total",
		"Steps, and reported violations, by tool and outcome: issued, denied, violation, unknown (whether Vault minted).",
		"tool", "outcome")
	m.fences = newCounterVec("pawl_fences_total", "Fences by kind: revoke, freeze.", "kind")
	m.closure = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "pawl_closure_seconds",
		Help:    "Time from fenced to closed with evidence, for revocations fenced since the start.",
		Buckets: []float64{0.01, 0.05, 0.1, 0.4, 1, 4, 15, 60, 300, 3600}})
	m.orphans = newCounter("pawl_strays_total",
		"Orphaned leases and logins: found alive under the broker's names and unknown to the ledger.")
	m.alarms = newCounter("pawl_alarms_total", "Alarms that a person should investigate; the log has each one.")
	m.limited = newCounterVec("pawl_limited_total", "Connections and requests that a limit refused or ended.",
		"listener", "limit")
	m.differences = newCounterVec("pawl_shadow_differences_total",
		"Questions that the candidate policy bundle would answer differently, by action and tool.", "action", "tool")
	m.missed = newCounter("pawl_shadow_missed_total",
		"Questions that were not put to the candidate policy bundle, or that it failed to answer.")
	m.canary = newCounterVec("pawl_canary_touches_total",
		"Touches of canaries, by tool; value: a planted value was presented.", "tool")
	m.registry.MustRegister(m.canary, m.limited, m.differences, m.missed, m.steps, m.fences, m.closure, m.orphans, m.alarms,
		conditionGauges{conditions},
		collectors.NewGoCollector(collectors.WithGoCollectorRuntimeMetrics(liveHeap)),
		newGauge("pawl_live_grants", "Grants that are not closed.", func() float64 { return float64(m.live.Load()) }),
		newGauge("pawl_shadow_candidate", "1 while a candidate policy bundle is compared.",
			func() float64 { return oneIf(m.candidate.Load()) }),
		newGauge("pawl_vault_ready", "1 while the broker is logged in to Vault, and Vault answers its requests.",
			func() float64 { return oneIf(ready() == nil) }),
		newGauge("pawl_closure_lag_seconds", "Age of the oldest fence of this process that is not closed yet; 0 without one.",
			func() float64 { return m.lag(time.Now()).Seconds() }))
	return m
}

// limit returns a function that counts the refusals by a limit of a listener.
func (m *metrics) limit(listener string) func(string) {
	return func(limit string) { m.limited.WithLabelValues(listener, limit).Inc() }
}

// addLimits adds the configured limits, and the shares of the open files.
func (m *metrics) addLimits(l Limits, f files) {
	add := func(name, help, label, value string, n int) {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: prometheus.Labels{label: value}})
		g.Set(float64(n))
		m.registry.MustRegister(g)
	}
	for name, n := range l.byName() {
		add("pawl_limit", "The limits of one caller or address.", "limit", name, n)
	}
	for name, n := range map[string]int{"limit": f.limit, "kept": f.kept, "agents": f.agents, "strangers": f.strangers,
		"operators": f.operators, "socket": f.socket} {
		add("pawl_files", "Files that the process may have open, and the shares of it.", "share", name, n)
	}
}

// addListener adds the numbers of open connections of a listener.
func (m *metrics) addListener(name string, open func() (identified, strangers int)) {
	const help = "Open connections by listener, with and without an SVID."
	gauge := func(svid string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "pawl_connections", Help: help,
			ConstLabels: prometheus.Labels{"listener": name, "svid": svid}}, value)
	}
	m.registry.MustRegister(
		gauge("yes", func() float64 { n, _ := open(); return float64(n) }),
		gauge("no", func() float64 { _, n := open(); return float64(n) }))
}

// addSubscriber adds the lag of a subscriber. Its name comes from the configuration.
func (m *metrics) addSubscriber(name string, lag func() time.Duration) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "pawl_subscriber_lag_seconds",
		Help:        "Age of the oldest event that a subscriber has not acknowledged; 0 without one.",
		ConstLabels: prometheus.Labels{"subscriber": name}}, func() float64 { return lag().Seconds() }))
}

// withClock adds the difference between the clocks.
func (m *metrics) withClock(skew func() (ahead, uncertain time.Duration, ok bool)) *metrics {
	m.registry.MustRegister(newGauge("pawl_vault_clock_seconds",
		"How far Vault's clock is ahead of the broker's, to about a second; 0 before Vault's first answer.",
		func() float64 { ahead, _, _ := skew(); return ahead.Seconds() }))
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// lag returns the age of the oldest fence that is not CLOSED yet.
func (m *metrics) lag(now time.Time) (lag time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, at := range m.fenced {
		lag = max(lag, now.Sub(at))
	}
	return lag
}

// seed sets the number of live grants from the ledger. Call it before the first entry is counted.
func (m *metrics) seed(ctx context.Context, b *engine.Engine) error {
	m.registry.MustRegister(newGauge("pawl_irrevocable_leases",
		"Leases of this broker that Vault has given up revoking, as of the last sweep; a person must end each by hand.",
		func() float64 { return float64(b.Irrevocable()) }))
	for state, of := range map[string]func() int{
		"removing": func() int { n, stuck := b.Leftovers(); return n - stuck },
		"stuck":    func() int { _, stuck := b.Leftovers(); return stuck },
	} {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "pawl_leftover_leases",
			Help: "Leases that Vault has still to remove for closed grants, whose secrets are dead at their target. Stuck: " +
				"for minutes, without progress.",
			ConstLabels: prometheus.Labels{"state": state}}, func() float64 { return float64(of()) }))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return broker.EachRecentPage(func(p broker.Page) (string, error) {
		chains, next, err := b.Chains(ctx, true, p)
		for _, c := range chains {
			if !m.tester.IsZero() && c.Chain.Opener == m.tester {
				m.addTestLocked(c.Chain.ID)
				continue
			}
			m.live.Add(int64(c.Live))
		}
		return next, err
	})
}

// alarm counts an alarm and then calls f.
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
		m.touched(e)
	case broker.OpDenied:
		if e.Detail == "issue" { // the detail names the procedure that refused
			m.step(e.Tool, "denied")
		}
	case broker.OpOrphan:
		m.orphans.Inc()
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

func (m *metrics) step(tool broker.ToolName, outcome string) {
	m.steps.WithLabelValues(m.label(tool), outcome).Inc()
}

// touched counts a touch of a canary.
func (m *metrics) touched(e broker.Entry) {
	switch {
	case e.Code != broker.Code(broker.ViolationCanary):
	case e.Tool == "":
		m.canary.WithLabelValues("value").Inc()
	default:
		m.canary.WithLabelValues(m.label(e.Tool)).Inc()
	}
}

// differs counts a question that the candidate policy would answer differently.
func (m *metrics) differs(q broker.Question) {
	m.differences.WithLabelValues(string(q.Action), m.label(q.Tool.Name)).Inc()
}

// label returns the tool's name, or "other" for a name that an agent made up.
func (m *metrics) label(tool broker.ToolName) string {
	if !m.known(tool) {
		tool = "other"
	}
	return string(tool)
}

// closed observes the time to CLOSED and forgets the revocation. The entry's detail begins with the closure.
func (m *metrics) closed(e broker.Entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	at, open := m.fenced[e.Revocation]
	if open && strings.HasPrefix(e.Detail, string(broker.ClosureClosed)+":") {
		m.closure.Observe(e.At.Sub(at).Seconds())
		delete(m.fenced, e.Revocation)
	}
}

// counted is a ledger that counts the entries it commits, and what their callers write.
type counted struct {
	broker.Ledger
	metrics *metrics
	shares  *shares
}

// Update implements [broker.Ledger].
func (l counted) Update(ctx context.Context, f func(broker.Tx) error) error {
	return l.count(f, func(f func(broker.Tx) error) error { return l.Ledger.Update(ctx, f) })
}

// Order implements [broker.Ledger].
func (l counted) Order(ctx context.Context, f func(broker.Tx) error, done func(error)) error {
	return l.count(f, func(f func(broker.Tx) error) error { return l.Ledger.Order(ctx, f, done) })
}

// count counts what f does in a transaction of write.
func (l counted) count(f func(broker.Tx) error, write func(func(broker.Tx) error) error) error {
	var counts countedTx
	err := write(func(tx broker.Tx) error {
		counts = countedTx{Tx: tx, entries: counts.entries[:0], written: map[string]int{}} // the ledger may call this again
		return f(&counts)
	})
	if err == nil && len(counts.entries) > 0 {
		for _, e := range counts.entries {
			l.metrics.count(e)
		}
		counts.written[counts.entries[0].Actor] += counts.bytes
		for actor, bytes := range counts.written {
			l.shares.charge(actor, bytes, time.Now())
		}
	}
	return err
}

// countedTx counts what a transaction writes. The records before an entry are its actor's: a transaction may have the
// ends of many callers' grants.
type countedTx struct {
	broker.Tx
	entries []broker.Entry
	written map[string]int // bytes, by actor
	bytes   int            // since the last entry
}

// Append implements [broker.Tx].
func (t *countedTx) Append(e broker.Entry) (broker.Revision, error) {
	t.entries = append(t.entries, e)
	t.written[e.Actor] += t.bytes + sizeOf(e)
	t.bytes = 0
	return t.Tx.Append(e)
}

// Put implements [broker.Tx].
func (t *countedTx) Put(key string, value []byte) error {
	t.bytes += len(key) + len(value)
	return t.Tx.Put(key, value)
}

// conditionGauges are metrics of the broker's conditions, read at each scrape.
type conditionGauges struct{ conditions func() []broker.Condition }

var (
	conditionDesc = prometheus.NewDesc("pawl_condition",
		"1 for each thing that is wrong with the broker, by part and code; /readyz has the details for operators.",
		[]string{"part", "code"}, nil)
	readyDesc = prometheus.NewDesc("pawl_ready", "1 while the broker can issue, as /readyz answers.", nil, nil)
)

// Describe implements [prometheus.Collector].
func (g conditionGauges) Describe(to chan<- *prometheus.Desc) { to <- conditionDesc; to <- readyDesc }

// Collect implements [prometheus.Collector]. Each label is a tool of the bundle or a fixed word.
func (g conditionGauges) Collect(to chan<- prometheus.Metric) {
	ready := true
	seen := map[[2]string]bool{}
	for _, c := range g.conditions() {
		ready = ready && !c.Blocks
		if labels := [2]string{c.Part, string(c.Code)}; !seen[labels] {
			seen[labels] = true
			to <- prometheus.MustNewConstMetric(conditionDesc, prometheus.GaugeValue, 1, labels[:]...)
		}
	}
	to <- prometheus.MustNewConstMetric(readyDesc, prometheus.GaugeValue, oneIf(ready))
}
