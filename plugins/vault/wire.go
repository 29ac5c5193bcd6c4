package vault

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync"
	"time"
)

// wire sends requests to one Vault server over HTTP/1.1 and keep-alive connections. It connects to the configured
// address only: it uses no proxy from the environment and follows no redirect.
type wire struct {
	base      url.URL
	namespace string
	proxied   bool // a proxy may answer in Vault's place
	clock     *clock
	keepAlive *http.Transport
	singleUse *http.Transport // a new connection for each request, which presents the current SVID
	buffers   sync.Pool
}

func newWire(base *url.URL, cfg Config, conf *tls.Config) *wire {
	dialer := tls.Dialer{Config: conf, NetDialer: &net.Dialer{
		Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}} // the timeout includes the handshake
	keepAlive := &http.Transport{
		DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			inner, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &conn{Conn: inner}, nil
		},
		DisableCompression:     true,
		MaxIdleConns:           128,
		MaxIdleConnsPerHost:    128,
		MaxConnsPerHost:        256,
		IdleConnTimeout:        30 * time.Second, // well under Vault's 5 min, so that few reused connections are dead
		MaxResponseHeaderBytes: 64 << 10,
		TLSNextProto:           map[string]func(string, *tls.Conn) http.RoundTripper{}, // HTTP/1.1 takes less CPU here
	}
	singleUse := keepAlive.Clone()
	singleUse.DisableKeepAlives = true
	return &wire{base: *base, namespace: cfg.Namespace, proxied: cfg.BehindProxy, clock: &clock{now: cfg.Now},
		keepAlive: keepAlive, singleUse: singleUse,
		buffers: sync.Pool{New: func() any { return new(bytes.Buffer) }}}
}

func (w *wire) close() { w.keepAlive.CloseIdleConnections() }

// call is one request.
type call struct {
	method string
	path   string // below /v1/; constants and valid names
	query  string // a constant
	token  string
	body   any    // nil: none
	wrap   string // lifetime of a wrapping token for the response; empty: not wrapped

	correlation string // for Vault's audit log, which has it by default; empty: none
	once        bool   // no layer may send it twice
	newConn     bool   // use a new connection
	maxBytes    int64  // limit of the response; zero: maxResponse
	raw         bool   // return the body undecoded
	root        bool   // in the root namespace, whatever the configuration says

	rawBody     []byte // instead of body: bytes that are not JSON, of contentType
	contentType string
}

// maxResponse is the limit in bytes of a response, unless a request sets another one.
const maxResponse = 1 << 20

// send sends one request and reads the whole response, for as long as ctx allows. If the error is nil, the status is
// 200, 202 or 204. Any other status is a *failure. The error for a request that certainly was not sent, if it is to be
// sent once, wraps errNotSent or errNotWritten.
func (w *wire) send(ctx context.Context, c call) (response, error) {
	var s sending
	if c.once {
		ctx = httptrace.WithClientTrace(ctx, s.trace())
	}
	req, err := w.request(ctx, c)
	if err != nil {
		return response{}, fmt.Errorf("%w: %w", errNotSent, err)
	}
	transport := w.keepAlive
	if c.newConn {
		transport = w.singleUse
	}
	sent := w.clock.now()
	resp, err := transport.RoundTrip(req)
	if err != nil && c.once {
		if cause := s.cause(); cause != nil {
			err = fmt.Errorf("%w: %w", cause, err)
		}
	}
	if err != nil {
		return response{}, fmt.Errorf("sending a request to vault: %w", err)
	}
	defer resp.Body.Close()
	w.date(resp.Header, sent)
	limit := int64(maxResponse)
	if resp.StatusCode == http.StatusOK { // an error response is short
		limit = cmp.Or(c.maxBytes, maxResponse)
	}
	if c.raw && resp.StatusCode == http.StatusOK {
		return readRaw(resp, limit)
	}
	out, err := w.read(resp, limit)
	w.serverTime(out.ServerTime, sent)
	return out, err
}

// readRaw reads a response that holds no secret.
func readRaw(resp *http.Response, limit int64) (response, error) {
	var buf bytes.Buffer
	if resp.ContentLength > limit {
		return response{}, errTooLarge
	}
	buf.Grow(int(max(resp.ContentLength, 0)) + bytes.MinRead)
	n, err := buf.ReadFrom(io.LimitReader(resp.Body, limit+1))
	switch {
	case err != nil:
		return response{}, fmt.Errorf("reading vault's response: %w", err)
	case n > limit:
		return response{}, errTooLarge
	}
	return response{Raw: buf.Bytes()}, nil
}

// read reads and decodes the response. It overwrites the buffer before it releases it.
func (w *wire) read(resp *http.Response, limit int64) (response, error) {
	buf := w.buffers.Get().(*bytes.Buffer)
	defer func() {
		clear(buf.Bytes())
		if buf.Reset(); buf.Cap() <= 64<<10 {
			w.buffers.Put(buf)
		}
	}()
	n, err := buf.ReadFrom(io.LimitReader(resp.Body, limit+1))
	switch {
	case err != nil:
		return response{}, fmt.Errorf("reading vault's response: %w", err)
	case n > limit:
		return response{}, errTooLarge
	case resp.StatusCode == http.StatusNoContent:
		return response{}, nil
	case resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusAccepted:
		return response{}, newFailure(resp.StatusCode, resp.Header, buf.Bytes())
	}
	return decodeResponse(buf.Bytes())
}

// request builds the HTTP request. If once is set, the body has no GetBody. After a reused connection died, net/http
// resends a request only if it can rewind the body, or if it is a GET without a body. An empty body that it cannot
// rewind counts as a body.
func (w *wire) request(ctx context.Context, c call) (*http.Request, error) {
	var body io.Reader
	length := 0
	if c.body != nil {
		raw, err := json.Marshal(c.body)
		if err != nil {
			return nil, errors.New("encoding a request to vault")
		}
		body, length = bytes.NewReader(raw), len(raw)
	}
	if c.rawBody != nil {
		body, length = bytes.NewReader(c.rawBody), len(c.rawBody)
	}
	if c.once {
		body = io.NopCloser(io.MultiReader(orEmpty(body)))
	}
	u := w.base
	u.Path, u.RawQuery = "/v1/"+c.path, c.query
	req, err := http.NewRequestWithContext(ctx, c.method, "", body)
	if err != nil {
		return nil, errors.New("building a request to vault")
	}
	req.URL, req.Host, req.ContentLength = &u, u.Host, int64(length)
	if c.token != "" {
		req.Header["X-Vault-Token"] = []string{c.token}
	}
	if w.namespace != "" && !c.root {
		req.Header["X-Vault-Namespace"] = []string{w.namespace}
	}
	if c.contentType != "" {
		req.Header["Content-Type"] = []string{c.contentType}
	}
	if c.wrap != "" {
		req.Header["X-Vault-Wrap-Ttl"] = []string{c.wrap}
	}
	if c.correlation != "" {
		req.Header["X-Correlation-Id"] = []string{c.correlation}
	}
	req.Header["X-Vault-Request"] = []string{"true"}
	return req, nil
}

func orEmpty(r io.Reader) io.Reader {
	if r == nil {
		return strings.NewReader("")
	}
	return r
}

// date observes the date of an answer. The date is a proxy's where one may answer in Vault's place.
func (w *wire) date(h http.Header, sent time.Time) {
	if dated, err := http.ParseTime(h.Get("Date")); err == nil && !w.proxied {
		w.clock.observe(dated, sent, w.clock.now())
	}
}

// serverTime observes the time in an answer of sys/health.
func (w *wire) serverTime(unix int64, sent time.Time) {
	if unix > 0 {
		w.clock.observe(time.Unix(unix, 0), sent, w.clock.now())
	}
}
