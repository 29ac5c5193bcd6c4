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

// ServerTLS is the configuration for a listener: our current X.509-SVID whatever name the
// client asks for, a client certificate checked like in Identify (optional when JWT-SVIDs are
// accepted), and no session tickets.
func (a *Attestor) ServerTLS() *tls.Config {
	auth := tls.RequireAnyClientCert
	if a.config.JWT != nil {
		auth = tls.RequestClientCert
	}
	return &tls.Config{
		MinVersion: a.config.MinTLS,
		NextProtos: []string{"h2", "http/1.1"},
		ClientAuth: auth,
		// A resumed session would be let in after its authority has left the bundle.
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return a.ownCertificate() },
		// Unlike VerifyPeerCertificate this runs on resumed connections too.
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil // ClientAuth has decided that it may
			}
			_, err := a.certificate(cs.PeerCertificates)
			return err
		},
	}
}

// ownCertificate is our SVID of this moment. One past its end is not shown: clients would
// only report something less clear.
func (a *Attestor) ownCertificate() (*tls.Certificate, error) {
	svid, err := a.config.Source.GetX509SVID()
	if err != nil {
		return nil, fmt.Errorf("attest: getting our own SVID: %w", err)
	}
	leaf := svid.Certificates[0]
	if !a.config.Now().Before(leaf.NotAfter) {
		return nil, errors.New("attest: our own SVID is past its end")
	}
	cert := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: leaf}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert, nil
}
