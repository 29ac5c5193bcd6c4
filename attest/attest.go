// Package attest authenticates a request by the X.509-SVID of its TLS connection or the JWT-SVID in its header, and
// returns a broker.Caller.
//
// It repeats every check on every request, against the current trust bundle, because a connection may outlive its
// certificate, its authority and the caller's permission. The package workload below it is a SPIFFE Workload API server
// for development.
package attest

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
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
	defaultMaxJWTLife = 10 * time.Minute
	defaultLeeway     = 5 * time.Second
)

// Source provides our own current X.509-SVID and the current X.509 bundles. *workloadapi.X509Source implements it.
type Source interface {
	x509svid.Source
	x509bundle.Source
}

// Config configures an [Attestor].
type Config struct {
	TrustDomains []string         // names of the trust domains with accepted workloads; required, compared exactly
	Source       Source           // our SVID and the X.509 authorities; required
	JWT          jwtbundle.Source // the JWT authorities; nil means that JWT-SVIDs are refused
	Audience     string           // the audience that a JWT-SVID must name; required with JWT, and only with it
	Companions   []string         // other audiences that a JWT-SVID may name beside it; empty: none
	MaxJWTLife   time.Duration    // limit of a JWT-SVID's remaining lifetime; zero means 10 min
	Leeway       time.Duration    // tolerated clock difference in a JWT-SVID's times, at most 1 min; zero means 5 s
	MinTLS       uint16           // tls.VersionTLS12 or tls.VersionTLS13; zero means the latter
	Now          func() time.Time // nil means time.Now
}

// Attestor authenticates callers. Safe for concurrent use.
type Attestor struct {
	config  Config
	domains map[spiffeid.TrustDomain]bool
	pools   pools
	seen    verified
}

// New checks the configuration and returns an Attestor.
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
		return errors.New("TrustDomains is empty: every caller would be refused")
	case c.Source == nil:
		return errors.New("Source is required")
	case (c.JWT == nil) != (c.Audience == ""):
		return errors.New("JWT and Audience require each other")
	case slices.Contains(c.Companions, "") || len(c.Companions) > 0 && c.JWT == nil:
		return errors.New("Companions has an empty audience, or there is no Audience")
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
		c.MaxJWTLife = defaultMaxJWTLife
	}
	if c.Leeway == 0 {
		c.Leeway = defaultLeeway
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return nil
}

// Identify authenticates the request by the client certificate of its TLS connection or the bearer token of its
// Authorization header, but not both. It ignores the headers of proxies. The error is a *broker.Error: Unauthenticated,
// Unavailable if there is no trust bundle, or OverLimit on a connection beyond a limit. It never contains a token.
func (a *Attestor) Identify(r *http.Request) (broker.Caller, error) {
	if c, ok := r.Context().Value(boundKey{}).(*bound); ok && c.over != nil {
		refusal := *c.over
		return broker.Caller{}, &refusal
	}
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

// admit does the checks that both proofs share and that need no signature.
func (a *Attestor) admit(id spiffeid.ID) error {
	if !a.domains[id.TrustDomain()] {
		return refuse("trust domain %q is not accepted here", id.TrustDomain().Name())
	}
	return nil
}

func refuse(format string, args ...any) *broker.Error {
	return broker.Errorf(broker.Unauthenticated, "identify", format, args...)
}
