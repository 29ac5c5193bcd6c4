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

// wire sends requests to one Vault server, HTTP/1.1 over kept connections. It goes to the
// address of the configuration and nowhere else: no proxy from the environment, no redirect.
type wire struct {
	base      url.URL
	namespace string
	kept      *http.Transport
	fresh     *http.Transport // a new connection each time, which shows the SVID of the moment
	buffers   sync.Pool
}

func newWire(base *url.URL, namespace string, conf *tls.Config) *wire {
	dial := net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}
	kept := &http.Transport{
		DialContext:            dial.DialContext,
		TLSClientConfig:        conf,
		TLSHandshakeTimeout:    5 * time.Second,
		DisableCompression:     true,
		MaxIdleConns:           128,
		MaxIdleConnsPerHost:    128,
		MaxConnsPerHost:        256,
		IdleConnTimeout:        30 * time.Second, // well under Vault's 5 min: a reused connection is then rarely a dead one
		MaxResponseHeaderBytes: 64 << 10,
		TLSNextProto:           map[string]func(string, *tls.Conn) http.RoundTripper{}, // HTTP/1.1 takes less CPU here
	}
	fresh := kept.Clone()
	fresh.DisableKeepAlives = true
	return &wire{base: *base, namespace: namespace, kept: kept, fresh: fresh,
		buffers: sync.Pool{New: func() any { return new(bytes.Buffer) }}}
}

func (w *wire) close() { w.kept.CloseIdleConnections() }

// call is one request.
type call struct {
	method string
	path   string // below /v1/; a constant or the result of join
	query  string // a constant
	token  string
	body   any    // nil: none
	wrap   string // how long a wrapping token for the answer lives; empty: the answer comes as it is
	once   bool   // no layer may send it twice
	fresh  bool   // on a new connection
	most   int64  // bytes of the answer; zero: maxAnswer
	raw    bool   // the answer is not JSON, and is given as it is
}

// errUnsent says that a request certainly never left.
var errUnsent = errors.New("the request was not sent")

// errTooLarge says that an answer was longer than the limit.
var errTooLarge = errors.New("vault's answer is longer than the limit")

// send makes one request and reads the whole answer. The status is 200 or 204 when the error
// is nil; another status is a *failure, an unsent request wraps errUnsent. It waits as long as
// ctx allows, the last byte included.
func (w *wire) send(ctx context.Context, c call) (answer, error) {
	connected := false
	if c.once {
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connected = true }})
	}
	req, err := w.request(ctx, c)
	if err != nil {
		return answer{}, fmt.Errorf("%w: %w", errUnsent, err)
	}
	transport := w.kept
	if c.fresh {
		transport = w.fresh
	}
	resp, err := transport.RoundTrip(req)
	if err != nil && c.once && !connected {
		return answer{}, fmt.Errorf("asking vault: %w: %w", errUnsent, err)
	}
	if err != nil {
		return answer{}, fmt.Errorf("asking vault: %w", err)
	}
	defer resp.Body.Close()
	limit := int64(maxAnswer)
	if resp.StatusCode == http.StatusOK { // a refusal is short
		limit = cmp.Or(c.most, maxAnswer)
	}
	if c.raw && resp.StatusCode == http.StatusOK {
		return readRaw(resp, limit)
	}
	return w.read(resp, limit)
}

// readRaw takes in an answer that holds no secret.
func readRaw(resp *http.Response, most int64) (answer, error) {
	var buf bytes.Buffer
	if resp.ContentLength > most {
		return answer{}, errTooLarge
	}
	buf.Grow(int(max(resp.ContentLength, 0)) + bytes.MinRead)
	n, err := buf.ReadFrom(io.LimitReader(resp.Body, most+1))
	switch {
	case err != nil:
		return answer{}, fmt.Errorf("reading vault's answer: %w", err)
	case n > most:
		return answer{}, errTooLarge
	}
	return answer{Raw: buf.Bytes()}, nil
}

// read takes the answer in; its bytes are overwritten before they are let go.
func (w *wire) read(resp *http.Response, limit int64) (answer, error) {
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
		return answer{}, fmt.Errorf("reading vault's answer: %w", err)
	case n > limit:
		return answer{}, errTooLarge
	case resp.StatusCode == http.StatusNoContent:
		return answer{}, nil
	case resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusAccepted:
		return answer{}, newFailure(resp.StatusCode, buf.Bytes())
	}
	return decodeAnswer(buf.Bytes())
}

// request builds the request. One that must go once has a body without GetBody: net/http sends
// a request again after a reused connection died only when it can rewind the body, or when
// there is none and the method is GET; an empty body that it cannot rewind is not none.
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
	if w.namespace != "" {
		req.Header["X-Vault-Namespace"] = []string{w.namespace}
	}
	if c.wrap != "" {
		req.Header["X-Vault-Wrap-Ttl"] = []string{c.wrap}
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
