package policy

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/go-jose/go-jose/v4"
	jsonx "github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// GenerateKey generates a platform key pair (Ed25519) from random, normally crypto/rand.Reader. Both halves carry
// alg, use "sig" and the RFC 7638 thumbprint as kid. The private half is a secret of the platform team; no broker
// needs it.
func GenerateKey(random io.Reader) (private, public jose.JSONWebKey, err error) {
	_, key, err := ed25519.GenerateKey(random)
	if err != nil {
		return private, public, fmt.Errorf("generating key: %w", err)
	}
	private = jose.JSONWebKey{Key: key, Algorithm: string(jose.EdDSA), Use: "sig"}
	if private.KeyID, err = thumbprint(private); err != nil {
		return private, public, err
	}
	return private, private.Public(), nil
}

// ParseKey parses one JWK: Ed25519, or ECDSA over P-256. It refuses an alg, use or kid that contradicts the key, and
// fills in missing ones. The kid is always the thumbprint. Errors contain no part of the key.
func ParseKey(raw []byte) (jose.JSONWebKey, error) {
	var k jose.JSONWebKey
	if !jsontext.Value(raw).IsValid() { // no repeated names, no trailing data
		return k, errors.New("key is not one JSON object")
	}
	if err := json.Unmarshal(raw, &k); err != nil {
		return k, errors.New("key is not a JWK")
	}
	return bind(k)
}

// ParseKeySet parses a JWK set of public keys, {"keys":[…]}, each by the rules of [ParseKey].
func ParseKeySet(raw []byte) ([]jose.JSONWebKey, error) {
	var set struct {
		Keys []jsontext.Value `json:"keys"`
	}
	if err := jsonx.Unmarshal(raw, &set, jsonx.RejectUnknownMembers(true)); err != nil {
		return nil, errors.New("not a JWK set")
	}
	keys := make([]jose.JSONWebKey, 0, len(set.Keys))
	for i, one := range set.Keys {
		k, err := ParseKey(one)
		if err != nil {
			return nil, fmt.Errorf("key %d: %w", i+1, err)
		}
		if !k.IsPublic() {
			return nil, fmt.Errorf("key %d is private; a trust set holds public keys only", i+1)
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// bind ties a key to its one algorithm. go-jose accepts every algorithm that the key type can do.
func bind(k jose.JSONWebKey) (jose.JSONWebKey, error) {
	alg, err := algorithm(k)
	if err != nil {
		return k, err
	}
	if k.Algorithm != "" && k.Algorithm != string(alg) {
		return k, fmt.Errorf("key's alg %.20q is not %s", k.Algorithm, alg)
	}
	if k.Use != "" && k.Use != "sig" {
		return k, fmt.Errorf("key's use %.20q is not sig", k.Use)
	}
	kid, err := thumbprint(k)
	if err != nil {
		return k, err
	}
	if k.KeyID != "" && k.KeyID != kid {
		return k, errors.New("key's kid is not its thumbprint")
	}
	return jose.JSONWebKey{Key: k.Key, KeyID: kid, Algorithm: string(alg), Use: "sig"}, nil
}

func algorithm(k jose.JSONWebKey) (jose.SignatureAlgorithm, error) {
	if !k.Valid() {
		return "", errors.New("key is not valid")
	}
	var curve elliptic.Curve
	switch key := k.Key.(type) {
	case ed25519.PrivateKey, ed25519.PublicKey:
		return jose.EdDSA, nil
	case *ecdsa.PrivateKey:
		curve = key.Curve
	case *ecdsa.PublicKey:
		curve = key.Curve
	}
	if curve != elliptic.P256() {
		return "", errors.New("key must be Ed25519 or ECDSA over P-256")
	}
	return jose.ES256, nil
}

// thumbprint returns the RFC 7638 SHA-256 thumbprint of the public half.
func thumbprint(k jose.JSONWebKey) (string, error) {
	sum, err := k.Thumbprint(crypto.SHA256)
	if err != nil {
		return "", fmt.Errorf("key thumbprint: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(sum), nil
}
