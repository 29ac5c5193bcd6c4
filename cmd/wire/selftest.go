package wire

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/selector"
)

// SelfTest says how the broker tries by itself whether revoking works: it opens a chain, takes a
// step, revokes the chain, and wants it CLOSED and the next step refused.
type SelfTest struct {
	Every time.Duration  `yaml:"every"` // how often, 10s and more; zero: never
	Tool  string         `yaml:"tool"`  // the tool of its step; required with every
	Args  map[string]any `yaml:"args"`  // the step's arguments
}

// leastSelfTest keeps a self-test from being most of what a broker does.
const leastSelfTest = 10 * time.Second

func (t SelfTest) check() error {
	switch {
	case t.Every == 0 && t.Tool == "" && len(t.Args) == 0:
		return nil
	case t.Every < leastSelfTest:
		return fmt.Errorf("self_test.every is %v; it is %v and more", t.Every, leastSelfTest)
	case t.Tool == "":
		return errors.New("self_test.tool is required")
	}
	_, err := t.step()
	return err
}

func (t SelfTest) step() (r broker.StepRequest, err error) {
	if r.Tool, err = broker.ParseToolName(t.Tool); err != nil {
		return r, fmt.Errorf("self_test.tool: %w", err)
	}
	if len(t.Args) == 0 {
		return r, nil
	}
	raw, err := json.Marshal(t.Args)
	if err == nil {
		r.Args, err = args.Parse(raw)
	}
	if err != nil {
		return r, fmt.Errorf("self_test.args: %w", err)
	}
	return r, nil
}

// The names by which a self-test is known in policies, lists and the audit.
const (
	selfTestPath  = "/pawl/self-test"
	selfTestLabel = "selftest"
	selfTestName  = "pawl self-test"
)

// SelfTester is the SPIFFE ID under which the broker tests itself. No workload may have it.
func SelfTester(c Config) (spiffeid.ID, error) {
	td, err := spiffeid.TrustDomainFromString(c.TrustDomains[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("trust_domains: %w", err)
	}
	return spiffeid.FromPath(td, selfTestPath)
}

// selfTest makes the test again and again, and keeps what came of it.
type selfTest struct {
	b     *engine.Engine
	id    spiffeid.ID
	step  broker.StepRequest // without its delegation
	every time.Duration
	alarm func(op string, err error)
	log   *slog.Logger
	now   func() time.Time

	mu      sync.Mutex // guards what follows
	begun   time.Time  // the first test is counted from here
	success time.Time  // of the last success; zero: none yet
	took    time.Duration
	failed  bool // the last one did
	count   int  // of failures
}

// run tests until ctx ends. A test that takes longer than a period has failed, so that the alarm comes
// within two.
func (t *selfTest) run(ctx context.Context) {
	tick := time.NewTicker(t.every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		once, cancel := context.WithTimeout(ctx, t.every)
		begun := t.now()
		err := t.once(once)
		cancel()
		if ctx.Err() != nil {
			return
		}
		t.note(begun, err)
	}
}

func (t *selfTest) note(begun time.Time, err error) {
	t.mu.Lock()
	if t.failed = err != nil; t.failed {
		t.count++
	} else {
		t.success, t.took = t.now(), t.now().Sub(begun)
	}
	t.mu.Unlock()
	if err != nil {
		t.alarm("self-test of revoking", err)
		return
	}
	t.log.Info("self-test of revoking passed", "took", t.now().Sub(begun))
}

// ok reports whether the last test passed and none is late.
func (t *selfTest) ok() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	last := t.success
	if last.IsZero() {
		last = t.begun
	}
	return !t.failed && t.now().Sub(last) <= 2*t.every
}

// once is one test. Whatever it finds, its chain is revoked.
func (t *selfTest) once(ctx context.Context) error {
	caller := broker.Caller{ID: t.id, Proof: broker.ProofX509, NotAfter: t.now().Add(2 * t.every)}
	root, err := t.b.Open(ctx, caller, broker.OpenRequest{Task: "self-test", Labels: map[string]string{selfTestLabel: "true"},
		Rights: []broker.Right{{Tool: t.step.Tool, Use: true}}, TTL: min(2*t.every, broker.MaxChainTTL)})
	if err != nil {
		return fmt.Errorf("opening a chain as %s, which policy must permit: %w", t.id, err)
	}
	step := t.step
	step.Delegation, step.Purpose = root.ID, "self-test"
	issued, stepErr := t.b.Issue(ctx, caller, step)
	issued.Secret.Wipe()
	sel, err := selector.Parse("chain:" + string(root.Chain))
	if err != nil {
		return err
	}
	rv, err := t.b.Revoke(context.WithoutCancel(ctx), broker.Operator{Name: selfTestName}, selector.Request{Selector: sel, Reason: "self-test"})
	switch {
	case err != nil:
		return fmt.Errorf("revoking the chain: %w", err)
	case stepErr != nil:
		return fmt.Errorf("taking a step as %s, which policy must permit: %w", t.id, stepErr)
	}
	issued, err = t.b.Issue(ctx, caller, step)
	issued.Secret.Wipe()
	switch {
	case err == nil:
		return errors.New("a step under the revoked chain was given a secret")
	case !errors.Is(err, broker.Revoked):
		return fmt.Errorf("a step under the revoked chain was not refused as revoked: %w", err)
	}
	return t.closed(ctx, rv.ID)
}

// closed waits until the revocation is CLOSED.
func (t *selfTest) closed(ctx context.Context, id broker.RevocationID) error {
	for {
		changed, cancel := t.b.Watch("")
		rv, err := t.b.Revocation(ctx, id)
		if err == nil && rv.Closure == broker.ClosureClosed {
			cancel()
			return nil
		}
		if err == nil && !rv.Settled.IsZero() {
			cancel()
			return fmt.Errorf("the revocation ended %s and not CLOSED: %d alive, %d unknown", rv.Closure, rv.Alive, rv.Unknown)
		}
		select {
		case <-changed:
			cancel()
		case <-ctx.Done():
			cancel()
			return fmt.Errorf("not CLOSED in time but %s: %d of %d proven dead: %w", rv.Closure, rv.Dead, rv.Grants, ctx.Err())
		}
	}
}

// register adds what the tests show to the metrics.
func (t *selfTest) register(r prometheus.Registerer) {
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			t.mu.Lock()
			defer t.mu.Unlock()
			return f()
		}))
	}
	gauge("pawl_selftest_seconds", "How long the last self-test that passed took, from opening a chain to CLOSED.", func() float64 { return t.took.Seconds() })
	gauge("pawl_selftest_success_timestamp_seconds", "When a self-test passed last; 0: never since the start.", func() float64 {
		if t.success.IsZero() {
			return 0
		}
		return float64(t.success.UnixMilli()) / 1000
	})
	r.MustRegister(
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "pawl_selftest_failures_total", Help: "Self-tests that failed."}, func() float64 {
			t.mu.Lock()
			defer t.mu.Unlock()
			return float64(t.count)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "pawl_selftest_ok", Help: "1 while the last self-test passed and none is late: two periods."}, func() float64 {
			if t.ok() {
				return 1
			}
			return 0
		}))
}

// testSelf begins the configured self-test.
func (s *Server) testSelf(c Config, alarm func(string, error)) error {
	if c.SelfTest.Every == 0 {
		return nil
	}
	id, err := SelfTester(c)
	if err != nil {
		return err
	}
	step, err := c.SelfTest.step()
	if err != nil {
		return err
	}
	if _, ok := s.Policy.Current().Tool(step.Tool); !ok {
		return fmt.Errorf("self_test.tool %q is none of the policy bundle's", step.Tool)
	}
	t := newSelfTest(s.Broker, id, step, c.SelfTest.Every, alarm, s.log)
	t.register(s.metrics.registry)
	ctx, stop := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { t.run(ctx) })
	s.later(func() { stop(); done.Wait() })
	return nil
}

func newSelfTest(b *engine.Engine, id spiffeid.ID, step broker.StepRequest, every time.Duration, alarm func(string, error), log *slog.Logger) *selfTest {
	return &selfTest{b: b, id: id, step: step, every: every, alarm: alarm, log: log, now: time.Now, begun: time.Now()}
}
