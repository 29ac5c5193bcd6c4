package pki

import "crypto/x509"

// RefOf returns the name of a certificate with this serial number, issued by the authority.
func RefOf(serial string, by *x509.Certificate) string { return refOf(serial, authorityOf(by)) }
