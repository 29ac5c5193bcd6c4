package audit

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/go-jose/go-jose/v4"

	"github.com/pawlsec/pawl/broker"
)

// Signer signs reports and checkpoints. Create one with [NewSigner]; it is safe for concurrent use.
type Signer struct {
	name string
	kid  string
	key  ed25519.PrivateKey
}

// NewSigner takes the private Ed25519 key and the name under which the broker signs, such as "example.org/pawl": no
// spaces, no plus sign.
func NewSigner(name string, key jose.JSONWebKey) (*Signer, error) {
	private, ok := key.Key.(ed25519.PrivateKey)
	if !ok || len(private) != ed25519.PrivateKeySize {
		return nil, errors.New("the signing key must be a private Ed25519 key")
	}
	s := &Signer{name: name, key: private}
	if _, err := noteVerifier(name, s.public()); err != nil {
		return nil, fmt.Errorf("%q cannot be the name of a signer: %w", name, err)
	}
	var err error
	s.kid, err = thumbprint(s.public())
	return s, err
}

func (s *Signer) public() ed25519.PublicKey {
	return s.key.Public().(ed25519.PublicKey) // documented for Public
}

// Name returns the name that the signer was created with.
func (s *Signer) Name() string { return s.name }

// thumbprint returns the RFC 7638 SHA-256 thumbprint.
func thumbprint(key ed25519.PublicKey) (string, error) {
	sum, err := (&jose.JSONWebKey{Key: key}).Thumbprint(crypto.SHA256)
	return encode(sum), err
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// header returns the only protected header with which a key signs a JWS of a type.
func header(kid, typ string) string {
	return encode([]byte(`{"alg":"EdDSA","kid":"` + kid + `","typ":"` + typ + `"}`))
}

// jws signs a report in compact form.
func (s *Signer) jws(payload []byte) []byte { return s.compact(ReportType, payload) }

// compact signs in the compact serialisation of RFC 7515 section 7.1.
func (s *Signer) compact(typ string, payload []byte) []byte {
	signed := header(s.kid, typ) + "." + encode(payload)
	return []byte(signed + "." + encode(ed25519.Sign(s.key, []byte(signed))))
}

// SignAs returns a JWS of a type that this package does not use, so that it never passes for a report.
func (s *Signer) SignAs(typ string, payload []byte) ([]byte, error) {
	if typ == ReportType || strings.ContainsFunc(typ, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '"' || r == '\\' }) {
		return nil, fmt.Errorf("the type %q is not allowed", typ)
	}
	return s.compact(typ, payload), nil
}

var (
	// ErrForeign reports another key, or something that this package does not sign.
	ErrForeign = errors.New("it is not signed with this key")
	// ErrChanged reports a difference from the signed content.
	ErrChanged = errors.New("it is not what was signed")
)

// openJWS returns the payload that key signed. The header is compared, never trusted: the key signs with exactly one.
func openJWS(jws []byte, key jose.JSONWebKey) ([]byte, error) {
	public, err := publicKey(key)
	if err != nil {
		return nil, err
	}
	kid, err := thumbprint(public)
	if err != nil {
		return nil, err
	}
	rest, ours := bytes.CutPrefix(jws, []byte(header(kid, ReportType)+"."))
	if !ours {
		return nil, ErrForeign
	}
	body, signature, _ := bytes.Cut(rest, []byte("."))
	payload, errPayload := broker.DecodeBase64URL(string(body))
	sig, errSig := broker.DecodeBase64URL(string(signature))
	signed := jws[:len(jws)-len(signature)-1]
	if errPayload != nil || errSig != nil || len(sig) != ed25519.SignatureSize || !ed25519.Verify(public, signed, sig) {
		return nil, ErrChanged
	}
	return payload, nil
}

// publicKey returns the public half of an Ed25519 key.
func publicKey(key jose.JSONWebKey) (ed25519.PublicKey, error) {
	public, ok := key.Public().Key.(ed25519.PublicKey)
	if !ok || len(public) != ed25519.PublicKeySize {
		return nil, errors.New("the key must be an Ed25519 key")
	}
	return public, nil
}
