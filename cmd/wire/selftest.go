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

// SelfTest configures the broker's own test that revoking works. The test opens a chain, takes a step, uses the secret
// as an agent does where the plugin can, and revokes the chain. It passes when the secret had the step's rights and no
// others, the revocation is CLOSED, the secret no longer works, and the next step is refused.
type SelfTest struct {
	Every time.Duration  `yaml:"every"` // the period, 10s or more; zero: never
	Tool  string         `yaml:"tool"`  // the tool of the test's step; required with every
	Args  map[string]any `yaml:"args"`  // the arguments of that step
}

// minSelfTestPeriod keeps self-tests a small part of a broker's load.
const minSelfTestPeriod = 10 * time.Second

func (t SelfTest) check() error {
	switch {
	case t.Every == 0 && t.Tool == "" && len(t.Args) == 0:
		return nil
	case t.Every < minSelfTestPeriod:
		return fmt.Errorf("self_test.every is %v; it must be at least %v", t.Every, minSelfTestPeriod)
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

// The names of a self-test in policies, lists and the audit log.
const (
	selfTestPath  = "/pawl/self-test"
	selfTestLabel = "selftest"
	selfTestName  = "pawl self-test"
)

// SelfTester returns the SPIFFE ID under which the broker tests itself. No workload may have it.
func SelfTester(c Config) (spiffeid.ID, error) {
	td, err := spiffeid.TrustDomainFromString(c.TrustDomains[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("trust_domains: %w", err)
	}
	return spiffeid.FromPath(td, selfTestPath)
}

// selfTest runs the test periodically and keeps the latest result.
type selfTest struct {
	b     *engine.Engine
	id    spiffeid.ID
	step  broker.StepRequest // without its delegation
	try   try
	every time.Duration
	alarm func(op string, err error)
	log   *slog.Logger
	now   func() time.Time

	mu       sync.Mutex // guards the fields below
	begun    time.Time  // when the period of the first test began
	success  time.Time  // when a test last passed; zero: never
	took     time.Duration
	failed   bool // the last test failed
	failures int
}

// run tests until ctx ends. A test that takes longer than a period has failed, so that the alarm is raised
// within two periods.
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
		t.record(begun, err)
	}
}

func (t *selfTest) record(begun time.Time, err error) {
	t.mu.Lock()
	if t.failed = err != nil; t.failed {
		t.failures++
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

// ok reports whether the last test passed and no test is late. A test is late after two periods.
func (t *selfTest) ok() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	last := t.success
	if last.IsZero() {
		last = t.begun
	}
	return !t.failed && t.now().Sub(last) <= 2*t.every
}

// once runs one test. It revokes the test's chain whether the test passes or fails.
func (t *selfTest) once(ctx context.Context) error {
	caller := broker.Caller{ID: t.id, Proof: broker.ProofX509, NotAfter: t.now().Add(2 * t.every)}
	root, err := t.b.Open(ctx, caller, broker.OpenRequest{
		Task: "self-test", Labels: map[string]string{selfTestLabel: "true"},
		Rights: []broker.Right{{Tool: t.step.Tool, Use: true}}, TTL: min(2*t.every, broker.MaxChainTTL)})
	if err != nil {
		return fmt.Errorf("opening a chain as %s, which policy must permit: %w", t.id, err)
	}
	step := t.step
	step.Delegation, step.Purpose = root.ID, "self-test"
	issued, stepErr := t.b.Issue(ctx, caller, step)
	ended, useErr := t.try(ctx, issued)
	issued.Secret.Wipe()
	err = t.revoke(ctx, caller, step, root.Chain)
	endErr := ended(context.WithoutCancel(ctx)) // it also closes what was opened
	switch {
	case errors.Is(err, errNotRevoked):
		return err
	case stepErr != nil:
		return fmt.Errorf("taking a step as %s, which policy must permit: %w", t.id, stepErr)
	case err == nil && endErr != nil:
		err = fmt.Errorf("the revocation is CLOSED, and %w", endErr)
	}
	return errors.Join(useErr, err)
}

var errNotRevoked = errors.New("revoking the chain")

// revoke revokes the test's chain, and waits until that is CLOSED.
func (t *selfTest) revoke(
	ctx context.Context, caller broker.Caller, step broker.StepRequest, chain broker.ChainID,
) error {
	sel, err := selector.Parse("chain:" + string(chain))
	if err != nil {
		return err
	}
	rv, err := t.b.Revoke(context.WithoutCancel(ctx), broker.Operator{Name: selfTestName},
		selector.Request{Selector: sel, Reason: "self-test"})
	if err != nil {
		return fmt.Errorf("%w: %w", errNotRevoked, err)
	}
	issued, err := t.b.Issue(ctx, caller, step)
	issued.Secret.Wipe()
	switch {
	case err == nil:
		return errors.New("a step under the revoked chain was issued a secret")
	case !errors.Is(err, broker.Revoked):
		return fmt.Errorf("a step under the revoked chain was not refused as revoked: %w", err)
	}
	return t.awaitClosed(ctx, rv.ID)
}

// awaitClosed waits until the revocation is CLOSED.
func (t *selfTest) awaitClosed(ctx context.Context, id broker.RevocationID) error {
	for {
		changed, cancel := t.b.Watch("")
		rv, err := t.b.Revocation(ctx, id)
		if err == nil && rv.Closure == broker.ClosureClosed {
			cancel()
			return nil
		}
		if err == nil && !rv.Settled.IsZero() {
			cancel()
			return fmt.Errorf("the revocation settled as %s, not CLOSED: %d alive, %d unknown", rv.Closure, rv.Alive, rv.Unknown)
		}
		select {
		case <-changed:
			cancel()
		case <-ctx.Done():
			cancel()
			if rv.Uncounted {
				return fmt.Errorf("the revocation is not CLOSED in time but %s, its grants not counted yet: %w", rv.Closure, ctx.Err())
			}
			return fmt.Errorf("the revocation is not CLOSED in time but %s: %d of %d proven dead: %w",
				rv.Closure, rv.Dead, rv.Grants, ctx.Err())
		}
	}
}

// register adds the metrics of the self-test.
func (t *selfTest) register(r prometheus.Registerer) {
	locked := func(f func() float64) func() float64 {
		return func() float64 {
			t.mu.Lock()
			defer t.mu.Unlock()
			return f()
		}
	}
	r.MustRegister(
		newGauge("pawl_selftest_seconds", "Duration of the last self-test that passed, from opening a chain to CLOSED.",
			locked(func() float64 { return t.took.Seconds() })),
		newGauge("pawl_selftest_success_timestamp_seconds", "When a self-test last passed; 0: never since the start.",
			locked(func() float64 {
				if t.success.IsZero() {
					return 0
				}
				return float64(t.success.UnixMilli()) / 1000
			})),
		prometheus.NewCounterFunc(
			prometheus.CounterOpts{Name: "pawl_selftest_failures_total", Help: "Self-tests that failed."},
			locked(func() float64 { return float64(t.failures) })),
		newGauge("pawl_selftest_ok", "1 while the last self-test passed and no self-test is late. Late is after two periods.",
			func() float64 { return oneIf(t.ok()) }))
}

// startSelfTest starts the configured self-test.
func (s *Server) startSelfTest(c Config, alarm func(string, error)) error {
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
	tool := func() (broker.Tool, bool) { return s.Policy.Current().Tool(step.Tool) }
	if _, ok := tool(); !ok {
		return fmt.Errorf("the policy bundle has no tool %q, which self_test.tool names", step.Tool)
	}
	t := newSelfTest(s.Broker, id, step, c.SelfTest.Every, alarm, s.log)
	t.try = tries(s.targets, tool)
	t.register(s.metrics.registry)
	ctx, stop := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { t.run(ctx) })
	s.stopSelfTest = func() { stop(); done.Wait() }
	s.onClose(s.stopSelfTest)
	return nil
}

func newSelfTest(
	b *engine.Engine, id spiffeid.ID, step broker.StepRequest, every time.Duration,
	alarm func(string, error), log *slog.Logger,
) *selfTest {
	return &selfTest{b: b, id: id, step: step, every: every, alarm: alarm, log: log, now: time.Now, begun: time.Now(),
		try: tryNothing}
}
