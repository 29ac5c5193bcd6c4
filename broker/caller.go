package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Proof is how a caller proved its identity.
type Proof string

// The proofs. The empty Proof is none, and is refused.
const (
	ProofX509 Proof = "x509-svid" // mutual TLS: bound to the connection's key
	ProofJWT  Proof = "jwt-svid"  // bearer: every holder of the token is the caller until it expires
)

// Caller is an authenticated SPIFFE ID. Only attest and the broker's self-test make one. Every procedure refuses the
// zero Caller.
type Caller struct {
	ID       spiffeid.ID
	Proof    Proof
	NotAfter time.Time // expiry of the SVID: nothing issued to the caller lives longer
	Key      [32]byte  // SHA-256 of the public key (X.509-SVID) or of header.payload (JWT-SVID)
}

// Check refuses the zero Caller, and a Caller with an expired SVID.
func (c Caller) Check(op string, now time.Time) error {
	if c.ID.IsZero() || c.Proof == "" {
		return Errorf(Unauthenticated, op, "no identity")
	}
	if !now.Before(c.NotAfter) {
		return Errorf(Unauthenticated, op, "the identity document has expired").With(CodeExpired)
	}
	return nil
}
