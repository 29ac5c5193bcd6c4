package jws

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/go-jose/go-jose/v4"
)

// ParseKeys parses the JWK set of another party. Every key must be public, have a unique kid and one algorithm: its alg,
// or the default of its type. Keys for other uses are skipped.
func ParseKeys(raw []byte) ([]jose.JSONWebKey, error) {
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(raw, &set); err != nil {
		return nil, errors.New("not a JWK set")
	}
	var keys []jose.JSONWebKey
	seen := map[string]bool{}
	for i, k := range set.Keys {
		if k.Use != "" && k.Use != "sig" {
			continue
		}
		alg, err := Algorithm(k)
		if err != nil {
			return nil, fmt.Errorf("key %d: %w", i+1, err)
		}
		if k.KeyID == "" || len(k.KeyID) > MaxID || seen[k.KeyID] {
			return nil, fmt.Errorf("key %d has no unique kid", i+1)
		}
		seen[k.KeyID] = true
		keys = append(keys, jose.JSONWebKey{Key: k.Key, KeyID: k.KeyID, Algorithm: string(alg), Use: "sig"})
	}
	if len(keys) == 0 {
		return nil, errors.New("the set has no signing key")
	}
	return keys, nil
}

// Algorithm binds a key to one algorithm. go-jose accepts any algorithm that the token names.
func Algorithm(k jose.JSONWebKey) (jose.SignatureAlgorithm, error) {
	if !k.Valid() {
		return "", errors.New("not a valid key")
	}
	var can []jose.SignatureAlgorithm // the first is the default for a key without an alg
	switch key := k.Key.(type) {
	case ed25519.PublicKey:
		can = []jose.SignatureAlgorithm{jose.EdDSA}
	case *ecdsa.PublicKey:
		can = map[int][]jose.SignatureAlgorithm{256: {jose.ES256}, 384: {jose.ES384}}[key.Curve.Params().BitSize]
	case *rsa.PublicKey:
		if key.N.BitLen() >= 2048 {
			can = []jose.SignatureAlgorithm{jose.RS256, jose.PS256}
		}
	}
	if len(can) == 0 {
		return "", errors.New("must be a public key: Ed25519, ECDSA over P-256 or P-384, or RSA of 2048 bits and more")
	}
	if k.Algorithm == "" {
		return can[0], nil
	}
	if alg := jose.SignatureAlgorithm(k.Algorithm); slices.Contains(can, alg) {
		return alg, nil
	}
	return "", fmt.Errorf("the alg %.20q is not supported for this type of key", k.Algorithm)
}
