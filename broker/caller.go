package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Proof says how a caller proved its identity.
type Proof string

// The proofs. An empty Proof is none, and refused.
const (
	ProofX509 Proof = "x509-svid" // mutual TLS: bound to the connection's key
	ProofJWT  Proof = "jwt-svid"  // bearer: whoever holds it is the caller until it expires
)

// Caller is an authenticated SPIFFE ID. Only attest makes one, and the broker's test of itself; the zero Caller is refused by
// every procedure.
type Caller struct {
	ID       spiffeid.ID
	Proof    Proof
	NotAfter time.Time // end of the SVID: nothing issued to the caller lives longer
	Key      [32]byte  // SHA-256 of the public key (X.509-SVID) or of header.payload (JWT-SVID)
}

// authentic refuses the zero Caller and one whose SVID is over.
func (c Caller) Check(op string, now time.Time) error {
	if c.ID.IsZero() || c.Proof == "" {
		return Errorf(Unauthenticated, op, "no identity")
	}
	if !now.Before(c.NotAfter) {
		return Errorf(Unauthenticated, op, "the identity document is past its end").With(CodeExpired)
	}
	return nil
}
