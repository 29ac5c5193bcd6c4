package vault

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Config names the Vault and how the broker logs in to it.
type Config struct {
	Address   string         // required: https://host:port and nothing else
	Roots     *x509.CertPool // required: the authorities of Vault's own certificate
	Namespace string         // segments joined by slashes; empty: the root namespace
	Login     Login          // required

	TokenRole  string // Vault's token role for root delegations; empty: "pawl-chain"
	Delegation string // the policy that lets a delegation's token create children; empty: "pawl-delegation"

	// DeadMan is how long a delegation's token lives after its last renewal. Zero is 2 minutes.
	DeadMan time.Duration
	// Idle is how long after a delegation's last use the client still renews its token. Zero is broker.MaxTTL. A
	// shorter time would end live secrets early.
	Idle time.Duration
	// MintTimeout bounds a mint, up to the last byte of its response. Zero is 30 seconds.
	MintTimeout time.Duration

	// BehindProxy says that a proxy between the broker and Vault may answer in Vault's place, or send a request twice.
	// An answer then never shows that a mint made nothing.
	BehindProxy bool
	// IdentityPolicies are the policies that Vault's identity (an entity or a group) may give the broker's tokens beside
	// their own. Nil allows none: a step's token would have a right that its tool does not name.
	IdentityPolicies []string
	// Tools returns the tools whose policies are checked. Nil checks none.
	Tools func() []Access
	// CheckEvery is the time between two checks of Vault ([Client.Check]). Zero: none by itself.
	CheckEvery time.Duration

	Now func() time.Time // nil: time.Now
	Log *slog.Logger     // nil: logs nothing
}

// Limits of the client.
const (
	requestTimeout = 10 * time.Second // of a request other than a mint
	maxSteps       = 1 << 16          // step tokens in memory at once
)

// Client implements [broker.Vault]. From New to Close it stays logged in and renews its delegation tokens. Safe for
// concurrent use.
type Client struct {
	cfg            Config
	wire           *wire
	stop           context.CancelFunc
	done           sync.WaitGroup
	recheck        chan struct{} // makes the login loop check the login token now
	firstLoginOnce sync.Once
	firstLogin     chan struct{} // closed after the first login attempt, successful or not
	probes         probes        // for checks of the tools' policies; mu guards its map

	// mu guards the fields below. It is never held during a request.
	mu       sync.Mutex
	session  *node                         // the login token; nil before the first login
	loginErr error                         // of the last login or renewal; nil after a success
	nodes    map[string]*node              // every token that may have children, by accessor
	current  map[broker.DelegationID]*node // the token in use for a delegation
	steps    map[string]step               // step tokens before their mint, by accessor

	conditions []Condition // of the last check
	silent     int         // the last checks in a row without an answer
}

// New checks the configuration and starts to log in. It does not wait for the login, so a broker starts and fences
// while Vault is down. [Client.Ready] reports whether the login succeeded.
func New(cfg Config) (*Client, error) {
	base, err := cfg.complete()
	if err != nil {
		return nil, fmt.Errorf("vault: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	c := &Client{
		cfg: cfg, stop: stop,
		recheck: make(chan struct{}, 1), firstLogin: make(chan struct{}),
		nodes: map[string]*node{}, current: map[broker.DelegationID]*node{}, steps: map[string]step{},
		probes: probes{of: map[string]probe{}},
	}
	c.wire = newWire(base, cfg, &tls.Config{
		RootCAs:              cfg.Roots,
		MinVersion:           tls.VersionTLS12,
		GetClientCertificate: cfg.Login.certificate(),
	})
	c.done.Go(func() { c.loginLoop(ctx) })
	c.done.Go(func() { c.renewLoop(ctx) })
	c.done.Go(func() { c.clockLoop(ctx) })
	c.done.Go(func() { c.checkLoop(ctx) })
	return c, nil
}

// Close stops the renewals and waits for them to end. It revokes nothing: secrets of running steps outlive a restart
// of the broker, and tokens that are no longer renewed expire.
func (c *Client) Close() {
	c.stop()
	c.done.Wait()
	c.wire.close()
}

// loggedIn returns nil while the broker is logged in, and otherwise the reason why not.
func (c *Client) loggedIn() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != nil && c.aliveLocked(c.session) {
		return nil
	}
	if c.loginErr != nil {
		return fmt.Errorf("%w: %w", errNoSession, c.loginErr)
	}
	return errNoSession
}

func (cfg *Config) complete() (*url.URL, error) {
	base, err := url.Parse(cfg.Address)
	if err != nil || base.Scheme != "https" || base.Host == "" || base.User != nil ||
		base.Path != "" && base.Path != "/" || base.RawQuery != "" || base.Fragment != "" {
		return nil, errors.New("Address must be https://host:port and nothing else")
	}
	if cfg.Roots == nil {
		return nil, errors.New("Roots is required: the authorities of Vault's certificate")
	}
	if err := cfg.Login.check(); err != nil {
		return nil, err
	}
	if cfg.Namespace != "" {
		if _, err := broker.ParseVaultPath(cfg.Namespace); err != nil {
			return nil, fmt.Errorf("Namespace: %w", err)
		}
	}
	setDefault(&cfg.TokenRole, "pawl-chain")
	setDefault(&cfg.Delegation, "pawl-delegation")
	if err := errors.Join(broker.CheckVaultName(cfg.TokenRole), checkPolicy(cfg.Delegation)); err != nil {
		return nil, fmt.Errorf("TokenRole, Delegation: %w", err)
	}
	for _, d := range []struct {
		name string
		v    *time.Duration
		zero time.Duration
	}{
		{"DeadMan", &cfg.DeadMan, 2 * time.Minute}, {"Idle", &cfg.Idle, broker.MaxTTL},
		{"MintTimeout", &cfg.MintTimeout, 30 * time.Second},
	} {
		if *d.v == 0 {
			*d.v = d.zero
		}
		if *d.v < 0 {
			return nil, fmt.Errorf("%s must not be negative", d.name)
		}
	}
	if cfg.DeadMan < time.Second {
		return nil, errors.New("DeadMan must be at least one second")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return base, nil
}

func setDefault(s *string, zero string) {
	if *s == "" {
		*s = zero
	}
}

// do sends a request other than a mint, bounded by requestTimeout. Its errors have a kind and a code, see answers.
func (c *Client) do(ctx context.Context, r call) (response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := c.wire.send(ctx, r)
	return resp, explain(err)
}

// doWithLogin sends a request with the broker's own token. After a 403 the login loop checks that token at once: it may
// have been revoked, or Vault may have lost its storage.
func (c *Client) doWithLogin(ctx context.Context, r call) (response, error) {
	s, err := c.loginToken(ctx)
	if err != nil {
		return response{}, err
	}
	r.token = s.token
	resp, err := c.do(ctx, r)
	if errors.Is(err, errForbidden) {
		c.recheckLogin()
	}
	return resp, err
}

// loginToken returns the login token. It waits for the first login attempt.
func (c *Client) loginToken(ctx context.Context) (*node, error) {
	select {
	case <-c.firstLogin:
	case <-ctx.Done():
		return nil, explain(fmt.Errorf("%w: %w", errNoSession, ctx.Err()))
	}
	if err := c.loggedIn(); err != nil {
		return nil, explain(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.session, nil
}

// recheckLogin makes the login loop check the token now. It never blocks.
func (c *Client) recheckLogin() {
	select {
	case c.recheck <- struct{}{}:
	default:
	}
}

// Skew returns how far Vault's clock is ahead of the broker's, and by how much that can be wrong. ok is false before
// the first answer of Vault.
func (c *Client) Skew() (ahead, uncertain time.Duration, ok bool) {
	b, ok := c.wire.clock.read()
	return (b.low + b.high) / 2, (b.high - b.low) / 2, ok
}

// CheckClock returns an error while Vault's clock certainly differs from the broker's by more than [broker.MaxSkew].
// Certificates, which end by Vault's clock, are not issued then.
func (c *Client) CheckClock() error { return c.wire.clock.check() }

// clockLoop asks for Vault's time while no other request does. Vault answers sys/health in each of its states, and
// without a token.
func (c *Client) clockLoop(ctx context.Context) {
	tick := time.NewTicker(clockPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if c.cfg.BehindProxy || c.wire.clock.quiet() {
			_ = c.MeasureClock(ctx) // without an answer nothing is measured
		}
	}
}

// MeasureClock asks Vault for its time, for [Client.Skew] and [Client.CheckClock].
func (c *Client) MeasureClock(ctx context.Context) error {
	_, err := c.do(ctx, call{method: "GET", path: "sys/health", query: anyHealth})
	return err
}

// anyHealth makes Vault answer 200 in each of its states.
const anyHealth = "standbyok=true&perfstandbyok=true&activecode=200&standbycode=200&drsecondarycode=200&" +
	"performancestandbycode=200&sealedcode=200&uninitcode=200&haunhealthycode=200&removedcode=200"
