package signals

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/pawlsec/pawl/broker/jws"
)

// Limits of a token.
const (
	MaxToken = jws.MaxToken
	MaxAge   = 5 * time.Minute  // since the token was issued
	MaxSkew  = 30 * time.Second // how far a transmitter's clock may be ahead of ours
	maxID    = jws.MaxID        // bytes of a jti or subject's name
)

// tokenType is the only typ of a token, RFC 8417 section 2.3.
const tokenType = "secevent+jwt"

// The known events.
const (
	sessionRevoked   = "https://schemas.openid.net/secevent/caep/event-type/session-revoked"
	credentialChange = "https://schemas.openid.net/secevent/caep/event-type/credential-change"
)

// claims lists the claims that are read. Others are ignored.
type claims struct {
	Issuer   string                    `json:"iss"`
	ID       string                    `json:"jti"`
	Issued   *int64                    `json:"iat"`
	Expires  *int64                    `json:"exp"`
	Audience jws.Audience              `json:"aud"`
	Subject  subject                   `json:"sub_id"`
	Events   map[string]jsontext.Value `json:"events"`
}

// subject is a subject identifier of RFC 9493, or the complex one of the Shared Signals Framework.
type subject struct {
	Format  string   `json:"format"`
	Issuer  string   `json:"iss"`
	Subject string   `json:"sub"`
	URI     string   `json:"uri"`
	ID      string   `json:"id"`
	Session *subject `json:"session"` // of a complex one, with more members such as its user
}

// event has the members that are read of a known event.
type event struct {
	Change string `json:"change_type"` // of credential-change
}

// opened is a decoded token. Nothing in it is authenticated yet.
type opened struct {
	jws.Token
	claims claims
}

// open decodes a token and checks its form.
func open(token []byte) (o opened, err error) {
	if o.Token, err = jws.Open(token, tokenType); err != nil {
		return o, err
	}
	if err := json.Unmarshal(o.Payload, &o.claims); err != nil {
		return o, errors.New("the token's claims cannot be decoded")
	}
	return o, nil
}

// checkTime refuses a token that is too old, from the future, or expired.
func (c claims) checkTime(now time.Time) error {
	if c.Issued == nil {
		return errors.New("the token has no iat")
	}
	age := now.Sub(time.Unix(*c.Issued, 0))
	switch {
	case *c.Issued < 0 || age > MaxAge:
		return fmt.Errorf("the token is older than %s", MaxAge)
	case age < -MaxSkew:
		return errors.New("the token is from the future")
	case c.Expires != nil && now.Unix() >= *c.Expires:
		return errors.New("the token has expired")
	}
	return nil
}

// effect returns the one event, and whether it causes a revocation.
func (c claims) effect() (name string, effective bool, err error) {
	if len(c.Events) != 1 {
		return "", false, fmt.Errorf("the token has %d events; exactly one is required", len(c.Events))
	}
	for uri, raw := range c.Events {
		var e event
		if err := json.Unmarshal(raw, &e); err != nil || raw.Kind() != jsontext.KindBeginObject {
			return "", false, errors.New("the event cannot be decoded")
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
	return "", false, errors.New("the event is not known here")
}

// name returns the transmitter's name for the subject.
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
		return "", errors.New("the subject does not match its format")
	}
	return name, nil
}

// session returns the transmitter's name for the session of a complex subject, or empty text for other subjects.
func (s subject) session() string {
	if s.Format != "complex" || s.Session == nil || s.Session.Format != "opaque" || *s.Session != (subject{Format: "opaque", ID: s.Session.ID}) {
		return ""
	}
	return s.Session.ID
}
