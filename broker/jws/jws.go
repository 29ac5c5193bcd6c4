// Package jws opens the signed tokens of other parties: one compact form, one type, and one algorithm for each key.
package jws

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/pawlsec/pawl/broker"
)

// Limits of a token, in bytes.
const (
	MaxToken = 16 << 10
	MaxID    = 256 // of a kid or a jti
)

// header lists the only members that a token's protected header may have. Others, such as jwk, x5c and crit, are
// unknown members and refused.
type header struct {
	Alg string `json:"alg"`
	Kid string `json:"kid"`
	Typ string `json:"typ"`
}

// Token is a decoded compact JWS. Nothing in it is authenticated before SignedBy.
type Token struct {
	Kid     string // of the key that the token names
	Payload []byte

	alg, text string
}

// Open decodes a token of a type, and checks its form.
func Open(token []byte, typ string) (t Token, err error) {
	if len(token) > MaxToken {
		return t, fmt.Errorf("the token is longer than %d bytes", MaxToken)
	}
	parts := bytes.Split(token, []byte("."))
	if len(parts) != 3 {
		return t, errors.New("the token is not a compact JWS")
	}
	var plain [3][]byte
	for i, part := range parts {
		if plain[i], err = broker.DecodeBase64URL(string(part)); err != nil {
			return t, errors.New("the token is not base64url")
		}
	}
	var h header
	if err := json.Unmarshal(plain[0], &h, json.RejectUnknownMembers(true)); err != nil {
		return t, errors.New("the token's header must be a JSON object with alg, kid and typ alone")
	}
	if h.Typ != typ {
		return t, fmt.Errorf("the token's typ is not %s", typ)
	}
	return Token{Kid: h.Kid, Payload: plain[1], alg: h.Alg, text: string(token)}, nil
}

// SignedBy reports whether the key signed the token, with the key's own algorithm.
func (t Token) SignedBy(k jose.JSONWebKey) bool {
	if t.alg != k.Algorithm {
		return false
	}
	signed, err := jose.ParseSignedCompact(t.text, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(k.Algorithm)})
	if err != nil {
		return false
	}
	_, err = signed.Verify(k)
	return err == nil
}

// Audience is an aud claim: one string, or a list of them.
type Audience []string

// UnmarshalJSON decodes both forms.
func (a *Audience) UnmarshalJSON(raw []byte) error {
	if jsontext.Value(raw).Kind() != jsontext.KindString {
		return json.Unmarshal(raw, (*[]string)(a))
	}
	*a = Audience{""}
	return json.Unmarshal(raw, &(*a)[0])
}
