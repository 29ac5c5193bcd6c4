package signals

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Limits of a token.
const (
	MaxToken = 16 << 10         // bytes
	MaxAge   = 5 * time.Minute  // since it was issued
	MaxSkew  = 30 * time.Second // that a transmitter's clock may be ahead of ours
	maxID    = 256              // bytes of a jti, kid or subject's name
)

// tokenType is the one typ of a token, RFC 8417 section 2.3.
const tokenType = "secevent+jwt"

// The events that something may follow from.
const (
	sessionRevoked   = "https://schemas.openid.net/secevent/caep/event-type/session-revoked"
	credentialChange = "https://schemas.openid.net/secevent/caep/event-type/credential-change"
)

// header is all that a token's protected header may say; jwk, x5c, crit and the like are unknown
// members and refused.
type header struct {
	Alg string `json:"alg"`
	Kid string `json:"kid"`
	Typ string `json:"typ"`
}

// claims are what is read of a token; others are passed over.
type claims struct {
	Issuer   string                    `json:"iss"`
	ID       string                    `json:"jti"`
	Issued   *int64                    `json:"iat"`
	Expires  *int64                    `json:"exp"`
	Audience audience                  `json:"aud"`
	Subject  subject                   `json:"sub_id"`
	Events   map[string]jsontext.Value `json:"events"`
}

// audience is one text or a list of them.
type audience []string

// UnmarshalJSON reads both forms.
func (a *audience) UnmarshalJSON(raw []byte) error {
	if jsontext.Value(raw).Kind() != jsontext.KindString {
		return json.Unmarshal(raw, (*[]string)(a))
	}
	*a = audience{""}
	return json.Unmarshal(raw, &(*a)[0])
}

// subject is a subject identifier of RFC 9493, or the complex one of the Shared Signals Framework.
type subject struct {
	Format  string   `json:"format"`
	Issuer  string   `json:"iss"`
	Subject string   `json:"sub"`
	URI     string   `json:"uri"`
	ID      string   `json:"id"`
	Session *subject `json:"session"` // of a complex one, which says more: the user it is of, for one
}

// event is what is read of the events that are known.
type event struct {
	Change string `json:"change_type"` // of credential-change
}

// opened is a compact JWS taken apart; nothing of it is believed yet.
type opened struct {
	token  string
	header header
	claims claims
}

// open reads a token's form.
func open(token []byte) (o opened, err error) {
	if len(token) > MaxToken {
		return o, fmt.Errorf("the token takes more than %d bytes", MaxToken)
	}
	parts := bytes.Split(token, []byte("."))
	if len(parts) != 3 {
		return o, errors.New("the token is no compact JWS")
	}
	var plain [3][]byte
	for i, part := range parts {
		if plain[i], err = base64.RawURLEncoding.Strict().AppendDecode(nil, part); err != nil || bytes.ContainsAny(part, "\r\n") {
			return o, errors.New("the token is not base64url")
		}
	}
	if err := json.Unmarshal(plain[0], &o.header, json.RejectUnknownMembers(true)); err != nil {
		return o, errors.New("the token's header has more than alg, kid and typ, or is no JSON object")
	}
	if o.header.Typ != tokenType {
		return o, fmt.Errorf("the token's typ is not %s", tokenType)
	}
	if err := json.Unmarshal(plain[1], &o.claims); err != nil {
		return o, errors.New("the token's claims cannot be read")
	}
	o.token = string(token)
	return o, nil
}

// signedBy reports whether the key signed the token, with the key's own algorithm.
func (o opened) signedBy(k jose.JSONWebKey) bool {
	alg := jose.SignatureAlgorithm(k.Algorithm)
	if o.header.Alg != k.Algorithm {
		return false
	}
	jws, err := jose.ParseSignedCompact(o.token, []jose.SignatureAlgorithm{alg})
	if err != nil {
		return false
	}
	_, err = jws.Verify(k)
	return err == nil
}

// fresh refuses a token that is too old, of the future, or past an end of its own.
func (c claims) fresh(now time.Time) error {
	if c.Issued == nil {
		return errors.New("the token does not say when it was issued")
	}
	age := now.Sub(time.Unix(*c.Issued, 0))
	switch {
	case *c.Issued < 0 || age > MaxAge:
		return fmt.Errorf("the token is older than %s", MaxAge)
	case age < -MaxSkew:
		return errors.New("the token is of the future")
	case c.Expires != nil && now.Unix() >= *c.Expires:
		return errors.New("the token is past its own end")
	}
	return nil
}

// happened gives the one event, and whether something follows from it.
func (c claims) happened() (name string, follows bool, err error) {
	if len(c.Events) != 1 {
		return "", false, fmt.Errorf("the token has %d events, and one is taken", len(c.Events))
	}
	for uri, raw := range c.Events {
		var e event
		if err := json.Unmarshal(raw, &e); err != nil || raw.Kind() != jsontext.KindBeginObject {
			return "", false, errors.New("the event cannot be read")
		}
		switch uri {
		case sessionRevoked:
			return "session-revoked", true, nil
		case credentialChange:
			if !slices.Contains([]string{"create", "revoke", "update", "delete"}, e.Change) {
				return "", false, errors.New("the event's change_type is not create, revoke, update or delete")
			}
			return "credential-change " + e.Change, e.Change == "revoke" || e.Change == "delete", nil
		}
	}
	return "", false, errors.New("the event is none that is known here")
}

// name is what the subject is called by the transmitter.
func (s subject) name(transmitter string) (string, error) {
	name, only := "", subject{Format: s.Format}
	switch s.Format {
	case "iss_sub":
		name, only.Issuer, only.Subject = s.Subject, s.Issuer, s.Subject
		if s.Issuer != transmitter {
			return "", errors.New("the subject's issuer is not the transmitter")
		}
	case "uri":
		name, only.URI = s.URI, s.URI
	case "opaque":
		name, only.ID = s.ID, s.ID
	default:
		return "", errors.New("the subject's format is not iss_sub, uri, opaque, or complex with an opaque session")
	}
	if name == "" || len(name) > 2048 || s != only {
		return "", errors.New("the subject is not what its format says")
	}
	return name, nil
}

// session is what the transmitter calls the session that a complex subject names; empty for other subjects.
func (s subject) session() string {
	if s.Format != "complex" || s.Session == nil || s.Session.Format != "opaque" || *s.Session != (subject{Format: "opaque", ID: s.Session.ID}) {
		return ""
	}
	return s.Session.ID
}
