package wire

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// own is the broker's own identity and the bundles of others, as the Workload API gave them last.
// It is empty until they come, and whoever asks it before that is refused: a broker without an
// identity fences over its local socket and does nothing else (hardening.md, "SVID rotation").
// Safe for concurrent use.
type own struct {
	options []workloadapi.ClientOption
	log     *slog.Logger
	now     func() time.Time
	tried   chan struct{} // closed once the X.509 identity came, or did not

	mu   sync.RWMutex // guards what follows
	x509 *workloadapi.X509Context
	jwts *jwtbundle.Set
	err  error // of the last attempt to get the X.509 identity; nil once it came
}

var errNoIdentity = errors.New("the Workload API has not given the broker an identity yet")

// newOwn checks where the Workload API is. Nothing is fetched before [Server.identify].
func newOwn(c Config, log *slog.Logger) (*own, error) {
	o := &own{log: log, now: time.Now, tried: make(chan struct{})}
	address, set := c.WorkloadAPI, true
	if address == "" {
		address, set = workloadapi.GetDefaultAddress()
	}
	if !set {
		return nil, errors.New("workload_api is required where SPIFFE_ENDPOINT_SOCKET is not set")
	}
	if err := workloadapi.ValidateAddress(address); err != nil {
		return nil, fmt.Errorf("workload_api: %w", err)
	}
	o.options = []workloadapi.ClientOption{workloadapi.WithAddr(address)}
	return o, nil
}

// identify keeps o filled until Close.
func (s *Server) identify(o *own, jwts bool) {
	ctx, stop := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		o.keep(ctx, "X.509-SVID", func(ctx context.Context, c *workloadapi.Client, w watcher) error { return c.WatchX509Context(ctx, w) })
	})
	if jwts {
		done.Go(func() {
			o.keep(ctx, "JWT bundles", func(ctx context.Context, c *workloadapi.Client, w watcher) error { return c.WatchJWTBundles(ctx, w) })
		})
	}
	s.later(func() { stop(); done.Wait() })
}

// The waits between attempts. A new client each time, since gRPC's own waits grow to two minutes.
const (
	firstRetry = 500 * time.Millisecond
	lastRetry  = 10 * time.Second
)

// watch has one of the Workload API's streams tell w.
type watch func(ctx context.Context, c *workloadapi.Client, w watcher) error

// keep watches until ctx ends, over whatever befalls the Workload API.
func (o *own) keep(ctx context.Context, what string, watch watch) {
	for pause := firstRetry; ; pause = min(2*pause, lastRetry) {
		begun := o.now()
		err := o.once(ctx, watch)
		if ctx.Err() != nil {
			return
		}
		if o.now().Sub(begun) > lastRetry {
			pause = firstRetry // it stood for a while
		}
		wait := pause/2 + rand.N(pause)
		o.log.Error("no word from the Workload API; what it gave last stays", "of", what, "error", err, "again_in", wait)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
	}
}

// once watches until the first error.
func (o *own) once(ctx context.Context, watch watch) error {
	c, err := workloadapi.New(ctx, o.options...)
	if err != nil {
		o.failed(err)
		return err
	}
	defer c.Close() //nolint:errcheck // it only stops asking
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	err = watch(ctx, c, watcher{o, stop})
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// watcher takes what the Workload API says, and ends the watch at the first error.
type watcher struct {
	o    *own
	stop context.CancelCauseFunc
}

// OnX509ContextUpdate implements [workloadapi.X509ContextWatcher].
func (w watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	w.o.mu.Lock()
	had := w.o.x509 != nil
	w.o.x509, w.o.err = c, nil
	w.o.triedLocked()
	w.o.mu.Unlock()
	if !had {
		w.o.log.Info("the broker has an identity", "spiffe_id", c.DefaultSVID().ID.String(), "until", c.DefaultSVID().Certificates[0].NotAfter)
	}
}

// OnX509ContextWatchError implements [workloadapi.X509ContextWatcher].
func (w watcher) OnX509ContextWatchError(err error) {
	w.o.failed(err)
	w.stop(err)
}

// OnJWTBundlesUpdate implements [workloadapi.JWTBundleWatcher].
func (w watcher) OnJWTBundlesUpdate(set *jwtbundle.Set) {
	w.o.mu.Lock()
	defer w.o.mu.Unlock()
	w.o.jwts = set
}

// OnJWTBundlesWatchError implements [workloadapi.JWTBundleWatcher].
func (w watcher) OnJWTBundlesWatchError(err error) { w.stop(err) }

// failed notes why there is no newer identity.
func (o *own) failed(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.err = err
	o.triedLocked()
}

func (o *own) triedLocked() {
	select {
	case <-o.tried:
	default:
		close(o.tried)
	}
}

// await returns once the first attempt is over.
func (o *own) await(ctx context.Context) {
	select {
	case <-o.tried:
	case <-ctx.Done():
	}
}

// ready says why the broker cannot show who it is; nil when it can.
func (o *own) ready() error {
	svid, err := o.GetX509SVID()
	if err != nil {
		return err
	}
	if end := svid.Certificates[0].NotAfter; !o.now().Before(end) {
		return fmt.Errorf("the broker's own SVID ended at %s", end.UTC().Format(time.RFC3339))
	}
	return nil
}

// GetX509SVID implements [x509svid.Source].
func (o *own) GetX509SVID() (*x509svid.SVID, error) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	if o.x509 == nil {
		return nil, o.missingLocked()
	}
	return o.x509.DefaultSVID(), nil
}

// GetX509BundleForTrustDomain implements [x509bundle.Source].
func (o *own) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	if o.x509 == nil {
		return nil, o.missingLocked()
	}
	return o.x509.Bundles.GetX509BundleForTrustDomain(td)
}

// GetJWTBundleForTrustDomain implements [jwtbundle.Source].
func (o *own) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	if o.jwts == nil {
		return nil, errNoIdentity
	}
	return o.jwts.GetJWTBundleForTrustDomain(td)
}

func (o *own) missingLocked() error {
	if o.err != nil {
		return fmt.Errorf("%w: %w", errNoIdentity, o.err)
	}
	return errNoIdentity
}
