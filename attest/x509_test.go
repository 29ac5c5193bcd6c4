package attest_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/broker"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// issuer is an authority that signs any certificate.
type issuer struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func p256(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatalf("GenerateKey = %v", err)
	}
	return key
}

func newIssuer(t testing.TB) *issuer {
	ca := &issuer{t: t, key: p256(t)}
	ca.cert = ca.sign(caTemplate(), caTemplate(), &ca.key.PublicKey)
	return ca
}

func (ca *issuer) sign(template, parent *x509.Certificate, pub crypto.PublicKey) *x509.Certificate {
	ca.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, ca.key)
	if err != nil {
		ca.t.Fatalf("CreateCertificate = %v", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		ca.t.Fatalf("ParseCertificate = %v", err)
	}
	return cert
}

// intermediate returns an authority below ca.
func (ca *issuer) intermediate(change func(*x509.Certificate)) *issuer {
	template := caTemplate()
	template.Subject.CommonName = "intermediate"
	if change != nil {
		change(template)
	}
	below := &issuer{t: ca.t, key: p256(ca.t)}
	below.cert = ca.sign(template, ca.cert, &below.key.PublicKey)
	return below
}

// leaf returns a good X.509-SVID with a change.
func (ca *issuer) leaf(change func(*x509.Certificate)) *x509.Certificate {
	template := &x509.Certificate{
		NotBefore: start.Add(-time.Minute), NotAfter: start.Add(time.Hour),
		URIs:        []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/a"}},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		PublicKey:   &p256(ca.t).PublicKey, BasicConstraintsValid: true,
	}
	if change != nil {
		change(template)
	}
	return ca.sign(template, ca.cert, template.PublicKey)
}

func caTemplate() *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: "root"}, NotBefore: start.Add(-time.Hour), NotAfter: start.Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
}

// trust is a Source without an SVID of ours.
type trust struct{ *x509bundle.Bundle }

func (trust) GetX509SVID() (*x509svid.SVID, error) { return nil, errors.New("no SVID") }

// trustWith is a Source with one constant SVID.
type trustWith struct {
	*x509bundle.Bundle
	x509svid.Source
}

// source trusts the issuer for example.org.
func (ca *issuer) source() attest.Source {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	return trust{x509bundle.FromX509Authorities(td, []*x509.Certificate{ca.cert})}
}

// names replaces a certificate's URI names with exactly these, unparsed.
func names(uris ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		var list []asn1.RawValue
		for _, uri := range uris {
			list = append(list, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)})
		}
		der, err := asn1.Marshal(list)
		if err != nil {
			panic(err)
		}
		c.URIs = nil
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: der}}
	}
}

func key(pub crypto.PublicKey) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.PublicKey = pub }
}

func rsaKey(bits uint) *rsa.PublicKey { // only a number of that size: no test signs with it
	n := new(big.Int).Lsh(big.NewInt(1), bits-1)
	return &rsa.PublicKey{N: n.Add(n, big.NewInt(1)), E: 65537}
}

func curveKey(t testing.TB, c elliptic.Curve) *ecdsa.PublicKey {
	key, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatalf("GenerateKey = %v", err)
	}
	return &key.PublicKey
}

func TestCertificates(t *testing.T) {
	ca := newIssuer(t)
	edKey, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatalf("GenerateKey = %v", err)
	}
	type change = func(*x509.Certificate)
	leaf := func(c change) []*x509.Certificate { return []*x509.Certificate{ca.leaf(c)} }
	below, stale := ca.intermediate(nil), ca.intermediate(func(c *x509.Certificate) { c.NotAfter = start.Add(-time.Second) })
	notCA := ca.intermediate(func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature })
	serverOnly := ca.intermediate(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
	padded := func(n int) []*x509.Certificate {
		return append(leaf(nil), slices.Repeat([]*x509.Certificate{below.cert}, n-1)...)
	}
	for what, row := range map[string]struct {
		certs []*x509.Certificate
		ok    bool
	}{
		"plain":                {leaf(nil), true},
		"no extended usage":    {leaf(func(c *x509.Certificate) { c.ExtKeyUsage = nil }), true},
		"only client usage":    {leaf(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }), true},
		"with a DNS name":      {leaf(func(c *x509.Certificate) { c.DNSNames = []string{"a.example.org"} }), true},
		"longest ID":           {leaf(names(sized(attest.MaxID))), true},
		"P-384":                {leaf(key(curveKey(t, elliptic.P384()))), true},
		"Ed25519":              {leaf(key(edKey)), true},
		"RSA 2048":             {leaf(key(rsaKey(2048))), true},
		"RSA 4096":             {leaf(key(rsaKey(4096))), true},
		"intermediate":         {[]*x509.Certificate{below.leaf(nil), below.cert}, true},
		"eight certificates":   {padded(8), true},
		"starts now":           {leaf(func(c *x509.Certificate) { c.NotBefore = start }), true},
		"ends in a second":     {leaf(func(c *x509.Certificate) { c.NotAfter = start.Add(time.Second) }), true},
		"nine certificates":    {padded(9), false},
		"no URI":               {leaf(func(c *x509.Certificate) { c.URIs = nil }), false},
		"only a DNS name":      {leaf(func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"a.example.org"} }), false},
		"two SPIFFE IDs":       {leaf(names("spiffe://example.org/a", "spiffe://example.org/b")), false},
		"the same ID twice":    {leaf(names("spiffe://example.org/a", "spiffe://example.org/a")), false},
		"another URI":          {leaf(names("spiffe://example.org/a", "https://example.org/a")), false},
		"no path":              {leaf(names("spiffe://example.org")), false},
		"upper-case scheme":    {leaf(names("SPIFFE://example.org/a")), false},
		"empty fragment":       {leaf(names("spiffe://example.org/a#")), false},
		"query":                {leaf(names("spiffe://example.org/a?b")), false},
		"upper-case domain":    {leaf(names("spiffe://Example.org/a")), false},
		"an address":           {leaf(names("spiffe://1.2.3.4/a")), false},
		"foreign domain":       {leaf(names("spiffe://example.com/a")), false},
		"longer ID":            {leaf(names(sized(attest.MaxID + 1))), false},
		"longer domain":        {leaf(names("spiffe://" + strings.Repeat("a", 256) + "/a")), false},
		"authority":            {leaf(func(c *x509.Certificate) { c.IsCA = true }), false},
		"signs certificates":   {leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), false},
		"signs CRLs":           {leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }), false},
		"signs nothing":        {leaf(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), false},
		"no usage":             {leaf(func(c *x509.Certificate) { c.KeyUsage = 0 }), false},
		"only server usage":    {leaf(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }), false},
		"not yet valid":        {leaf(func(c *x509.Certificate) { c.NotBefore = start.Add(time.Second) }), false},
		"ends now":             {leaf(func(c *x509.Certificate) { c.NotAfter = start }), false},
		"P-224":                {leaf(key(curveKey(t, elliptic.P224()))), false},
		"RSA 2047":             {leaf(key(rsaKey(2047))), false},
		"RSA 4097":             {leaf(key(rsaKey(4097))), false},
		"another authority":    {[]*x509.Certificate{newIssuer(t).leaf(nil)}, false},
		"missing link":         {[]*x509.Certificate{below.leaf(nil)}, false},
		"stale intermediate":   {[]*x509.Certificate{stale.leaf(nil), stale.cert}, false},
		"leaf as an issuer":    {[]*x509.Certificate{notCA.leaf(nil), notCA.cert}, false},
		"intermediate's usage": {[]*x509.Certificate{serverOnly.leaf(nil), serverOnly.cert}, false},
		"the root itself":      {[]*x509.Certificate{ca.cert}, false},
	} {
		c := &clock{start}
		a := newAttestor(t, attest.Config{TrustDomains: []string{"example.org"}, Source: ca.source(), Now: c.now})
		for range 2 {
			caller, err := a.Identify(request(row.certs))
			if !row.ok {
				refused(t, what, err, broker.Unauthenticated)
			} else if err != nil || caller.ID.TrustDomain().Name() != "example.org" {
				t.Errorf("%s: Identify = %v, %v, want accepted", what, caller.ID, err)
			}
		}
	}
}

// TestIntermediateEndsFirst lets the intermediate of a cached caller expire.
func TestIntermediateEndsFirst(t *testing.T) {
	ca, c := newIssuer(t), &clock{start}
	short := ca.intermediate(func(c *x509.Certificate) { c.NotAfter = start.Add(time.Minute) })
	a := newAttestor(t, attest.Config{TrustDomains: []string{"example.org"}, Source: ca.source(), Now: c.now})
	r := request([]*x509.Certificate{short.leaf(nil), short.cert})
	if _, err := a.Identify(r); err != nil {
		t.Fatalf("Identify = %v, want accepted", err)
	}
	c.advance(time.Minute + time.Second)
	_, err := a.Identify(r)
	refused(t, "expired intermediate", err, broker.Unauthenticated)
}
