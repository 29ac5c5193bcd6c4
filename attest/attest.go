// Package attest turns an X.509-SVID on a TLS connection, or a JWT-SVID in a header, into a
// broker.Caller, or refuses.
//
// Everything is checked on every request against the trust bundle of that moment, since a
// connection outlives certificates, authorities and the caller's good name. Below it lies
// workload, a SPIFFE Workload API server for development.
package attest

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// The defaults of Config.
const (
	DefaultMaxJWTLife = 10 * time.Minute
	DefaultLeeway     = 5 * time.Second
)

// Source gives our own X.509-SVID and the X.509 bundles, both as they are now. Implemented by
// *workloadapi.X509Source.
type Source interface {
	x509svid.Source
	x509bundle.Source
}

// Config says whom to believe.
type Config struct {
	TrustDomains []string         // names of the trust domains whose workloads may come; required, compared exactly
	Source       Source           // our SVID and the X.509 authorities; required
	JWT          jwtbundle.Source // the JWT authorities; nil means that JWT-SVIDs are refused
	Audience     string           // the one audience a JWT-SVID must name; required with JWT, and only with it
	MaxJWTLife   time.Duration    // how far ahead a JWT-SVID may end; zero means DefaultMaxJWTLife
	Leeway       time.Duration    // clock difference forgiven in a JWT-SVID's times; zero means DefaultLeeway
	MinTLS       uint16           // tls.VersionTLS12 or tls.VersionTLS13; zero means the latter
	Now          func() time.Time // nil means time.Now
}

// Attestor identifies callers. Safe for concurrent use.
type Attestor struct {
	config  Config
	domains map[spiffeid.TrustDomain]bool
	pools   pools
	seen    verified
}

// New checks the config and makes an Attestor of it.
func New(c Config) (*Attestor, error) {
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	a := &Attestor{config: c, domains: map[spiffeid.TrustDomain]bool{}}
	for _, name := range c.TrustDomains {
		td, err := parseTrustDomain(name)
		if err != nil {
			return nil, fmt.Errorf("attest: TrustDomains: %w", err)
		}
		a.domains[td] = true
	}
	return a, nil
}

func (c *Config) check() error {
	switch {
	case len(c.TrustDomains) == 0:
		return errors.New("TrustDomains is empty: nobody could come in")
	case c.Source == nil:
		return errors.New("Source is missing")
	case (c.JWT == nil) != (c.Audience == ""):
		return errors.New("JWT and Audience need each other")
	case c.MaxJWTLife < 0:
		return errors.New("MaxJWTLife is negative")
	case c.Leeway < 0 || c.Leeway > time.Minute:
		return errors.New("Leeway is not between zero and a minute")
	}
	if c.MinTLS == 0 {
		c.MinTLS = tls13
	}
	if c.MinTLS != tls12 && c.MinTLS != tls13 {
		return errors.New("MinTLS is neither TLS 1.2 nor TLS 1.3")
	}
	if c.MaxJWTLife == 0 {
		c.MaxJWTLife = DefaultMaxJWTLife
	}
	if c.Leeway == 0 {
		c.Leeway = DefaultLeeway
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return nil
}

// Identify says who makes the request: the client certificate of its TLS connection or the
// bearer token of its Authorization header, but not both. The error is a *broker.Error:
// Unauthenticated, or Unavailable when a trust bundle cannot be had. It holds no token.
// Headers that proxies write are not looked at.
func (a *Attestor) Identify(r *http.Request) (broker.Caller, error) {
	if r.TLS == nil {
		return broker.Caller{}, refuse("not a TLS connection")
	}
	auth, certs := r.Header["Authorization"], r.TLS.PeerCertificates
	var caller broker.Caller
	var err error
	switch {
	case len(certs) > 0 && len(auth) > 0:
		return broker.Caller{}, refuse("both a client certificate and an Authorization header: send one")
	case len(certs) > 0:
		caller, err = a.certificate(certs)
	case len(auth) == 1:
		caller, err = a.authorization(auth[0])
	case len(auth) > 1:
		return broker.Caller{}, refuse("more than one Authorization header")
	default:
		return broker.Caller{}, refuse("neither a client certificate nor an Authorization header")
	}
	if err != nil {
		return broker.Caller{}, err
	}
	return caller, nil
}

func (a *Attestor) authorization(header string) (broker.Caller, error) {
	scheme, token, ok := strings.Cut(header, " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return broker.Caller{}, refuse("the Authorization header is not a bearer token")
	}
	return a.token(token)
}

// admit makes the checks that are the same for both proofs and need no signature.
func (a *Attestor) admit(id spiffeid.ID) error {
	if !a.domains[id.TrustDomain()] {
		return refuse("trust domain %q is not accepted here", id.TrustDomain().Name())
	}
	return nil
}

func refuse(format string, args ...any) *broker.Error {
	return broker.Errorf(broker.Unauthenticated, "identify", format, args...)
}
