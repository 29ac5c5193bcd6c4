package attest_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/attest/workload"
	"github.com/pawlsec/pawl/broker"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const audience = "spiffe://example.org/pawl"

// start is the initial time of the tests' clocks: a whole second, like the times in a JWT.
var start = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

// clock is advanced by hand. No other goroutine may read it meanwhile.
type clock struct{ time.Time }

func (c *clock) now() time.Time          { return c.Time }
func (c *clock) advance(d time.Duration) { c.Time = c.Add(d) }

func newWorkload(t testing.TB, c *clock) *workload.Server {
	t.Helper()
	s, err := workload.New(workload.Config{TrustDomain: "example.org", Now: c.now})
	if err != nil {
		t.Fatalf("workload.New = %v", err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// config returns a configuration that accepts the server's workloads by certificate and by token.
func config(s *workload.Server, c *clock) attest.Config {
	source := s.Source(s.ID("/pawl"))
	return attest.Config{
		TrustDomains: []string{"example.org"}, Source: source, JWT: source, Audience: audience, Now: c.now,
	}
}

func newAttestor(t testing.TB, c attest.Config) *attest.Attestor {
	t.Helper()
	a, err := attest.New(c)
	if err != nil {
		t.Fatalf("New = %v", err)
	}
	return a
}

func certificates(t testing.TB, s *workload.Server, path string) []*x509.Certificate {
	t.Helper()
	svid, err := s.X509SVID(s.ID(path))
	if err != nil {
		t.Fatalf("X509SVID = %v", err)
	}
	return svid.Certificates
}

func token(t testing.TB, s *workload.Server, path string) string {
	t.Helper()
	token, err := s.JWTSVID(s.ID(path), audience)
	if err != nil {
		t.Fatalf("JWTSVID = %v", err)
	}
	return token
}

// request returns a request over TLS with these certificates and Authorization headers.
func request(certs []*x509.Certificate, authorization ...string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "https://pawl/", nil)
	r.TLS = &tls.ConnectionState{PeerCertificates: certs, HandshakeComplete: true}
	for _, a := range authorization {
		r.Header.Add("Authorization", a)
	}
	return r
}

// refused checks the kind of err, and that it contains no part of the secrets.
func refused(t testing.TB, what string, err error, kind broker.Kind, secrets ...string) {
	t.Helper()
	var e *broker.Error
	if !errors.As(err, &e) || e.Kind != kind {
		t.Errorf("%s: Identify = %v, want %v", what, err, kind)
		return
	}
	for _, secret := range secrets {
		for _, part := range strings.FieldsFunc(secret, func(r rune) bool { return r == '.' || r == ' ' }) {
			if len(part) >= 16 && strings.Contains(err.Error(), part) {
				t.Errorf("%s: the error contains a part of the token", what)
			}
		}
	}
}

func TestConfig(t *testing.T) {
	c := &clock{start}
	s := newWorkload(t, c)
	for name, spoil := range map[string]func(*attest.Config){
		"no trust domains":      func(c *attest.Config) { c.TrustDomains = nil },
		"empty trust domain":    func(c *attest.Config) { c.TrustDomains = []string{""} },
		"trust domain as an ID": func(c *attest.Config) { c.TrustDomains = []string{"spiffe://example.org"} },
		"upper-case domain":     func(c *attest.Config) { c.TrustDomains = []string{"Example.org"} },
		"trailing dot":          func(c *attest.Config) { c.TrustDomains = []string{"example.org."} },
		"leading dot":           func(c *attest.Config) { c.TrustDomains = []string{".example.org"} },
		"two dots":              func(c *attest.Config) { c.TrustDomains = []string{"example..org"} },
		"256 bytes":             func(c *attest.Config) { c.TrustDomains = []string{strings.Repeat("a", 256)} },
		"no source":             func(c *attest.Config) { c.Source = nil },
		"tokens, no audience":   func(c *attest.Config) { c.Audience = "" },
		"audience, no tokens":   func(c *attest.Config) { c.JWT = nil },
		"negative life":         func(c *attest.Config) { c.MaxJWTLife = -1 },
		"negative leeway":       func(c *attest.Config) { c.Leeway = -1 },
		"leeway over a minute":  func(c *attest.Config) { c.Leeway = time.Minute + 1 },
		"TLS 1.1":               func(c *attest.Config) { c.MinTLS = tls.VersionTLS11 },
	} {
		conf := config(s, c)
		spoil(&conf)
		if _, err := attest.New(conf); err == nil {
			t.Errorf("%s: New = nil error, want one", name)
		}
	}
	conf := config(s, c)
	conf.TrustDomains = append(conf.TrustDomains, strings.Repeat("a", 255))
	newAttestor(t, conf)
}

func TestIdentify(t *testing.T) {
	c := &clock{start}
	s := newWorkload(t, c)
	a := newAttestor(t, config(s, c))
	certs, jwt := certificates(t, s, "/agent/a"), token(t, s, "/agent/a")

	for what, r := range map[string]*http.Request{
		"certificate":       request(certs),
		"token":             request(nil, "Bearer "+jwt),
		"lower-case scheme": request(nil, "bearer "+jwt),
	} {
		proof := broker.ProofJWT
		if len(r.TLS.PeerCertificates) > 0 {
			proof = broker.ProofX509
		}
		for range 2 { // the second time from the cache
			caller, err := a.Identify(r)
			if err != nil || caller.ID != s.ID("/agent/a") || caller.Proof != proof {
				t.Errorf("%s: Identify = %v %v, %v, want %v %v", what, caller.ID, caller.Proof, err, s.ID("/agent/a"), proof)
			}
			if want := start.Add(5 * time.Minute); !caller.NotAfter.Equal(want) {
				t.Errorf("%s: NotAfter = %v, want %v", what, caller.NotAfter, want)
			}
			if caller.Key == [32]byte{} {
				t.Errorf("%s: Key is empty", what)
			}
		}
	}

	plain := request(nil, "Bearer "+jwt)
	plain.TLS = nil
	proxied := request(nil)
	proxied.Header.Set("X-Forwarded-Client-Cert", "URI="+s.ID("/agent/a").String())
	for what, r := range map[string]*http.Request{
		"nothing":         request(nil),
		"both":            request(certs, "Bearer "+jwt),
		"both, no bearer": request(certs, ""),
		"two tokens":      request(nil, "Bearer "+jwt, "Bearer "+jwt),
		"no scheme":       request(nil, jwt),
		"basic":           request(nil, "Basic "+jwt),
		"two spaces":      request(nil, "Bearer  "+jwt),
		"empty":           request(nil, ""),
		"no token":        request(nil, "Bearer "),
		"no TLS":          plain,
		"proxy's header":  proxied,
	} {
		_, err := a.Identify(r)
		refused(t, what, err, broker.Unauthenticated, jwt)
	}
}

func TestTokensNotAccepted(t *testing.T) {
	c := &clock{start}
	s := newWorkload(t, c)
	conf := config(s, c)
	conf.JWT, conf.Audience = nil, ""
	_, err := newAttestor(t, conf).Identify(request(nil, "Bearer "+token(t, s, "/agent/a")))
	refused(t, "token", err, broker.Unauthenticated)
}

func TestForeignTrustDomain(t *testing.T) {
	c := &clock{start}
	s := newWorkload(t, c)
	conf := config(s, c)
	conf.TrustDomains = []string{"example.com"} // although there is a bundle of example.org
	a := newAttestor(t, conf)
	_, err := a.Identify(request(certificates(t, s, "/agent/a")))
	refused(t, "certificate", err, broker.Unauthenticated)
	_, err = a.Identify(request(nil, "Bearer "+token(t, s, "/agent/a")))
	refused(t, "token", err, broker.Unauthenticated)
}

// TestBundleChange removes the authority of cached callers.
func TestBundleChange(t *testing.T) {
	c := &clock{start}
	s := newWorkload(t, c)
	a := newAttestor(t, config(s, c))
	jwt := token(t, s, "/agent/a")
	requests := map[string]*http.Request{"certificate": request(certificates(t, s, "/agent/a")), "token": request(nil, "Bearer "+jwt)}
	accepted := func(when string) {
		t.Helper()
		for what, r := range requests {
			if _, err := a.Identify(r); err != nil {
				t.Errorf("%s %s: Identify = %v, want accepted", what, when, err)
			}
		}
	}
	accepted("at first")
	if err := s.RotateAuthority(); err != nil {
		t.Fatalf("RotateAuthority = %v", err)
	}
	accepted("after a rotation of its authority")
	s.Retire()
	for what, r := range requests {
		_, err := a.Identify(r)
		refused(t, what, err, broker.Unauthenticated, jwt)
	}
}

// TestExpiry lets cached callers expire.
func TestExpiry(t *testing.T) {
	c := &clock{start}
	s := newWorkload(t, c)
	a := newAttestor(t, config(s, c))
	byCert, byToken := request(certificates(t, s, "/agent/a")), request(nil, "Bearer "+token(t, s, "/agent/a"))
	check := func(r *http.Request, what string, want bool) {
		t.Helper()
		_, err := a.Identify(r)
		if want && err != nil {
			t.Errorf("%s: Identify = %v, want accepted", what, err)
		}
		if !want {
			refused(t, what, err, broker.Unauthenticated)
			var e *broker.Error
			if errors.As(err, &e) && e.Code != broker.CodeExpired {
				t.Errorf("%s: code = %q, want %q", what, e.Code, broker.CodeExpired)
			}
		}
	}
	check(byCert, "certificate at first", true)
	check(byToken, "token at first", true)
	c.advance(5*time.Minute - time.Second)
	check(byCert, "certificate, its last second", true)
	c.advance(time.Second)
	check(byCert, "certificate at its expiry", false)
	check(byToken, "token at its expiry", true)
	c.advance(5*time.Second - 1)
	check(byToken, "token within leeway", true)
	c.advance(1)
	check(byToken, "token past leeway", false)
}

// brokenSource has no connection to the Workload API.
type brokenSource struct{ x509svid.Source }

func (brokenSource) GetX509BundleForTrustDomain(domain) (*x509bundle.Bundle, error) {
	return nil, errors.New("source is closed")
}

func (brokenSource) GetJWTBundleForTrustDomain(domain) (*jwtbundle.Bundle, error) {
	return nil, errors.New("source is closed")
}

func TestNoBundle(t *testing.T) {
	c := &clock{start}
	s := newWorkload(t, c)
	conf := config(s, c)
	conf.Source, conf.JWT = brokenSource{conf.Source}, brokenSource{conf.Source}
	a := newAttestor(t, conf)
	_, err := a.Identify(request(certificates(t, s, "/agent/a")))
	refused(t, "certificate", err, broker.Unavailable)
	_, err = a.Identify(request(nil, "Bearer "+token(t, s, "/agent/a")))
	refused(t, "token", err, broker.Unavailable)
}

func BenchmarkIdentify(b *testing.B) {
	c := &clock{start}
	s := newWorkload(b, c)
	certs, jwt := request(certificates(b, s, "/agent/a")), request(nil, "Bearer "+token(b, s, "/agent/a"))
	for name, r := range map[string]*http.Request{"certificate": certs, "token": jwt} {
		b.Run(name+"/first", func(b *testing.B) {
			for b.Loop() {
				a, _ := attest.New(config(s, c))
				if _, err := a.Identify(r); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/again", func(b *testing.B) {
			a := newAttestor(b, config(s, c))
			for b.Loop() {
				if _, err := a.Identify(r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
