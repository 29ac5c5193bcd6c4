package wire

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/audit"
	"github.com/pawlsec/pawl/broker/jws"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/broker/server"
	"github.com/pawlsec/pawl/broker/signals"
)

// Signal is a transmitter of security events that the broker acts on, and the action.
type Signal struct {
	Issuer   string `yaml:"issuer"`   // the iss claim of its tokens, compared exactly; required
	Audience string `yaml:"audience"` // the aud claim of tokens for this broker, compared exactly; required
	Keys     string `yaml:"keys"`     // file of the JWK set with its public keys; required
	Action   string `yaml:"action"`   // revoke or freeze the subject of an event; required
	// its names for its subjects, each with the selector for it; every other subject must be a SPIFFE ID
	Subjects map[string]string `yaml:"subjects"`
	// label of local chains that has the id of the sender's chain they continue: an event about that chain ends
	// them; empty: such events are refused
	ChainLabel string `yaml:"chain_label"`
}

func (s Signal) check(name string) error {
	var wrong []error
	for field, value := range map[string]string{"issuer": s.Issuer, "audience": s.Audience, "keys": s.Keys} {
		if value == "" {
			wrong = append(wrong, fmt.Errorf("%s.%s is required", name, field))
		}
	}
	if s.Action != "revoke" && s.Action != "freeze" {
		wrong = append(wrong, fmt.Errorf("%s.action is %q; it is revoke or freeze", name, s.Action))
	}
	if s.ChainLabel != "" {
		if _, err := selector.Parse("label." + s.ChainLabel + ":x"); err != nil {
			wrong = append(wrong, fmt.Errorf("%s.chain_label: %w", name, err))
		}
	}
	for subject, sel := range s.Subjects {
		if _, err := selector.Parse(sel); err != nil {
			wrong = append(wrong, fmt.Errorf("%s.subjects.%s: %w", name, subject, err))
		}
	}
	return errors.Join(wrong...)
}

// signingKey reads the configured signing key.
func signingKey(c Config) (jose.JSONWebKey, error) {
	raw, err := os.ReadFile(c.SigningKey)
	if err != nil {
		return jose.JSONWebKey{}, fmt.Errorf("signing_key: %w", err)
	}
	key, err := policy.ParseKey(raw)
	clear(raw)
	if err != nil {
		return jose.JSONWebKey{}, fmt.Errorf("signing_key %q: %w", c.SigningKey, err)
	}
	return key, nil
}

// LoadSigner makes a signer with the configured signing key; nil without a key.
func LoadSigner(c Config) (*audit.Signer, error) {
	if c.SigningKey == "" {
		return nil, nil
	}
	key, err := signingKey(c)
	if err != nil {
		return nil, err
	}
	signer, err := audit.NewSigner(c.TrustDomains[0]+"/pawl", key)
	if err != nil {
		return nil, fmt.Errorf("signing_key %q: %w", c.SigningKey, err)
	}
	return signer, nil
}

// signSegment signs the segments of the archive with the configured key; nil without a key.
func (s *Server) signSegment() func(string, []byte) ([]byte, error) {
	if s.signer == nil {
		return nil
	}
	return func(_ string, manifest []byte) ([]byte, error) { return s.signer.SignAs(segmentType, manifest) }
}

// segmentType is the type of a signature of a segment.
const segmentType = "pawl-segment+json"

// notary makes the notary that signs with the configured key; nil without a key: the server then refuses
// requests for signatures.
func (s *Server) notary() (server.Notary, error) {
	if s.signer == nil {
		return nil, nil
	}
	c := audit.NotaryConfig{Source: s.Broker, Entries: s.Broker.Entries, Signer: s.signer, Now: time.Now}
	if s.archive != nil {
		c.Archived = s.archive.Tree
	}
	return audit.NewNotary(c)
}

// LoadTransmitters reads the configured transmitters' keys.
func LoadTransmitters(c Config) (list []signals.Transmitter, err error) {
	for _, from := range c.Signals {
		raw, err := os.ReadFile(from.Keys)
		if err != nil {
			return nil, fmt.Errorf("signals: keys of %s: %w", from.Issuer, err)
		}
		t := signals.Transmitter{Issuer: from.Issuer, Audience: from.Audience, Freeze: from.Action == "freeze",
			ChainLabel: from.ChainLabel, Subjects: map[string]selector.Selector{}}
		if t.Keys, err = jws.ParseKeys(raw); err != nil {
			return nil, fmt.Errorf("signals: keys of %s in %q: %w", from.Issuer, from.Keys, err)
		}
		for subject, text := range from.Subjects {
			if t.Subjects[subject], err = selector.Parse(text); err != nil {
				return nil, fmt.Errorf("signals: subject %q of %s: %w", subject, from.Issuer, err)
			}
		}
		list = append(list, t)
	}
	return list, nil
}

// receiver makes the handler of pushed security events; nil without transmitters.
func (s *Server) receiver(ctx context.Context, c Config, log *slog.Logger) (http.Handler, error) {
	transmitters, err := LoadTransmitters(c)
	if err != nil || len(transmitters) == 0 {
		return nil, err
	}
	var before []broker.Revocation
	err = broker.EachRecentPage(func(p broker.Page) (string, error) {
		list, next, err := s.Broker.Revocations(ctx, p)
		before = append(before, list...)
		return next, err
	})
	if err != nil {
		return nil, err
	}
	return signals.New(signals.Config{Before: before, Transmitters: transmitters, Revoke: s.Broker.Revoke,
		Domains: c.TrustDomains, Now: time.Now, Log: log})
}
