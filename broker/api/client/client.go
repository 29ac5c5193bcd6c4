// Package client is the HTTP layer that the agents' SDK and the operators' client share. It sends single requests, each
// with an answer or a problem, and reads streams of events.
package client

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/backoff"
)

// Source provides the caller's X.509-SVID and the trust bundles, both current, as *workloadapi.X509Source does.
type Source interface {
	x509svid.Source
	x509bundle.Source
}

// Config holds the broker's address and identity. Besides Address it has exactly one of Source, TLS and HTTP; a unix
// socket needs none.
type Config struct {
	Address  string        // "https://host:port", or "unix:/path" of a socket; required
	Source   Source        // the caller's identity; needs ServerID
	ServerID spiffeid.ID   // the broker's identity; required with Source, and only with it
	TLS      *tls.Config   // instead of Source
	HTTP     *http.Client  // used unchanged, http:// included, except that it follows no redirect
	Fresh    time.Duration // how long a connection takes new requests, because it keeps its first identity; zero: 10 s
	Silence  time.Duration // the longest silence on a stream before it counts as lost; zero: 45 s
	Patience time.Duration // operators: how long to retry a lost stream; zero: 1 min; negative: no retry
}

// Client sends requests. Create one with [New]; it is safe for concurrent use.
type Client struct {
	base    string
	fixed   *http.Client // from Config.HTTP
	dial    func() *http.Transport
	fresh   time.Duration
	silence time.Duration

	mu     sync.Mutex   // guards the fields below, and those of every pool
	pool   *pool        // takes new requests; nil until the first
	paused *api.Problem // the broker's last request for a pause; nil: none
	until  time.Time    // the end of that pause
}

// maxPause bounds the pause that the broker can ask for.
const maxPause = 5 * time.Second

// pauseAs starts the pause that a refusal asks for, and returns the refusal. The broker asks for a pause when the
// client sends requests too fast.
func (c *Client) pauseAs(p *api.Problem) *api.Problem {
	if p.Code == api.CodeTooManyRequests {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.paused, c.until = p, time.Now().Add(min(p.RetryAfter(), maxPause))
	}
	return p
}

// pause waits for the end of a pause. When ctx ends first, it returns the refusal that asked for the pause.
func (c *Client) pause(ctx context.Context) error {
	for {
		c.mu.Lock()
		asked, left := c.paused, time.Until(c.until)
		c.mu.Unlock()
		if left <= 0 {
			return nil
		}
		if backoff.Sleep(ctx, left) != nil {
			return asked
		}
	}
}

// pool holds the connections opened within one period of Config.Fresh.
type pool struct {
	transport *http.Transport
	made      time.Time
	users     int
	retired   bool
}

// New validates cfg and returns a client. It opens no connection.
func New(cfg Config) (*Client, error) {
	c := &Client{fresh: cmp.Or(cfg.Fresh, 10*time.Second), silence: cmp.Or(cfg.Silence, 45*time.Second)}
	socket, unix := strings.CutPrefix(cfg.Address, "unix:")
	if !unix {
		socket = ""
	}
	given := 0
	for _, have := range []bool{cfg.Source != nil, cfg.TLS != nil, cfg.HTTP != nil} {
		if have {
			given++
		}
	}
	switch {
	case given > 1 || given == 1 && unix || given == 0 && !unix:
		return nil, errors.New("exactly one of Source, TLS and HTTP is needed, and none for a unix socket")
	case (cfg.Source != nil) != !cfg.ServerID.IsZero():
		return nil, errors.New("Source and ServerID must be set together")
	case unix:
		c.base = "http://pawl"
	default:
		u, err := url.Parse(cfg.Address)
		if err != nil || u.Host == "" || u.Path != "" || u.RawQuery != "" || u.Scheme != "https" && cfg.HTTP == nil {
			return nil, fmt.Errorf("Address %q is not https://host:port or unix:/path", cfg.Address)
		}
		c.base = u.Scheme + "://" + u.Host
	}
	if cfg.HTTP != nil {
		fixed := *cfg.HTTP
		fixed.CheckRedirect = noRedirect
		c.fixed = &fixed
	}
	config := cfg.TLS
	if cfg.Source != nil {
		config = tlsconfig.MTLSClientConfig(cfg.Source, cfg.Source, tlsconfig.AuthorizeID(cfg.ServerID))
		config.MinVersion = tls.VersionTLS13
	}
	c.dial = func() *http.Transport { return transport(config, socket) }
	return c, nil
}

// transport uses no proxy from the environment and keeps idle connections only briefly.
func transport(config *tls.Config, socket string) *http.Transport {
	t := &http.Transport{
		TLSClientConfig: config.Clone(), ForceAttemptHTTP2: true, TLSHandshakeTimeout: 5 * time.Second,
		MaxIdleConnsPerHost: 64, IdleConnTimeout: 30 * time.Second, MaxResponseHeaderBytes: 64 << 10,
	}
	if socket != "" {
		var d net.Dialer
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) }
	}
	return t
}

// Close closes idle connections at once, and every other one when its request has ended.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.retireLocked()
}

func (c *Client) retireLocked() {
	if p := c.pool; p != nil {
		c.pool, p.retired = nil, true
		p.transport.CloseIdleConnections()
	}
}

// take returns the client for one request. Call release after reading the answer.
func (c *Client) take() (h *http.Client, release func()) {
	if c.fixed != nil {
		return c.fixed, func() {}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pool != nil && time.Since(c.pool.made) >= c.fresh {
		c.retireLocked()
	}
	if c.pool == nil {
		c.pool = &pool{transport: c.dial(), made: time.Now()}
	}
	p := c.pool
	p.users++
	return &http.Client{Transport: p.transport, CheckRedirect: noRedirect}, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if p.users--; p.retired {
			p.transport.CloseIdleConnections()
		}
	}
}

// noRedirect follows no redirect: a request is for the broker alone.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// maxAnswer is the largest answer that is read, in bytes.
const maxAnswer = 16 << 20

// Call sends one request once and decodes its answer into out, unless out is nil. A nil in is a request without a
// body. Every error is an *[api.Problem].
//
// A request with a body is not sent again once a byte has been written. net/http would resend one with the header
// Idempotency-Key in exactly this spelling. A caller must spell this header in lower case. The broker treats both the
// same.
func (c *Client) Call(ctx context.Context, method, path string, header http.Header, in, out any) error {
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return api.NewProblem(api.KindMalformed, "", "the request does not encode as JSON").Because(err)
		}
		body = bytes.NewReader(raw)
	}
	raw, err := c.ask(ctx, method, path, header, body)
	defer clear(raw) // it may hold a secret
	if err != nil {
		return err
	}
	if out != nil && json.Unmarshal(raw, out) != nil { // its error may quote a secret
		return noAnswer(errors.New("the answer is not a valid answer of the broker"))
	}
	return nil
}

// Fetch sends one GET once and returns the body of its answer, at most 16 MiB. Every error is an *[api.Problem].
func (c *Client) Fetch(ctx context.Context, path string) ([]byte, error) {
	return c.ask(ctx, http.MethodGet, path, nil, nil)
}

// ask returns the body of an answer that is not a refusal.
func (c *Client) ask(ctx context.Context, method, path string, header http.Header, body io.Reader) ([]byte, error) {
	h, release := c.take()
	defer release()
	resp, err := c.send(ctx, h, method, path, header, body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil || len(raw) > maxAnswer {
		clear(raw)
		return nil, noAnswer(cmp.Or(err, errors.New("the answer is too large")))
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return nil, c.pauseAs(refusal(resp.StatusCode, raw))
	}
	return raw, nil
}

func (c *Client) send(ctx context.Context, h *http.Client, method, path string, header http.Header, body io.Reader) (*http.Response, error) {
	if err := c.pause(ctx); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return nil, api.NewProblem(api.KindMalformed, "", err.Error())
	}
	for name, values := range header {
		req.Header[name] = values
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := h.Do(req)
	if err != nil {
		return nil, noAnswer(err)
	}
	return resp, nil
}

func noAnswer(err error) *api.Problem {
	return api.NewProblem(api.KindUnavailable, api.CodeNoAnswer, err.Error()).Because(err)
}

// refusal decodes the problem of an answer. An answer without a problem is not the broker's.
func refusal(status int, raw []byte) *api.Problem {
	var p api.Problem
	if err := json.Unmarshal(raw, &p); err != nil || p.Code == "" || p.Kind == "" {
		return noAnswer(fmt.Errorf("status %d without a problem: the answer is not the broker's", status))
	}
	return &p
}
