package wire_test

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestSelfTest has a broker test itself, and then breaks the way of revoking at one place after the other:
// each time the alarm comes within two periods, and goes away when it is mended.
func TestSelfTest(t *testing.T) {
	const every = 5 * time.Minute
	broken := errors.New("broken on purpose")
	at := func(point string) func(string) error {
		return func(p string) error {
			if p == point {
				return broken
			}
			return nil
		}
	}
	for name, row := range map[string]struct {
		harm func(*tested)
		say  string
	}{
		"nothing can be proven dead": {func(w *tested) { w.target.Fail(at("prove")) }, "not CLOSED in time"},
		"no step can be taken": {func(w *tested) {
			w.vault.Fail(at("child"))
		}, "taking a step"},
		"policy does not permit it": {func(w *tested) { w.deny(broker.ActionOpen) }, "which policy must permit"},
		"no fence is written":       {func(w *tested) { w.fence(broken) }, "revoking the chain"},
		"a fence means nothing":     {func(w *tested) { w.forget(true) }, "a step under the revoked chain"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newTested(t)
				ctx, cancel := context.WithCancel(t.Context())
				var done sync.WaitGroup
				done.Go(func() { w.run(ctx) })
				defer func() { cancel(); done.Wait(); w.b.Stop() }()

				w.quiet(every + time.Minute)
				lines(t, w.scrape(), "pawl_selftest_ok 1", "pawl_selftest_failures_total 0", "pawl_live_grants 0", "pawl_closure_seconds_count 0")
				if page := w.scrape(); strings.Contains(page, "pawl_selftest_success_timestamp_seconds 0\n") || strings.Contains(page, `pawl_steps_total{`) {
					t.Error("the metrics know of no success, or count a test as somebody's step")
				}
				row.harm(w)
				select {
				case said := <-w.alarms:
					if !strings.Contains(said, row.say) {
						t.Errorf("the alarm says %q, want %q", said, row.say)
					}
				case <-time.After(2 * every):
					t.Fatal("no alarm came within two periods")
				}
				lines(t, w.scrape(), "pawl_selftest_ok 0")
				w.mend()
				w.drain(2*every + time.Minute)
				lines(t, w.scrape(), "pawl_selftest_ok 1", "pawl_live_grants 0")
			})
		})
	}
}

// TestSelfTestConfig: a test that could not be made is an error at the start, and one that can is in the metrics.
func TestSelfTestConfig(t *testing.T) {
	for text, want := range map[string]string{
		"self_test: {every: 1s, tool: notes.read}":                        "self_test.every",
		"self_test: {tool: notes.read}":                                   "self_test.every",
		"self_test: {every: 1m}":                                          "self_test.tool",
		"self_test: {every: 1m, tool: Notes}":                             "self_test.tool",
		"self_test: {every: 1m, tool: notes.read, args: {a: {b: c}}}":     "self_test.args",
		"self_test: {every: 1m, tool: notes.read, args: {a: b}, then: c}": "then",
	} {
		if _, err := wire.ParseConfig([]byte(config + text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseConfig with %s = %v, want an error with %q", text, err, want)
		}
	}
	if _, err := wire.ParseConfig([]byte(config + "self_test: {every: 0s, tool: \"\", args: {}}")); err != nil {
		t.Errorf("ParseConfig with an empty self_test = %v, want that there is none", err)
	}
	s := newSite(t, "example.org")
	s.config.SelfTest = wire.SelfTest{Every: time.Minute, Tool: "notes.write"}
	if w, err := wire.Start(t.Context(), s.config, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "self_test.tool") {
		w.Close()
		t.Errorf("Start with a tool that is not there = %v, want an error", err)
	}
	s.config.SelfTest.Tool = "notes.read"
	s.start()
	lines(t, scrape(t, s), "pawl_selftest_ok 1", "pawl_selftest_success_timestamp_seconds 0")
}

// tested is an engine in memory whose parts can be broken, and its self-test.
type tested struct {
	t      *testing.T
	target *brokertest.Target
	vault  *brokertest.Vault
	b      *engine.Engine
	run    func(context.Context)
	scrape func() string
	alarms chan string

	mu      sync.Mutex // guards what follows
	denied  broker.Action
	noFence error
	blind   bool
}

func newTested(t *testing.T) *tested {
	w := &tested{t: t, target: brokertest.NewTarget(), alarms: make(chan string, 100)}
	w.vault = brokertest.NewVault(w.target)
	tools := brokertest.AllowAll("db")
	tools.Answer = func(q broker.Question) broker.Decision {
		w.mu.Lock()
		defer w.mu.Unlock()
		return broker.Decision{Allow: q.Action != w.denied && q.Action != broker.ActionReport}
	}
	parts := engine.Config{Ledger: lame{brokertest.NewMemory(), w}, Policy: func() broker.Policy { return tools }, Vault: w.vault,
		Backends: map[string]broker.Backend{"target": w.target}, Now: time.Now, Random: rand.Reader, SweepEvery: -1,
		Alarm: func(string, error) {}}
	m := wire.Counting(&parts, func(broker.ToolName) bool { return true }, func() error { return nil })
	var err error
	if w.b, err = engine.New(parts); err != nil {
		t.Fatal(err)
	}
	if err := w.b.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.run = wire.Tests(m, w.b, spiffeid.RequireFromString("spiffe://example.org/pawl/self-test"), broker.StepRequest{Tool: "db"}, 5*time.Minute,
		func(_ string, err error) { w.alarms <- err.Error() })
	w.scrape = func() string {
		r := httptest.NewRecorder()
		m.Handler().ServeHTTP(r, httptest.NewRequest("GET", "/metrics", nil))
		return r.Body.String()
	}
	return w
}

func (w *tested) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func (w *tested) deny(a broker.Action) { w.set(func() { w.denied = a }) }
func (w *tested) fence(err error)      { w.set(func() { w.noFence = err }) }
func (w *tested) forget(blind bool)    { w.set(func() { w.blind = blind }) }

func (w *tested) mend() {
	w.target.Fail(nil)
	w.vault.Fail(nil)
	w.set(func() { w.denied, w.noFence, w.blind = "", nil, false })
}

// quiet lets time pass and fails at an alarm.
func (w *tested) quiet(d time.Duration) {
	w.t.Helper()
	select {
	case said := <-w.alarms:
		w.t.Fatalf("an alarm without a cause: %s", said)
	case <-time.After(d):
	}
}

// drain lets time pass, whatever is said.
func (w *tested) drain(d time.Duration) {
	for end := time.After(d); ; {
		select {
		case <-w.alarms:
		case <-end:
			return
		}
	}
}

// lame is a ledger that takes no fence, or shows none, when told so.
type lame struct {
	broker.Ledger
	w *tested
}

func (l lame) Update(ctx context.Context, f func(broker.Tx) error) error {
	l.w.mu.Lock()
	noFence, blind := l.w.noFence, l.w.blind
	l.w.mu.Unlock()
	return l.Ledger.Update(ctx, func(tx broker.Tx) error { return f(lameTx{tx, noFence, blind}) })
}

type lameTx struct {
	broker.Tx
	noFence error
	blind   bool
}

func (t lameTx) Append(e broker.Entry) (broker.Revision, error) {
	if t.noFence != nil && e.Op == broker.OpFence {
		return 0, errors.Join(broker.ErrNotCommitted, t.noFence)
	}
	return t.Tx.Append(e)
}

// Put loses the mark of a fence when blind.
func (t lameTx) Put(key string, value []byte) error {
	if t.blind && strings.HasPrefix(key, "d/") && strings.Contains(string(value), `"fence"`) {
		return nil
	}
	return t.Tx.Put(key, value)
}
