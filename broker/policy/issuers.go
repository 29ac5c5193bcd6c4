package policy

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/pawlsec/pawl/broker/envelope"
	"github.com/pawlsec/pawl/broker/jws"
)

const (
	maxIssuers    = 64 // of a bundle
	maxIssuerKeys = 16
)

// issuerDecl is an issuer of envelopes, in issuers.yaml and in a payload.
type issuerDecl struct {
	Issuer   string    `yaml:"iss" json:"iss"`
	Audience string    `yaml:"audience" json:"audience"`
	MaxAge   string    `yaml:"max_age" json:"max_age,omitempty"`
	Keys     []jwkDecl `yaml:"keys" json:"keys"`
}

// jwkDecl is a public key. The members of private and of symmetric keys are unknown here, and refused.
type jwkDecl struct {
	Kty string `yaml:"kty" json:"kty"`
	Kid string `yaml:"kid" json:"kid"`
	Alg string `yaml:"alg" json:"alg,omitempty"` // empty: the default of the type of key
	Crv string `yaml:"crv" json:"crv,omitempty"`
	X   string `yaml:"x" json:"x,omitempty"`
	Y   string `yaml:"y" json:"y,omitempty"`
	N   string `yaml:"n" json:"n,omitempty"`
	E   string `yaml:"e" json:"e,omitempty"`
}

// issuer checks the declaration.
func (d issuerDecl) issuer() (i envelope.Issuer, err error) {
	i = envelope.Issuer{Name: d.Issuer, Audience: d.Audience}
	if d.MaxAge != "" {
		if i.MaxAge, err = time.ParseDuration(d.MaxAge); err != nil || i.MaxAge <= 0 {
			return i, fmt.Errorf("max_age %.20q is not a duration like 10m", d.MaxAge)
		}
	}
	if len(d.Keys) > maxIssuerKeys {
		return i, fmt.Errorf("more than %d keys", maxIssuerKeys)
	}
	set, err := json.Marshal(struct {
		Keys []jwkDecl `json:"keys"`
	}{d.Keys})
	if err != nil {
		return i, err
	}
	if i.Keys, err = jws.ParseKeys(set); err != nil {
		return i, fmt.Errorf("keys: %w", err)
	}
	_, err = envelope.New(i)
	return i, err
}
