package client_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority issues SVIDs, and is the source of one.
type authority struct {
	t      *testing.T
	root   *x509.Certificate
	key    *ecdsa.PrivateKey
	serial atomic.Int64
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t}
	a.key, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader) // fails only without randomness
	a.root = a.make(&x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}}}, a.key)
	return a
}

func (a *authority) make(template *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	template.SerialNumber = big.NewInt(a.serial.Add(1))
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	parent := a.root
	if parent == nil {
		parent = template
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, a.key)
	if err != nil {
		a.t.Error(err)
	}
	cert, err := x509.ParseCertificate(raw)
	if err != nil {
		a.t.Error(err)
	}
	return cert
}

// as returns a source of an identity. Each call of GetX509SVID issues a new certificate, as after a rotation.
func (a *authority) as(name string) source {
	return source{a, spiffeid.RequireFromString("spiffe://example.org/" + name)}
}

type source struct {
	*authority
	id spiffeid.ID
}

func (s source) GetX509SVID() (*x509svid.SVID, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	cert := s.make(&x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{s.id.URL()},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}, key)
	return &x509svid.SVID{ID: s.id, Certificates: []*x509.Certificate{cert}, PrivateKey: key}, nil
}

func (s source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return x509bundle.FromX509Authorities(td, []*x509.Certificate{s.root}), nil
}

func newClient(t *testing.T, cfg client.Config) *client.Client {
	t.Helper()
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// plain serves h without TLS, and returns a client for it.
func plain(t *testing.T, h http.HandlerFunc) *client.Client {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return newClient(t, client.Config{Address: s.URL, HTTP: s.Client(), Silence: 200 * time.Millisecond})
}

func TestNew(t *testing.T) {
	a := newAuthority(t)
	id := spiffeid.RequireFromString("spiffe://example.org/pawl")
	for name, row := range map[string]struct {
		cfg client.Config
		ok  bool
	}{
		"empty":                 {client.Config{}, false},
		"no identity":           {client.Config{Address: "https://h:1"}, false},
		"TLS":                   {client.Config{Address: "https://h:1", TLS: &tls.Config{}}, true},
		"source":                {client.Config{Address: "https://h:1", Source: a.as("x"), ServerID: id}, true},
		"source without server": {client.Config{Address: "https://h:1", Source: a.as("x")}, false},
		"server without source": {client.Config{Address: "https://h:1", TLS: &tls.Config{}, ServerID: id}, false},
		"two":                   {client.Config{Address: "https://h:1", TLS: &tls.Config{}, HTTP: http.DefaultClient}, false},
		"without TLS":           {client.Config{Address: "http://h:1", TLS: &tls.Config{}}, false},
		"path":                  {client.Config{Address: "https://h:1/x", TLS: &tls.Config{}}, false},
		"no scheme":             {client.Config{Address: "h:1", TLS: &tls.Config{}}, false},
		"socket":                {client.Config{Address: "unix:/run/pawl.sock"}, true},
		"socket with TLS":       {client.Config{Address: "unix:/run/pawl.sock", TLS: &tls.Config{}}, false},
	} {
		if _, err := client.New(row.cfg); (err == nil) != row.ok {
			t.Errorf("New(%s) = %v, want it accepted: %v", name, err, row.ok)
		}
	}
}

// TestIdentity checks that the client accepts only the SPIFFE ID of the broker. It must present an SVID that is never
// older than Fresh, and leave no connection open.
func TestIdentity(t *testing.T) {
	a := newAuthority(t)
	var serials []string
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := tls.NewListener(inner, tlsconfig.MTLSServerConfig(a.as("pawl"), a.as("pawl"), tlsconfig.AuthorizeAny()))
	s := &httptest.Server{Listener: l, Config: &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		serials = append(serials, r.TLS.PeerCertificates[0].SerialNumber.String())
		_, _ = io.WriteString(w, "{}")
	})}}
	s.Start()
	defer s.Close()
	for _, row := range []struct {
		server string
		fresh  time.Duration
		ok     bool
		shown  int
	}{{"pawl", time.Nanosecond, true, 3}, {"pawl", time.Hour, true, 1}, {"other", 0, false, 0}} {
		serials = nil
		c := newClient(t, client.Config{Address: "https://" + inner.Addr().String(), Source: a.as("agent"), ServerID: a.as(row.server).id, Fresh: row.fresh})
		var err error
		for range 3 {
			err = errors.Join(err, c.Call(t.Context(), "GET", "/", nil, nil, nil))
		}
		shown := map[string]bool{}
		for _, serial := range serials {
			shown[serial] = true
		}
		if (err == nil) != row.ok || len(shown) != row.shown {
			t.Errorf("3 calls to %q with Fresh %s = %v with %d certificates, want %d", row.server, row.fresh, err, len(shown), row.shown)
		}
	}
}

func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"status":"ok"}`)
	})}}
	s.Start()
	defer s.Close()
	var out api.Health
	if err := newClient(t, client.Config{Address: "unix:" + path}).Call(t.Context(), "GET", "/healthz", nil, nil, &out); err != nil || out.Status != "ok" {
		t.Errorf("Call over a socket = %+v, %v, want ok", out, err)
	}
}

// TestAnswers checks that an answer from any other server is "no_answer", and that the error does not quote it.
func TestAnswers(t *testing.T) {
	for name, row := range map[string]struct {
		status int
		body   string
		want   api.Code // empty: none
	}{
		"good":                   {200, `{"status":"ok"}`, ""},
		"a later version's":      {200, `{"status":"ok","new":[1]}`, ""},
		"problem":                {409, `{"code":"fenced","kind":"revoked","status":409}`, "fenced"},
		"a later version's code": {403, `{"code":"unheard_of","kind":"denied","new":1}`, "unheard_of"},
		"not JSON":               {200, `<html>marker`, "no_answer"},
		"another type":           {200, `{"status":{"marker":1}}`, "no_answer"},
		"empty":                  {200, ``, "no_answer"},
		"a proxy's error":        {502, `<html>marker`, "no_answer"},
		"another server's JSON":  {404, `{"error":"marker"}`, "no_answer"},
		"a redirect":             {307, `{}`, "no_answer"},
		"too large":              {200, `{"status":"` + strings.Repeat("x", 17<<20) + `"}`, "no_answer"},
	} {
		t.Run(name, func(t *testing.T) {
			asked := 0
			c := plain(t, func(w http.ResponseWriter, _ *http.Request) {
				asked++
				w.Header().Set("Location", "/elsewhere")
				w.WriteHeader(row.status)
				_, _ = io.WriteString(w, row.body)
			})
			var out api.Health
			err := c.Call(t.Context(), "POST", "/", nil, api.Nothing{}, &out)
			var p *api.Problem
			if errors.As(err, &p); row.want == "" && (err != nil || out.Status != "ok") || row.want != "" && (p == nil || p.Code != row.want) {
				t.Errorf("%d %.40q = %v, want %q", row.status, row.body, err, row.want)
			}
			if err != nil && strings.Contains(err.Error(), "marker") {
				t.Errorf("the error %v quotes the answer", err)
			}
			if asked != 1 {
				t.Errorf("the broker was asked %d times, want once", asked)
			}
		})
	}
}

// TestSentOnce checks that a request is not sent again after its answer was lost on a reused connection. That holds
// even with an idempotency key.
func TestSentOnce(t *testing.T) {
	var asked atomic.Int64
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/first" {
			_, _ = io.WriteString(w, "{}")
			return
		}
		asked.Add(1)
		_, _ = io.Copy(io.Discard, r.Body)
		panic(http.ErrAbortHandler)
	}))
	defer s.Close()
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	c := newClient(t, client.Config{Address: s.URL, TLS: &tls.Config{RootCAs: pool}})
	if err := c.Call(t.Context(), "POST", "/first", nil, api.Nothing{}, nil); err != nil {
		t.Fatal(err)
	}
	err := c.Call(t.Context(), "POST", "/", http.Header{strings.ToLower(api.IdempotencyKey): {"k"}}, api.Nothing{}, nil)
	if !errors.Is(err, api.KindUnavailable) || asked.Load() != 1 {
		t.Errorf("Call = %v and the request was sent %d times, want no_answer, and sent once", err, asked.Load())
	}
}

// TestConnectionsEnd checks that a connection in use during Close ends with its request.
func TestConnectionsEnd(t *testing.T) {
	busy, goOn, closed := make(chan struct{}), make(chan struct{}), make(chan struct{})
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(busy)
		<-goOn
		_, _ = io.WriteString(w, "{}")
	}))
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			close(closed)
		}
	}
	s.EnableHTTP2 = true
	s.StartTLS()
	defer s.Close()
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	c := newClient(t, client.Config{Address: s.URL, TLS: &tls.Config{RootCAs: pool}})
	answered := make(chan error)
	go func() { answered <- c.Call(t.Context(), "GET", "/", nil, nil, nil) }()
	<-busy
	c.Close()
	close(goOn)
	if err := <-answered; err != nil {
		t.Errorf("Call during Close = %v, want its answer", err)
	}
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Error("the connection is open 10 s after the client closed")
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	c := plain(t, func(_ http.ResponseWriter, r *http.Request) {
		cancel()
		<-r.Context().Done()
	})
	if err := c.Call(ctx, "GET", "/", nil, nil, nil); !errors.Is(err, context.Canceled) || !errors.Is(err, api.KindUnavailable) {
		t.Errorf("Call under a cancelled context = %v, want both canceled and unavailable", err)
	}
}

func TestFollow(t *testing.T) {
	stop := errors.New("enough")
	for name, row := range map[string]struct {
		serve http.HandlerFunc
		f     func(client.Event) error
		want  func(error) bool
	}{
		"to the end": {sse("event: a\ndata: 1\n\n"), func(client.Event) error { return nil }, func(err error) bool { return err == nil }},
		"until f stops": {sse("event: a\ndata: 1\n\n"), func(client.Event) error { return stop },
			func(err error) bool { return err == stop }},
		"silence": {func(w http.ResponseWriter, r *http.Request) { sse(": \n\n")(w, r); <-r.Context().Done() }, func(client.Event) error { return nil },
			func(err error) bool {
				return errors.Is(err, api.KindUnavailable) && strings.Contains(err.Error(), "received nothing")
			}},
		"silence from the start": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, nil,
			func(err error) bool { return errors.Is(err, api.KindUnavailable) }},
		"refused": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(404)
			_, _ = io.WriteString(w, `{"code":"delegation_unknown","kind":"not_found"}`)
		}, nil, func(err error) bool { return errors.Is(err, api.KindNotFound) }},
		"no stream": {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") }, nil,
			func(err error) bool { return errors.Is(err, api.KindUnavailable) }},
	} {
		t.Run(name, func(t *testing.T) {
			if err := plain(t, row.serve).Follow(t.Context(), "/", row.f); !row.want(err) {
				t.Errorf("Follow = %v", err)
			}
		})
	}
}

func sse(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = io.WriteString(w, text)
		_ = http.NewResponseController(w).Flush() // a test server's writer flushes
	}
}

// TestPause is asked for a pause. The next request waits for its end, and is not sent when its context ends first.
func TestPause(t *testing.T) {
	var requests atomic.Int64
	c := plain(t, func(w http.ResponseWriter, _ *http.Request) {
		p := api.NewProblem(api.KindOverLimit, api.CodeTooManyRequests, "").After(time.Millisecond)
		switch requests.Add(1) {
		case 1:
		case 3:
			p.After(time.Hour) // the client waits no longer than 5 s
		default:
			return
		}
		w.WriteHeader(p.Status)
		_ = json.MarshalWrite(w, p)
	})
	call := func(ctx context.Context) error {
		return c.Call(ctx, http.MethodPost, "/", nil, api.Nothing{}, nil)
	}
	if err := call(t.Context()); !errors.Is(err, api.KindOverLimit) {
		t.Errorf("the first request = %v, want the limit", err)
	}
	if err := call(t.Context()); err != nil {
		t.Errorf("the second request, after its pause = %v", err)
	}
	if err := call(t.Context()); !errors.Is(err, api.KindOverLimit) {
		t.Errorf("the third request = %v, want the limit", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := call(ctx); !errors.Is(err, api.KindOverLimit) || requests.Load() != 3 {
		t.Errorf("a request whose context ends in the pause = %v after %d requests, want the limit and none sent",
			err, requests.Load())
	}
}
