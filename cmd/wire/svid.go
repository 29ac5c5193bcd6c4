package wire

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/broker/backoff"
)

// svidSource has the broker's own SVID and the trust bundles, from the last update of the Workload API.
// It starts empty and returns an error until the first update: a broker without an identity can still fence
// over its local socket, but nothing else. Safe for concurrent use.
type svidSource struct {
	options   []workloadapi.ClientOption
	want      client.Identity // the configured choice of several
	log       *slog.Logger
	now       func() time.Time
	attempted chan struct{} // closed after the first attempt to get the X.509 identity, successful or not

	mu   sync.RWMutex // guards the fields below
	x509 *workloadapi.X509Context
	own  *x509svid.SVID // the broker's of x509; nil if x509 lacks it, or the choice is not clear
	kept spiffeid.ID    // of the last own
	jwts *jwtbundle.Set
	err  error // of the last attempt to get the X.509 identity; nil after a success
}

var errNoIdentity = errors.New("the Workload API has not given the broker an identity yet")

// newSVIDSource checks the Workload API's address. It fetches nothing before [Server.watchIdentity].
func newSVIDSource(c Config, log *slog.Logger) (*svidSource, error) {
	want, err := client.ParseIdentity(c.SPIFFEID)
	if err != nil {
		return nil, fmt.Errorf("spiffe_id: %w", err)
	}
	s := &svidSource{want: want, log: log, now: time.Now, attempted: make(chan struct{})}
	address, set := c.WorkloadAPI, true
	if address == "" {
		address, set = workloadapi.GetDefaultAddress()
	}
	if !set {
		return nil, errors.New("workload_api is required unless SPIFFE_ENDPOINT_SOCKET is set")
	}
	if err := workloadapi.ValidateAddress(address); err != nil {
		return nil, fmt.Errorf("workload_api: %w", err)
	}
	s.options = []workloadapi.ClientOption{workloadapi.WithAddr(address)}
	return s, nil
}

// watchIdentity updates svids until Close.
func (s *Server) watchIdentity(svids *svidSource, jwts bool) {
	ctx, stop := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		svids.run(ctx, "X.509-SVID", func(ctx context.Context, c *workloadapi.Client, w watcher) error {
			return c.WatchX509Context(ctx, w)
		})
	})
	if jwts {
		done.Go(func() {
			svids.run(ctx, "JWT bundles", func(ctx context.Context, c *workloadapi.Client, w watcher) error {
				return c.WatchJWTBundles(ctx, w)
			})
		})
	}
	s.onClose(func() { stop(); done.Wait() })
}

// The backoff between attempts. Each attempt has a new client, because gRPC's own backoff grows to two
// minutes.
const (
	firstRetry = 500 * time.Millisecond
	lastRetry  = 10 * time.Second
)

// watch delivers the updates of one stream of the Workload API to w.
type watch func(ctx context.Context, c *workloadapi.Client, w watcher) error

// run watches and retries after each error until ctx ends.
func (s *svidSource) run(ctx context.Context, what string, watch watch) {
	retry := backoff.Exponential{First: firstRetry, Most: lastRetry, Jitter: 0.5}
	for {
		begun := s.now()
		err := s.once(ctx, watch)
		if ctx.Err() != nil {
			return
		}
		if s.now().Sub(begun) > lastRetry {
			retry.Reset() // the stream was healthy for a while
		}
		wait := retry.Next()
		s.log.Error("the stream from the Workload API broke; its last update stays in use",
			"of", what, "error", err, "again_in", wait)
		if backoff.Sleep(ctx, wait) != nil {
			return
		}
	}
}

// once watches until the first error.
func (s *svidSource) once(ctx context.Context, watch watch) error {
	c, err := workloadapi.New(ctx, s.options...)
	if err != nil {
		s.fail(err)
		return err
	}
	defer c.Close() //nolint:errcheck // it only closes the connection
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	err = watch(ctx, c, watcher{s, stop})
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// watcher stores the updates of the Workload API and stops the watch at the first error.
type watcher struct {
	s    *svidSource
	stop context.CancelCauseFunc
}

// OnX509ContextUpdate implements [workloadapi.X509ContextWatcher].
func (w watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	s := w.s
	s.mu.Lock()
	had, old := s.own != nil, s.kept
	own, err := s.want.Choose(c.SVIDs, s.kept, chooseIdentity)
	s.x509, s.own, s.err = c, own, err
	if own != nil {
		s.kept = own.ID
	}
	s.attemptedLocked()
	ambiguous := s.ambiguousLocked()
	s.mu.Unlock()
	switch {
	case err != nil:
		s.log.Error("the broker has no identity", "error", err)
	case !old.IsZero() && own.ID != old:
		s.log.Error("the broker's identity changed", "from", old.String(), "to", own.ID.String())
	case !had:
		s.log.Info("the broker has an identity", "spiffe_id", own.ID.String(), "until", own.Certificates[0].NotAfter)
	}
	if ambiguous != "" {
		s.log.Warn(ambiguous)
	}
}

// chooseIdentity is how an operator chooses the broker's identity.
const chooseIdentity = "set spiffe_id in the configuration to the SPIFFE ID or the hint of the broker's own entry"

// ambiguousLocked says that a second identity came while the broker runs; empty if not. The broker keeps its own, and a
// restart would refuse to guess.
func (s *svidSource) ambiguousLocked() string {
	if s.own == nil || !s.want.IsZero() || len(s.x509.SVIDs) == 1 {
		return ""
	}
	_, err := s.want.Choose(s.x509.SVIDs, spiffeid.ID{}, chooseIdentity)
	return fmt.Sprintf("the broker stays %s until it stops, and would not start again: %v", s.own.ID, err)
}

// id returns the broker's identity; zero while there is none.
func (s *svidSource) id() spiffeid.ID {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.own == nil {
		return spiffeid.ID{}
	}
	return s.own.ID
}

// asWhom adds the broker's identity to a text about another system.
func (s *svidSource) asWhom(text string) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.own == nil {
		return text
	}
	return fmt.Sprintf("%s; the broker is %s", text, s.own.ID)
}

// OnX509ContextWatchError implements [workloadapi.X509ContextWatcher].
func (w watcher) OnX509ContextWatchError(err error) {
	w.s.fail(err)
	w.stop(err)
}

// OnJWTBundlesUpdate implements [workloadapi.JWTBundleWatcher].
func (w watcher) OnJWTBundlesUpdate(set *jwtbundle.Set) {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.jwts = set
}

// OnJWTBundlesWatchError implements [workloadapi.JWTBundleWatcher].
func (w watcher) OnJWTBundlesWatchError(err error) { w.stop(err) }

// fail records why there is no newer identity.
func (s *svidSource) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
	s.attemptedLocked()
}

func (s *svidSource) attemptedLocked() {
	select {
	case <-s.attempted:
	default:
		close(s.attempted)
	}
}

// await returns after the first attempt to get an identity, or when ctx ends.
func (s *svidSource) await(ctx context.Context) {
	select {
	case <-s.attempted:
	case <-ctx.Done():
	}
}

// conditions returns the present faults of the broker's identity.
func (s *svidSource) conditions() []broker.Condition {
	err := s.ready()
	s.mu.RLock()
	ambiguous := s.ambiguousLocked()
	s.mu.RUnlock()
	switch {
	case errors.Is(err, client.ErrIdentity):
		return []broker.Condition{{Part: "identity", Code: "identity_ambiguous", Text: err.Error(), Blocks: true}}
	case err != nil:
		return []broker.Condition{{Part: "identity", Code: "identity_missing", Text: err.Error(), Blocks: true}}
	case ambiguous != "":
		return []broker.Condition{{Part: "identity", Code: "identity_ambiguous", Text: ambiguous}}
	}
	return nil
}

// ready returns why the broker cannot prove its identity; nil when it can.
func (s *svidSource) ready() error {
	svid, err := s.GetX509SVID()
	if err != nil {
		return err
	}
	if end := svid.Certificates[0].NotAfter; !s.now().Before(end) {
		return fmt.Errorf("the broker's own SVID expired at %s", end.UTC().Format(time.RFC3339))
	}
	return nil
}

// GetX509SVID implements [x509svid.Source].
func (s *svidSource) GetX509SVID() (*x509svid.SVID, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.own == nil {
		return nil, s.missingLocked()
	}
	return s.own, nil
}

// GetX509BundleForTrustDomain implements [x509bundle.Source].
func (s *svidSource) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.x509 == nil {
		return nil, s.missingLocked()
	}
	return s.x509.Bundles.GetX509BundleForTrustDomain(td)
}

// GetJWTBundleForTrustDomain implements [jwtbundle.Source].
func (s *svidSource) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.jwts == nil {
		return nil, errNoIdentity
	}
	return s.jwts.GetJWTBundleForTrustDomain(td)
}

func (s *svidSource) missingLocked() error {
	if s.err != nil {
		return fmt.Errorf("%w: %w", errNoIdentity, s.err)
	}
	return errNoIdentity
}
