package attest

import (
	"crypto/tls"
	"errors"
	"fmt"
)

const (
	tls12 = tls.VersionTLS12
	tls13 = tls.VersionTLS13
)

// ServerTLS returns the configuration for a listener. It presents our current X.509-SVID for every server name, checks
// client certificates like Identify, and issues no session tickets. A client certificate is optional if JWT-SVIDs are
// accepted.
func (a *Attestor) ServerTLS() *tls.Config {
	auth := tls.RequireAnyClientCert
	if a.config.JWT != nil {
		auth = tls.RequestClientCert
	}
	return &tls.Config{
		MinVersion: a.config.MinTLS,
		NextProtos: []string{"h2", "http/1.1"},
		ClientAuth: auth,
		// A resumed session would be accepted even after its authority has left the bundle.
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return a.ownCertificate() },
		// VerifyConnection runs on resumed connections too; VerifyPeerCertificate does not.
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil // ClientAuth has permitted it
			}
			_, err := a.certificate(cs.PeerCertificates)
			return err
		},
	}
}

// ownCertificate returns our current SVID. It does not present an expired one, because clients would report a less
// clear error.
func (a *Attestor) ownCertificate() (*tls.Certificate, error) {
	svid, err := a.config.Source.GetX509SVID()
	if err != nil {
		return nil, fmt.Errorf("attest: getting our own SVID: %w", err)
	}
	leaf := svid.Certificates[0]
	if !a.config.Now().Before(leaf.NotAfter) {
		return nil, errors.New("attest: our own SVID has expired")
	}
	cert := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: leaf}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert, nil
}
