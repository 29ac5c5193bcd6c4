package attest_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/attest/workload"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// serve responds to each request with the caller's ID, or with 401.
func serve(t *testing.T, a *attest.Attestor, config *tls.Config, limits attest.Limits) (url string) {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("Listen = %v", err)
	}
	server := attest.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, err := a.Identify(r)
		if err != nil {
			http.Error(w, "", http.StatusUnauthorized)
			return
		}
		fmt.Fprint(w, caller.ID)
	}), limits)
	server.ErrorLog = log.New(io.Discard, "", 0)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(attest.Listener(inner, config, limits)) }()
	t.Cleanup(func() {
		_ = server.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("Serve = %v", err)
		}
	})
	return "https://" + inner.Addr().String()
}

// client presents svid, nil for none, and trusts the server's current bundle. It keeps TLS sessions and, unless fresh,
// connections.
func client(t *testing.T, s *workload.Server, svid x509svid.Source, version uint16, fresh bool) *http.Client {
	config := tlsconfig.TLSClientConfig(s.Source(s.ID("/any")), tlsconfig.AuthorizeID(s.ID("/pawl")))
	if svid != nil {
		config.GetClientCertificate = tlsconfig.GetClientCertificate(svid)
	}
	config.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	config.MinVersion, config.MaxVersion = version, version
	transport := &http.Transport{TLSClientConfig: config, DisableKeepAlives: fresh, ForceAttemptHTTP2: !fresh}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

type answer struct {
	status  int // 0: no response
	id      string
	proto   int
	reused  bool // the connection
	resumed bool // the TLS session
	server  *x509.Certificate
}

func get(t *testing.T, c *http.Client, url, bearer string) (a answer) {
	t.Helper()
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { a.reused = info.Reused }}
	ctx, cancel := context.WithTimeout(httptrace.WithClientTrace(t.Context(), trace), 20*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatalf("NewRequest = %v", err)
	}
	if bearer != "" {
		r.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := c.Do(r)
	if err != nil {
		if ctx.Err() != nil {
			t.Fatalf("no response in time: %v", err)
		}
		return a
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading the response: %v", err)
	}
	a.status, a.id, a.proto = resp.StatusCode, string(body), resp.ProtoMajor
	a.resumed, a.server = resp.TLS.DidResume, resp.TLS.PeerCertificates[0]
	return a
}

// TestResumption does three handshakes with one client that keeps its TLS sessions: two valid ones, and one after the
// client's authority has left the bundle. go-spiffe with tickets would accept the last one.
func TestResumption(t *testing.T) {
	for name, version := range map[string]uint16{"TLS 1.2": tls.VersionTLS12, "TLS 1.3": tls.VersionTLS13} {
		for _, tickets := range []bool{false, true} { // true: the refusal does not depend on disabled tickets
			t.Run(fmt.Sprintf("%s, tickets %v", name, tickets), func(t *testing.T) { resumption(t, version, tickets) })
		}
	}
}

func resumption(t *testing.T, version uint16, tickets bool) {
	s := newWorkload(t, &clock{time.Now()})
	conf := config(s, &clock{time.Now()})
	conf.MinTLS = tls.VersionTLS12
	a := newAttestor(t, conf)
	server := a.ServerTLS()
	if !server.SessionTicketsDisabled {
		t.Error("session tickets are on")
	}
	server.SessionTicketsDisabled = !tickets
	url := serve(t, a, server, attest.Limits{})

	fixed, err := s.X509SVID(s.ID("/agent/a"))
	if err != nil {
		t.Fatalf("X509SVID = %v", err)
	}
	current := client(t, s, s.Source(s.ID("/agent/b")), version, true)
	c := client(t, s, fixed, version, true)
	for n := range 2 {
		got := get(t, c, url, "")
		if got.id != fixed.ID.String() || got.resumed != (tickets && n == 1) {
			t.Errorf("handshake %d: got %d %q, resumed %v", n+1, got.status, got.id, got.resumed)
		}
	}
	get(t, current, url, "") // stores a session too

	if err := s.RotateAuthority(); err != nil {
		t.Fatalf("RotateAuthority = %v", err)
	}
	s.Retire()
	if got := get(t, c, url, ""); got.status == http.StatusOK {
		t.Errorf("handshake 3, authority removed: got %d %q, want refused", got.status, got.id)
	}
	// A session keeps its first certificate, so with tickets even this client is refused.
	if got := get(t, current, url, ""); !tickets && got.status != http.StatusOK {
		t.Errorf("a client with a new SVID: got %d, want accepted", got.status)
	}
}

// TestOpenConnection ends the client's trust during one HTTP/2 connection.
func TestOpenConnection(t *testing.T) {
	for name, end := range map[string]func(*workload.Server, *atomic.Int64) error{
		"authority removed": func(s *workload.Server, _ *atomic.Int64) error {
			err := s.RotateAuthority()
			s.Retire()
			return err
		},
		"SVID expired": func(_ *workload.Server, later *atomic.Int64) error {
			later.Store(int64(5 * time.Minute))
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newWorkload(t, &clock{time.Now()})
			var later atomic.Int64
			conf := config(s, nil)
			conf.Now = func() time.Time { return time.Now().Add(time.Duration(later.Load())) }
			a := newAttestor(t, conf)
			url := serve(t, a, a.ServerTLS(), attest.Limits{})
			c := client(t, s, s.Source(s.ID("/agent/a")), tls.VersionTLS13, false)
			for n := range 2 {
				got := get(t, c, url, "")
				if got.status != http.StatusOK || got.proto != 2 || got.reused != (n == 1) {
					t.Fatalf("request %d: got %+v, want 200 over HTTP/2", n+1, got)
				}
			}
			if err := end(s, &later); err != nil {
				t.Fatal(err)
			}
			if got := get(t, c, url, ""); got.status != http.StatusUnauthorized || !got.reused {
				t.Errorf("after that: got %d, reused %v, want 401 on the same connection", got.status, got.reused)
			}
		})
	}
}

// TestRotation rotates the SVIDs of both sides with the real Workload API client. Connections and the listener stay
// open, and no request is refused.
func TestRotation(t *testing.T) {
	s := newWorkload(t, &clock{time.Now()})
	addr, err := s.Socket(s.ID("/pawl"))
	if err != nil {
		t.Fatalf("Socket = %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(addr)))
	if err != nil {
		t.Fatalf("NewX509Source = %v", err)
	}
	defer source.Close()
	a := newAttestor(t, attest.Config{TrustDomains: []string{"example.org"}, Source: source})
	url := serve(t, a, a.ServerTLS(), attest.Limits{})
	kept := client(t, s, s.Source(s.ID("/agent/a")), tls.VersionTLS13, false)
	first := get(t, kept, url, "")
	for n := range 5 {
		before := get(t, client(t, s, s.Source(s.ID("/agent/a")), tls.VersionTLS13, true), url, "")
		if before.status != http.StatusOK {
			t.Fatalf("rotation %d: got %d, want 200", n, before.status)
		}
		if err := s.RotateAuthority(); err != nil {
			t.Fatalf("RotateAuthority = %v", err)
		}
		for { // wait for the push; no request may be refused meanwhile
			svid, err := source.GetX509SVID()
			if err != nil {
				t.Fatalf("GetX509SVID = %v", err)
			}
			if !svid.Certificates[0].Equal(before.server) {
				break
			}
			if err := source.WaitUntilUpdated(ctx); err != nil {
				t.Fatalf("WaitUntilUpdated = %v", err)
			}
		}
		after := get(t, client(t, s, s.Source(s.ID("/agent/a")), tls.VersionTLS13, true), url, "")
		if after.status != http.StatusOK || after.server.Equal(before.server) {
			t.Errorf("rotation %d: got %d, the same server certificate: %v", n, after.status, after.server.Equal(before.server))
		}
		if got := get(t, kept, url, ""); got.status != http.StatusOK || !got.reused {
			t.Errorf("rotation %d: kept connection: got %d, reused %v", n, got.status, got.reused)
		}
	}
	if first.status != http.StatusOK {
		t.Errorf("at first: got %d, want 200", first.status)
	}
}

func TestServerTLS(t *testing.T) {
	s := newWorkload(t, &clock{time.Now()})
	both := config(s, &clock{time.Now()})
	certOnly := both
	certOnly.JWT, certOnly.Audience = nil, ""
	svid, foreign := s.Source(s.ID("/agent/a")), newWorkload(t, &clock{time.Now()})
	jwt := token(t, s, "/agent/a")
	for what, row := range map[string]struct {
		config  attest.Config
		svid    x509svid.Source
		bearer  string
		version uint16
		want    int // 0: no connection
	}{
		"certificate":                   {certOnly, svid, "", tls.VersionTLS13, 200},
		"certificate, tokens accepted":  {both, svid, "", tls.VersionTLS13, 200},
		"token":                         {both, nil, jwt, tls.VersionTLS13, 200},
		"both":                          {both, svid, jwt, tls.VersionTLS13, 401},
		"neither":                       {both, nil, "", tls.VersionTLS13, 401},
		"neither, certificate required": {certOnly, nil, "", tls.VersionTLS13, 0},
		"token, certificate required":   {certOnly, nil, jwt, tls.VersionTLS13, 0},
		"foreign certificate":           {both, foreign.Source(foreign.ID("/agent/a")), "", tls.VersionTLS13, 0},
		"TLS 1.2":                       {both, svid, "", tls.VersionTLS12, 0},
	} {
		a := newAttestor(t, row.config)
		url := serve(t, a, a.ServerTLS(), attest.Limits{})
		got := get(t, client(t, s, row.svid, row.version, true), url, row.bearer)
		if got.status != row.want {
			t.Errorf("%s: got %d, want %d", what, got.status, row.want)
		}
	}
}

// TestOwnSVIDExpired checks that the server presents no certificate rather than an expired one.
func TestOwnSVIDExpired(t *testing.T) {
	c := &clock{start}
	s := newWorkload(t, c)
	svid, err := s.X509SVID(s.ID("/pawl"))
	if err != nil {
		t.Fatalf("X509SVID = %v", err)
	}
	conf := config(s, c)
	conf.Source = trustWith{s.Bundle().X509Bundle(), svid}
	server := newAttestor(t, conf).ServerTLS()
	c.advance(5*time.Minute - time.Second)
	if cert, err := server.GetCertificate(nil); err != nil || !cert.Leaf.Equal(svid.Certificates[0]) {
		t.Errorf("GetCertificate in the last second = %v, want ours", err)
	}
	c.advance(time.Second)
	if _, err := server.GetCertificate(nil); err == nil {
		t.Error("GetCertificate at its expiry = nil error, want one")
	}
}
