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

// Config says which Vault, and how to be known there.
type Config struct {
	Address   string         // required: https://host:port, nothing after it
	Roots     *x509.CertPool // required: the authorities of Vault's own certificate
	Namespace string         // empty: the root namespace; otherwise segments joined by slashes
	Login     Login          // required

	TokenRole  string // Vault's token role for root delegations; empty: "pawl-chain"
	Delegation string // the policy that lets a delegation's token create children; empty: "pawl-delegation"

	DeadMan     time.Duration // a delegation's token ends so long after its last renewal; zero: 2 minutes
	Idle        time.Duration // renewal stops so long after a delegation's last use; zero: broker.MaxTTL, less would end live secrets early
	MintTimeout time.Duration // of a mint, the last byte of its answer included; zero: 30 seconds

	Now func() time.Time // zero: time.Now
	Log *slog.Logger     // zero: nothing is logged
}

// Limits of the client.
const (
	requestTimeout = 10 * time.Second // of a request other than a mint
	maxAnswer      = 1 << 20          // bytes of an answer, unless a request names another limit
	maxSteps       = 1 << 16          // step tokens held in memory at once
)

// Client implements [broker.Vault]. It keeps itself logged in and its delegation tokens renewed
// from New to Close. Safe for concurrent use.
type Client struct {
	cfg  Config
	wire *wire
	stop context.CancelFunc
	done sync.WaitGroup
	kick chan struct{} // asks the session's loop to look at the login token now
	once sync.Once
	met  chan struct{} // closed after the first login, whether or not it succeeded

	// mu guards what follows. It is never held over the network.
	mu      sync.Mutex
	session *node                         // the login token; nil before the first
	down    error                         // why the last login or its renewal failed; nil when it did not
	nodes   map[string]*node              // every token with children, by accessor
	kept    map[broker.DelegationID]*node // the one in use for a delegation
	steps   map[string]step               // step tokens not yet minted with, by accessor
}

// New checks the configuration and begins to log in; it does not wait for that, so that a
// broker starts, and fences, while Vault is down. [Client.Ready] tells when it has.
func New(cfg Config) (*Client, error) {
	base, err := cfg.complete()
	if err != nil {
		return nil, fmt.Errorf("vault: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	c := &Client{
		cfg: cfg, stop: stop,
		kick: make(chan struct{}, 1), met: make(chan struct{}),
		nodes: map[string]*node{}, kept: map[broker.DelegationID]*node{}, steps: map[string]step{},
	}
	c.wire = newWire(base, cfg.Namespace, &tls.Config{
		RootCAs:              cfg.Roots,
		MinVersion:           tls.VersionTLS12,
		GetClientCertificate: cfg.Login.certificate(),
	})
	c.done.Go(func() { c.keepLoggedIn(ctx) })
	c.done.Go(func() { c.keepRenewed(ctx) })
	return c, nil
}

// Close stops the renewals and returns when they have ended. It revokes nothing: the secrets of
// running steps outlive a restart of the broker, and what is not renewed ends by itself.
func (c *Client) Close() {
	c.stop()
	c.done.Wait()
	c.wire.close()
}

// Ready is nil while the broker is logged in, and otherwise says why it is not.
func (c *Client) Ready() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != nil && c.aliveLocked(c.session) {
		return nil
	}
	if c.down != nil {
		return fmt.Errorf("%w: %w", errNoSession, c.down)
	}
	return errNoSession
}

func (cfg *Config) complete() (*url.URL, error) {
	base, err := url.Parse(cfg.Address)
	if err != nil || base.Scheme != "https" || base.Host == "" || base.User != nil ||
		base.Path != "" && base.Path != "/" || base.RawQuery != "" || base.Fragment != "" {
		return nil, errors.New("Address must be https://host:port and no more")
	}
	if cfg.Roots == nil {
		return nil, errors.New("Roots is required: the authorities of Vault's certificate")
	}
	if err := cfg.Login.check(); err != nil {
		return nil, err
	}
	if cfg.Namespace != "" && checkLease(cfg.Namespace) != nil {
		return nil, errors.New("Namespace must be segments joined by slashes")
	}
	orText(&cfg.TokenRole, "pawl-chain")
	orText(&cfg.Delegation, "pawl-delegation")
	if err := errors.Join(checkSegment(cfg.TokenRole), checkPolicy(cfg.Delegation)); err != nil {
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

func orText(s *string, zero string) {
	if *s == "" {
		*s = zero
	}
}

// ask sends an ordinary request, bounded by requestTimeout.
func (c *Client) ask(ctx context.Context, r call) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return c.wire.send(ctx, r)
}

// command sends a request with the broker's own token. When Vault refuses it, the token is
// looked at at once: it may have been revoked, or Vault may have lost its memory.
func (c *Client) command(ctx context.Context, r call) (answer, error) {
	s, err := c.root(ctx)
	if err != nil {
		return answer{}, err
	}
	r.token = s.token
	a, err := c.ask(ctx, r)
	if errors.Is(err, errForbidden) {
		c.look()
	}
	return a, err
}

// root gives the login token, waiting for the first login if that is under way.
func (c *Client) root(ctx context.Context) (*node, error) {
	select {
	case <-c.met:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", errNoSession, ctx.Err())
	}
	if err := c.Ready(); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.session, nil
}

// look makes the session's loop look now; it never blocks.
func (c *Client) look() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}
