package workload

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net/url"
	"path"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const (
	authorityTTL = 365 * 24 * time.Hour // its keys end with the process anyway
	backdate     = 10 * time.Second     // for peers with a clock that is behind
)

// authority is one generation of signing keys.
type authority struct {
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey // of cert
	jwtKey *ecdsa.PrivateKey
	kid    string // of jwtKey
}

func (s *Server) newAuthority() (authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return authority{}, fmt.Errorf("workload: making an authority's key: %w", err)
	}
	jwtKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return authority{}, fmt.Errorf("workload: making a JWT key: %w", err)
	}
	now := s.now()
	cert, err := sign(&x509.Certificate{
		Subject:               pkix.Name{Organization: []string{"development"}, CommonName: s.td.Name()},
		URIs:                  []*url.URL{s.td.ID().URL()},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityTTL),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}, nil, &key.PublicKey, key)
	return authority{cert: cert, key: key, jwtKey: jwtKey, kid: rand.Text()}, err
}

// sign creates a certificate with a random serial number. A nil parent means self-signed.
func sign(template, parent *x509.Certificate, pub *ecdsa.PublicKey, signer *ecdsa.PrivateKey) (*x509.Certificate, error) {
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, signer)
	if err != nil {
		return nil, fmt.Errorf("workload: signing a certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

// Rotate issues a new X.509-SVID to every identity from the current authority and pushes it.
func (s *Server) Rotate() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changeLocked()
}

// RotateAuthority creates a new certificate authority and JWT key, which sign from now on, and pushes new SVIDs. The
// old ones stay in the bundle until Retire.
func (s *Server) RotateAuthority() error {
	next, err := s.newAuthority()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.authorities = append(s.authorities, next)
	s.changeLocked()
	return nil
}

// Retire removes every authority but the current one from the bundle and pushes the bundle.
func (s *Server) Retire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.authorities = s.authorities[len(s.authorities)-1:]
	s.changeLocked()
}

func (s *Server) changeLocked() {
	clear(s.svids)
	close(s.changed)
	s.changed = make(chan struct{})
}

// wait returns the channel that the next rotation closes.
func (s *Server) wait() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// X509SVID returns the identity's current X.509-SVID. It stays the same until it is rotated or reaches half of its
// lifetime.
func (s *Server) X509SVID(id spiffeid.ID) (*x509svid.SVID, error) {
	if err := s.member(id); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if svid, ok := s.svids[id]; ok && now.Before(svid.Certificates[0].NotAfter.Add(-s.ttl/2)) {
		return svid, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("workload: making an SVID's key: %w", err)
	}
	signer := s.authorities[len(s.authorities)-1]
	cert, err := sign(&x509.Certificate{
		// Vault's cert auth requires a common name.
		Subject:               pkix.Name{Organization: []string{"development"}, CommonName: path.Base(id.Path())},
		URIs:                  []*url.URL{id.URL()},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(s.ttl),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}, signer.cert, &key.PublicKey, signer.key)
	if err != nil {
		return nil, err
	}
	s.svids[id] = &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{cert}, PrivateKey: key}
	return s.svids[id], nil
}

// JWTSVID signs a new JWT-SVID (ES256) of the identity. At least one audience is required.
func (s *Server) JWTSVID(id spiffeid.ID, audience ...string) (string, error) {
	if err := s.member(id); err != nil {
		return "", err
	}
	if len(audience) == 0 {
		return "", errors.New("workload: a JWT-SVID needs an audience")
	}
	s.mu.Lock()
	a := s.authorities[len(s.authorities)-1]
	s.mu.Unlock()
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: a.jwtKey, KeyID: a.kid}},
		new(jose.SignerOptions).WithType("JWT"))
	if err != nil {
		return "", fmt.Errorf("workload: making a JWT signer: %w", err)
	}
	now := s.now()
	return jwt.Signed(signer).Claims(jwt.Claims{
		Subject:  id.String(),
		Audience: audience,
		IssuedAt: jwt.NewNumericDate(now),
		Expiry:   jwt.NewNumericDate(now.Add(s.ttl)),
		ID:       rand.Text(),
	}).Serialize()
}

// Bundle returns the current trust bundle, with the X.509 and JWT authorities.
func (s *Server) Bundle() *spiffebundle.Bundle {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := spiffebundle.New(s.td)
	for _, a := range s.authorities {
		b.AddX509Authority(a.cert)
		_ = b.AddJWTAuthority(a.kid, &a.jwtKey.PublicKey) // fails only for an empty kid
	}
	return b
}

// Source provides an identity's current SVID and bundles. It replaces a workloadapi.X509Source and the bundles of a
// workloadapi.JWTSource.
type Source struct {
	server *Server
	id     spiffeid.ID
}

// Source returns the identity's SVID and bundles without a socket.
func (s *Server) Source(id spiffeid.ID) Source { return Source{s, id} }

// GetX509SVID implements x509svid.Source.
func (s Source) GetX509SVID() (*x509svid.SVID, error) { return s.server.X509SVID(s.id) }

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (s Source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return s.server.Bundle().GetX509BundleForTrustDomain(td)
}

// GetJWTBundleForTrustDomain implements jwtbundle.Source.
func (s Source) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	return s.server.Bundle().GetJWTBundleForTrustDomain(td)
}
