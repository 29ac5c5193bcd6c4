package pki

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"strings"
)

// authority identifies a certificate authority as relying parties do: by its key id and its name. A revocation list
// proves something about the certificates of its own authority only. An authority that was renewed on the same key
// under the same name is the same authority. The zero value is an unknown authority.
type authority struct {
	key  string // the key id in hex; empty: the certificate or list has none, and nothing can be compared with it
	name string // digest of the name in DER, in hex
}

func (a authority) known() bool { return a.key != "" }

// issuerOf returns the authority that issued a certificate.
func issuerOf(cert *x509.Certificate) authority {
	return authority{hex.EncodeToString(cert.AuthorityKeyId), digestName(cert.RawIssuer)}
}

// authorityOf returns the authority to which a certificate belongs.
func authorityOf(cert *x509.Certificate) authority {
	return authority{hex.EncodeToString(cert.SubjectKeyId), digestName(cert.RawSubject)}
}

func digestName(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:16])
}

// by joins the serial number and the authority in the name that a grant has for its certificate.
const by = " by "

// resumed ends the name of a certificate if servers resume its sessions although it is on their list.
const resumed = " resumed"

// asks ends the name of a certificate, before resumed, if its servers ask the OCSP responder.
const asks = " asks"

// refOf returns a grant's name for a certificate: the serial number, and the authority that issued it.
func refOf(serial string, a authority) string { return serial + by + a.key + "/" + a.name }

// asksFor reports whether the servers that accept a certificate ask the OCSP responder about it.
func asksFor(ref string) bool { return strings.HasSuffix(strings.TrimSuffix(ref, resumed), asks) }

// parseRef splits the name of a certificate, without the endings. Grants of an earlier version have the serial
// number alone: their authority is unknown.
func parseRef(ref string) (serial string, a authority) {
	serial, rest, _ := strings.Cut(strings.TrimSuffix(strings.TrimSuffix(ref, resumed), asks), by)
	a.key, a.name, _ = strings.Cut(rest, "/")
	return serial, a
}
