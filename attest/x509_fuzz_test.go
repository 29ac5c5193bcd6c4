package attest_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"testing"
	"time"

	"github.com/pawlsec/pawl/attest"
)

// FuzzURINames checks that uriNames and the standard library find the same URIs in a certificate. A difference between
// the two would allow impersonation.
func FuzzURINames(f *testing.F) {
	uri := func(s string) []byte { return append([]byte{0x86, byte(len(s))}, s...) }
	seq := func(names ...[]byte) []byte {
		var all []byte
		for _, n := range names {
			all = append(all, n...)
		}
		return append([]byte{0x30, byte(len(all))}, all...)
	}
	f.Add(seq(uri("spiffe://example.org/a")))
	f.Add(seq(uri("spiffe://example.org/a"), uri("spiffe://example.org/b")))
	f.Add(seq([]byte{0x82, 1, 'a'}, uri("spiffe://example.org/%41")))
	f.Add(append(seq(uri("spiffe://example.org/a")), 0))
	f.Add([]byte{0x30, 0x81, 0x02, 0x86, 0x00})
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, san []byte) {
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1, 0),
			ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: san}}}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			return
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return
		}
		names, err := attest.URINames(cert)
		if err != nil {
			return
		}
		if len(names) != len(cert.URIs) {
			t.Fatalf("URINames(%x) = %q, the standard library finds %v", san, names, cert.URIs)
		}
		for i, name := range names {
			id, err := attest.ParseID(name)
			if err == nil && id.String() != cert.URIs[i].String() {
				t.Errorf("URINames(%x) = %q, an identity that the standard library reads as %q", san, name, cert.URIs[i])
			}
		}
	})
}
