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

// TestSelfTest runs a broker's self-test and breaks revocation at one point per row. Each time the alarm is
// raised within two periods, and the self-test passes again after the repair.
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
		sabotage func(*tested)
		want     string
	}{
		"nothing can be proven dead": {func(w *tested) { w.target.Fail(at("prove")) }, "not CLOSED in time"},
		"no step can be taken":       {func(w *tested) { w.vault.Fail(at("child")) }, "taking a step"},
		"policy does not permit it":  {func(w *tested) { w.deny(broker.ActionOpen) }, "which policy must permit"},
		"no fence is written":        {func(w *tested) { w.failFences(broken) }, "revoking the chain"},
		"a fence has no effect":      {func(w *tested) { w.loseFences() }, "a step under the revoked chain"},
		"the secret has more rights": {func(w *tested) { w.set(func() { w.useErr = broken }) }, "broken on purpose"},
		"the secret works on":        {func(w *tested) { w.set(func() { w.endErr = broken }) }, "is CLOSED, and broken on purpose"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newTested(t)
				ctx, cancel := context.WithCancel(t.Context())
				var done sync.WaitGroup
				done.Go(func() { w.run(ctx) })
				defer func() { cancel(); done.Wait(); w.b.Stop() }()

				w.quiet(every + time.Minute)
				page := w.scrape()
				lines(t, page, "pawl_selftest_ok 1", "pawl_selftest_failures_total 0", "pawl_live_grants 0",
					"pawl_closure_seconds_count 0")
				if strings.Contains(page, "pawl_selftest_success_timestamp_seconds 0\n") {
					t.Error("the metrics have no success of the self-test")
				}
				if strings.Contains(page, `pawl_steps_total{`) {
					t.Error("the metrics count the self-test's step")
				}
				row.sabotage(w)
				select {
				case alarm := <-w.alarms:
					if !strings.Contains(alarm, row.want) {
						t.Errorf("the alarm is %q, want %q", alarm, row.want)
					}
				case <-time.After(2 * every):
					t.Fatal("no alarm was raised within two periods")
				}
				lines(t, w.scrape(), "pawl_selftest_ok 0")
				w.repair()
				w.drain(2*every + time.Minute)
				lines(t, w.scrape(), "pawl_selftest_ok 1", "pawl_live_grants 0")
			})
		})
	}
}

// TestSelfTestConfig holds that an impossible self-test is an error at the start, and that a possible one is in
// the metrics.
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
		t.Errorf("ParseConfig with an empty self_test = %v, want no error and no self-test", err)
	}
	s := newSite(t, "example.org")
	s.config.SelfTest = wire.SelfTest{Every: time.Minute, Tool: "notes.write"}
	w, err := wire.Start(t.Context(), s.config, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "self_test.tool") {
		w.Close()
		t.Errorf("Start with an unknown tool = %v, want an error", err)
	}
	s.config.SelfTest.Tool = "notes.read"
	s.start()
	lines(t, scrape(t, s), "pawl_selftest_ok 1", "pawl_selftest_success_timestamp_seconds 0")
}

// tested is an in-memory engine with parts that can be broken, and its self-test.
type tested struct {
	t      *testing.T
	target *brokertest.Target
	vault  *brokertest.Vault
	b      *engine.Engine
	run    func(context.Context)
	scrape func() string
	alarms chan string

	mu         sync.Mutex // guards the fields below
	denied     broker.Action
	fenceErr   error // refuses every fence
	fencesLost bool  // commits every fence without its mark
	useErr     error // of the use of a secret
	endErr     error // of the use after its end
}

// try is a use of a secret that finds what useErr and endErr say.
func (w *tested) try(_ context.Context, issued broker.Issued) (func(context.Context) error, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if issued.Secret.Empty() {
		return func(context.Context) error { return nil }, nil
	}
	endErr := w.endErr
	return func(context.Context) error { return endErr }, w.useErr
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
	parts := engine.Config{Ledger: faultyLedger{brokertest.NewMemory(), w}, Vault: w.vault,
		Policy:   func() broker.Policy { return tools },
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
	w.run = wire.Tests(m, w.b, spiffeid.RequireFromString("spiffe://example.org/pawl/self-test"),
		broker.StepRequest{Tool: "db"}, 5*time.Minute, func(_ string, err error) { w.alarms <- err.Error() }, w.try)
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
func (w *tested) failFences(err error) { w.set(func() { w.fenceErr = err }) }
func (w *tested) loseFences()          { w.set(func() { w.fencesLost = true }) }

func (w *tested) repair() {
	w.target.Fail(nil)
	w.vault.Fail(nil)
	w.set(func() { w.denied, w.fenceErr, w.fencesLost, w.useErr, w.endErr = "", nil, false, nil, nil })
}

// quiet waits for d and fails the test at an alarm.
func (w *tested) quiet(d time.Duration) {
	w.t.Helper()
	select {
	case alarm := <-w.alarms:
		w.t.Fatalf("an alarm without a cause: %s", alarm)
	case <-time.After(d):
	}
}

// drain waits for d and drops alarms.
func (w *tested) drain(d time.Duration) {
	for end := time.After(d); ; {
		select {
		case <-w.alarms:
		case <-end:
			return
		}
	}
}

// faultyLedger refuses or loses fences, as the fields of w select.
type faultyLedger struct {
	broker.Ledger
	w *tested
}

func (l faultyLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	l.w.mu.Lock()
	fenceErr, fencesLost := l.w.fenceErr, l.w.fencesLost
	l.w.mu.Unlock()
	return l.Ledger.Update(ctx, func(tx broker.Tx) error {
		return f(&faultyTx{Tx: tx, fenceErr: fenceErr, fencesLost: fencesLost})
	})
}

type faultyTx struct {
	broker.Tx
	fenceErr   error
	fencesLost bool
	fences     bool // the transaction writes a fence
}

func (t *faultyTx) Append(e broker.Entry) (broker.Revision, error) {
	t.fences = t.fences || e.Op == broker.OpFence
	if t.fenceErr != nil && e.Op == broker.OpFence {
		return 0, errors.Join(broker.ErrNotCommitted, t.fenceErr)
	}
	return t.Tx.Append(e)
}

// Put drops the fenced delegation's record with fencesLost. The fence's entry comes before that record.
func (t *faultyTx) Put(key string, value []byte) error {
	if t.fencesLost && t.fences && strings.HasPrefix(key, "d/") {
		return nil
	}
	return t.Tx.Put(key, value)
}
