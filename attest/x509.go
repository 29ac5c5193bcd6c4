package attest

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxCertificates is the limit of a presented chain. Each certificate costs a signature check.
const maxCertificates = 8

// The bounds of RSA keys: a shorter key is weak, a longer one may be an attempt to slow us down.
const (
	minRSA = 2048 // bits
	maxRSA = 4096
)

// certificate verifies the chain that the TLS peer presented, leaf first.
func (a *Attestor) certificate(certs []*x509.Certificate) (broker.Caller, error) {
	if len(certs) > maxCertificates {
		return broker.Caller{}, refuse("more than %d certificates", maxCertificates)
	}
	id, err := leafID(certs[0])
	if err != nil {
		return broker.Caller{}, refuse("the client certificate is not an X.509-SVID of a workload: %v", err)
	}
	if err := a.admit(id); err != nil {
		return broker.Caller{}, err
	}
	bundle, err := a.config.Source.GetX509BundleForTrustDomain(id.TrustDomain())
	if err != nil {
		return broker.Caller{}, noBundle(id.TrustDomain(), err)
	}
	roots := a.pools.of(id.TrustDomain(), bundle.X509Authorities())
	digest, now := chainDigest(certs), a.config.Now()
	if v, ok := a.seen.get(digest, roots, now); ok {
		return v.caller, nil
	}
	v, err := verifyChain(id, certs, roots, now)
	if err != nil {
		return broker.Caller{}, err
	}
	a.seen.put(digest, v)
	return v.caller, nil
}

func noBundle(td spiffeid.TrustDomain, err error) error {
	return broker.Errorf(broker.Unavailable, "identify",
		"the trust bundle of %q is not available", td.Name()).Because(err)
}

// verifyChain checks signatures and times. The result stays valid within its validity period, for as long as the pool
// is current.
func verifyChain(id spiffeid.ID, certs []*x509.Certificate, roots *pool, now time.Time) (vouched, error) {
	leaf := certs[0]
	if now.Before(leaf.NotBefore) {
		return vouched{}, refuse("the client certificate is not valid yet")
	}
	if !now.Before(leaf.NotAfter) {
		return vouched{}, refuse("the client certificate has expired").With(broker.CodeExpired)
	}
	intermediates := x509.NewCertPool()
	for _, c := range certs[1:] {
		intermediates.AddCert(c)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots.certs, Intermediates: intermediates, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return vouched{}, refuse("the client certificate does not chain to a current authority of %q",
			id.TrustDomain().Name()).Because(err)
	}
	v := vouched{
		by: roots, from: leaf.NotBefore, until: leaf.NotAfter,
		caller: broker.Caller{
			ID: id, Proof: broker.ProofX509, NotAfter: leaf.NotAfter,
			Key: sha256.Sum256(leaf.RawSubjectPublicKeyInfo),
		},
	}
	for _, c := range chains[0] { // one valid chain is enough, and it determines the validity period
		v.from, v.until = later(v.from, c.NotBefore), earlier(v.until, c.NotAfter)
	}
	return v, nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// leafID checks the rules for a leaf that need no key (X509-SVID standard, sections 2 to 4) and returns its ID.
func leafID(leaf *x509.Certificate) (spiffeid.ID, error) {
	names, err := uriNames(leaf)
	if err != nil {
		return spiffeid.ID{}, err
	}
	switch {
	case len(names) != 1:
		return spiffeid.ID{}, errors.New("it must have exactly one URI name")
	case leaf.IsCA:
		return spiffeid.ID{}, errors.New("it is an authority's certificate")
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return spiffeid.ID{}, errors.New("its key may sign certificates")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return spiffeid.ID{}, errors.New("its key may not sign")
	case !goodKey(leaf.PublicKey):
		return spiffeid.ID{}, errors.New("its key has an unsupported type or size")
	}
	id, err := ParseID(names[0])
	if err != nil {
		return spiffeid.ID{}, errors.New("its SPIFFE ID is not valid: " + err.Error())
	}
	return id, nil
}

func goodKey(key any) bool {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return k.Curve.Params().BitSize >= 256
	case *rsa.PublicKey:
		return k.N.BitLen() >= minRSA && k.N.BitLen() <= maxRSA
	case ed25519.PublicKey:
		return true
	}
	return false
}

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// uriNames returns the URI names exactly as they are in the certificate. Certificate.URIs are parsed URLs: they turn
// SPIFFE:// into spiffe:// and drop an empty fragment.
func uriNames(cert *x509.Certificate) (names []string, err error) {
	const uriTag = 6 // RFC 5280 section 4.2.1.6
	malformed := errors.New("its names cannot be parsed")
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var list asn1.RawValue
		if rest, err := asn1.Unmarshal(ext.Value, &list); err != nil || len(rest) > 0 {
			return nil, malformed
		}
		for rest := list.Bytes; len(rest) > 0; {
			var name asn1.RawValue
			if rest, err = asn1.Unmarshal(rest, &name); err != nil {
				return nil, malformed
			}
			if name.Class == asn1.ClassContextSpecific && name.Tag == uriTag {
				names = append(names, string(name.Bytes))
			}
		}
	}
	return names, nil
}

func chainDigest(certs []*x509.Certificate) (sum [32]byte) {
	h := sha256.New()
	for _, c := range certs {
		h.Write(c.Raw) // DER includes its own length
	}
	h.Sum(sum[:0])
	return sum
}

// pool is one version of a trust domain's authorities. Its address identifies the version.
type pool struct {
	authorities []*x509.Certificate
	certs       *x509.CertPool
}

// pools holds the latest pool of each trust domain. A comparison of the authorities is far cheaper than a new pool.
type pools struct {
	mu     sync.Mutex // guards latest
	latest map[spiffeid.TrustDomain]*pool
}

// of returns the pool of exactly these authorities. It is the same pool until the authorities change.
func (p *pools) of(td spiffeid.TrustDomain, authorities []*x509.Certificate) *pool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if old := p.latest[td]; old != nil && slices.EqualFunc(old.authorities, authorities, (*x509.Certificate).Equal) {
		return old
	}
	fresh := &pool{authorities: authorities, certs: x509.NewCertPool()}
	for _, c := range authorities {
		fresh.certs.AddCert(c)
	}
	if p.latest == nil {
		p.latest = map[spiffeid.TrustDomain]*pool{}
	}
	p.latest[td] = fresh
	return fresh
}
