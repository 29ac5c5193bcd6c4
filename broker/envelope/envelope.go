// Package envelope verifies the signed statements about a chain: its task, its labels, and on whose behalf it is
// opened. An envelope is a JWT of an issuer that the policy bundle names, for one caller and one broker.
package envelope

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/jws"
)

// Type is the only typ of an envelope. So no other token of an issuer is an envelope.
const Type = "pawl-envelope+jwt"

// Limits of an envelope.
const (
	MaxSkew = 30 * time.Second    // how far an issuer's clock may be ahead of ours
	MaxAge  = 24 * time.Hour      // since it was issued, when its issuer has no other limit
	MaxLife = 30 * 24 * time.Hour // from its iat to its exp
	maxName = 256                 // bytes of a subject's name
)

// Issuer may sign envelopes.
type Issuer struct {
	Name     string            // its iss, compared exactly
	Audience string            // the aud of envelopes for this broker, compared exactly
	Keys     []jose.JSONWebKey // from [jws.ParseKeys]
	MaxAge   time.Duration     // since an envelope was issued; zero: [MaxAge]
}

// Issuers are the issuers of a bundle. The zero Issuers accept no envelope.
type Issuers struct{ byName map[string]known }

type known struct {
	Issuer
	keys map[string]jose.JSONWebKey // by kid
}

// New checks the issuers.
func New(list ...Issuer) (Issuers, error) {
	all := Issuers{map[string]known{}}
	for _, i := range list {
		switch _, taken := all.byName[i.Name]; {
		case i.Name == "" || len(i.Name) > maxName || !broker.PlainText(i.Name) || strings.Contains(i.Name, " "):
			return Issuers{}, fmt.Errorf("iss %.60q must be 1 to %d bytes without spaces", i.Name, maxName)
		case taken:
			return Issuers{}, fmt.Errorf("issuer %.60q is named twice", i.Name)
		case i.Audience == "" || len(i.Audience) > maxName || !broker.PlainText(i.Audience):
			return Issuers{}, fmt.Errorf("issuer %.60q: audience must be 1 to %d bytes", i.Name, maxName)
		case len(i.Keys) == 0:
			return Issuers{}, fmt.Errorf("issuer %.60q has no key", i.Name)
		case i.MaxAge < 0 || i.MaxAge > MaxLife:
			return Issuers{}, fmt.Errorf("issuer %.60q: max_age must be at most %s", i.Name, MaxLife)
		}
		k := known{i, map[string]jose.JSONWebKey{}}
		for _, key := range i.Keys {
			k.keys[key.KeyID] = key
		}
		all.byName[i.Name] = k
	}
	return all, nil
}

// claims lists the only claims that an envelope may have. An unknown one is refused, and so is one that is there twice.
type claims struct {
	Issuer    string            `json:"iss"`
	Audience  jws.Audience      `json:"aud"`
	Subject   string            `json:"sub"`
	ID        string            `json:"jti"`
	Issued    *int64            `json:"iat"`
	Expires   *int64            `json:"exp"`
	NotBefore *int64            `json:"nbf"`
	Task      string            `json:"task"`
	Labels    map[string]string `json:"labels"`
	Behalf    string            `json:"on_behalf_of"`
}

// Verify returns the content of an envelope that one of the issuers signed for the caller, and that is valid now. The
// error says why it is refused, and has no part of the token beyond names of issuers.
func (a Issuers) Verify(token string, caller spiffeid.ID, now time.Time) (e broker.Envelope, err error) {
	t, err := jws.Open([]byte(token), Type)
	if err != nil {
		return e, err
	}
	var c claims
	if err := json.Unmarshal(t.Payload, &c, json.RejectUnknownMembers(true)); err != nil {
		return e, errors.New("the claims must be a JSON object with iss, aud, sub, jti, iat, exp, nbf, task, labels and " +
			"on_behalf_of alone, each at most once")
	}
	from, ok := a.byName[c.Issuer]
	if !ok {
		return e, errors.New("the bundle does not name its issuer")
	}
	// The signature comes before everything else that is said about the content.
	key, ok := from.keys[t.Kid]
	if !ok || !t.SignedBy(key) {
		return e, errors.New("no key of its issuer has signed it")
	}
	if len(c.Audience) != 1 || c.Audience[0] != from.Audience {
		return e, errors.New("its aud is not this broker alone")
	}
	if caller.IsZero() || c.Subject != caller.String() {
		return e, errors.New("it is for another caller: its sub is not your SPIFFE ID")
	}
	if err := c.checkTime(from.MaxAge, now); err != nil {
		return e, err
	}
	if err := c.checkContent(); err != nil {
		return e, err
	}
	sum := sha256.Sum256([]byte(token))
	return broker.Envelope{Issuer: c.Issuer, ID: c.ID, Digest: "sha256:" + hex.EncodeToString(sum[:]), Task: c.Task,
		Labels: c.Labels, Behalf: c.Behalf, Issued: time.Unix(*c.Issued, 0).UTC(),
		Expires: time.Unix(*c.Expires, 0).UTC()}, nil
}

func (c claims) checkTime(maxAge time.Duration, now time.Time) error {
	if c.Issued == nil || c.Expires == nil {
		return errors.New("it has no iat or no exp")
	}
	if maxAge == 0 {
		maxAge = MaxAge
	}
	const latest = int64(1) << 40 // so that no sum of seconds overflows
	if *c.Issued < 0 || *c.Issued > latest || *c.Expires > latest {
		return errors.New("its iat or exp is not a time")
	}
	issued, expires := time.Unix(*c.Issued, 0), time.Unix(*c.Expires, 0)
	switch {
	case !now.Before(expires):
		return errors.New("it has expired")
	case now.Add(MaxSkew).Before(issued), c.NotBefore != nil && now.Add(MaxSkew).Unix() < *c.NotBefore:
		return errors.New("it is from the future")
	case now.Sub(issued) > maxAge:
		return fmt.Errorf("it was issued more than %s ago", maxAge)
	case expires.Sub(issued) > MaxLife:
		return fmt.Errorf("it lives longer than %s", MaxLife)
	}
	return nil
}

func (c claims) checkContent() error {
	if c.ID == "" || len(c.ID) > jws.MaxID || !broker.PlainText(c.ID) {
		return fmt.Errorf("its jti must be 1 to %d bytes", jws.MaxID)
	}
	if len(c.Task) > broker.MaxTask || !broker.PlainText(c.Task) {
		return fmt.Errorf("its task is longer than %d bytes, or has a control character", broker.MaxTask)
	}
	if len(c.Labels) > broker.MaxLabels {
		return fmt.Errorf("it has more than %d labels", broker.MaxLabels)
	}
	for name, value := range c.Labels {
		if args.CheckName(name) != nil || len(value) > broker.MaxLabel || !broker.PlainText(value) {
			return errors.New("a label has no name of lower-case letters, digits and underscores, or a value of more than " +
				"64 bytes or with a control character")
		}
	}
	switch spiffe := len(c.Behalf) >= len("spiffe:") && strings.EqualFold(c.Behalf[:len("spiffe:")], "spiffe:"); {
	case spiffe && !broker.IsSPIFFE(c.Behalf):
		return errors.New("its on_behalf_of is not the SPIFFE ID of a workload")
	case !spiffe && len(c.Behalf) > maxName, !broker.PlainText(c.Behalf), strings.TrimSpace(c.Behalf) != c.Behalf:
		return fmt.Errorf("its on_behalf_of must be at most %d bytes without control characters", maxName)
	}
	return nil
}
