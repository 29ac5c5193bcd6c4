// Package jwt issues a token for one step, signed by Vault's transit engine. The token has one audience, one subject,
// the digest of the arguments and an expiry.
//
// A verifier that checks only the token accepts it until it expires. One that calls the broker's introspection refuses
// it as soon as it is revoked. One that checks the broker's status list refuses it once it has a new copy of the list.
package jwt

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Reader reads Vault paths with the broker's own rights. The Client of plugins/vault implements it.
type Reader interface {
	// Read returns the data at a path, or nil if there is none.
	Read(ctx context.Context, path broker.VaultPath) (map[string]any, error)
}

// Config configures a [Backend].
type Config struct {
	Vault  Reader           // required; its policy must allow reading <mount>/keys/<key>
	Issuer string           // required: the iss claim, an https URL or a SPIFFE ID
	Now    func() time.Time // zero: time.Now

	// Active is the broker's introspection: it reports whether the token with this id (jti) is still active. Required:
	// a token is proven dead by the answer that a service gets from introspection.
	Active func(context.Context, broker.GrantID) (bool, error)

	// StatusURI is the https URL of the status list (draft-ietf-oauth-status-list) for verifiers. Each token then
	// names it. Empty: there is no status list.
	StatusURI string
	// Sign signs the status list. It returns a JWT with the given typ and payload. Required with StatusURI.
	Sign func(typ string, payload []byte) ([]byte, error)
}

// Backend implements [broker.Backend], [broker.Severer] and [broker.Prover]. Safe for concurrent
// use.
type Backend struct {
	cfg  Config
	list *statusList // nil: there is none

	mu   sync.Mutex // guards keys; never held over the network
	keys map[broker.VaultPath]signingKey
}

// New checks the configuration and returns a Backend.
func New(cfg Config) (*Backend, error) {
	u, err := url.Parse(cfg.Issuer)
	switch {
	case cfg.Vault == nil:
		return nil, errors.New("jwt: Vault is required")
	case cfg.Active == nil:
		return nil, errors.New("jwt: Active is required")
	case err != nil || u.Scheme != "https" && u.Scheme != "spiffe" || u.Host == "":
		return nil, errors.New("jwt: Issuer must be an https URL or a SPIFFE ID")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	b := &Backend{cfg: cfg, keys: map[broker.VaultPath]signingKey{}}
	if cfg.StatusURI != "" {
		if u, err := url.Parse(cfg.StatusURI); err != nil || u.Scheme != "https" || u.Host == "" || u.Fragment != "" || cfg.Sign == nil {
			return nil, errors.New("jwt: StatusURI must be an https URL and requires Sign")
		}
		b.list = newStatusList(cfg)
	}
	return b, nil
}

// Access returns the Vault path of the tool's mint, whether the mint is a write, and whether it yields a lease.
func (b *Backend) Access(t broker.Tool) (path broker.VaultPath, write, leased bool) {
	return t.Path.Insert(1, "sign").Insert(3, "sha2-256"), true, false
}

// header and claims are the token's two signed parts. The fields are in encoding order.
type header struct {
	Algorithm string `json:"alg"`
	Key       string `json:"kid"` // the transit key's name and version
	Type      string `json:"typ"`
}

type claims struct {
	Issuer   string `json:"iss"`
	Subject  string `json:"sub"`
	Audience string `json:"aud"`
	Expires  int64  `json:"exp"`
	Issued   int64  `json:"iat"`
	ID       string `json:"jti"`
	Scope    string `json:"scope,omitempty"`
	Chain    string `json:"pawl_chain"`
	Tool     string `json:"pawl_tool"`
	Args     string `json:"pawl_args"` // SHA-256 of the canonical arguments, in hex

	Status *statusClaim `json:"status,omitempty"`
}

// ref returns the token's name in the ledger.
func (c claims) ref() string {
	if c.Status == nil {
		return c.ID
	}
	return c.ID + refIndex + strconv.FormatUint(uint64(c.Status.List.Index), 10)
}

// Prepare implements [broker.Backend].
func (b *Backend) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	s, err := load(t)
	if err != nil {
		return broker.Mint{}, "", err
	}
	c, err := s.claims(g)
	if err != nil {
		return broker.Mint{}, "", broker.Errorf(broker.Malformed, "issue", "%s", err).With(broker.CodeArgumentOutside)
	}
	key, err := b.key(ctx, t.Path)
	if err != nil {
		return broker.Mint{}, "", err
	}
	now := b.cfg.Now()
	digest := g.Args.Digest()
	c.Issuer, c.Subject, c.ID, c.Chain, c.Tool = b.cfg.Issuer, g.Caller.String(), string(g.ID), string(g.Chain), string(t.Name)
	c.Issued, c.Expires, c.Args = now.Unix(), g.Expires.Unix(), hex.EncodeToString(digest[:])
	if c.Expires <= c.Issued {
		return broker.Mint{}, "", broker.Errorf(broker.Expired, "issue", "less than a second is left").With(broker.CodeExpired)
	}
	if b.list != nil {
		index, err := b.list.allocate(g)
		if err != nil {
			return broker.Mint{}, "", err
		}
		c.Status = &statusClaim{statusReference{index, b.cfg.StatusURI}}
	}
	m, err := b.mint(t, g, s, c, key, now)
	m.Again = func(ctx context.Context) (broker.Mint, error) {
		key, err := b.readKey(ctx, t.Path)
		if err != nil {
			return broker.Mint{}, err
		}
		return b.mint(t, g, s, c, key, now)
	}
	return m, string(g.ID), err
}

// mint is the request for the signature of a token by a version of its key.
func (b *Backend) mint(t broker.Tool, g broker.Grant, s settings, c claims, key signingKey, now time.Time) (broker.Mint, error) {
	input, err := signingInput(header{"ES256", t.Path.Segments()[1] + ":" + strconv.Itoa(key.version), "JWT"}, c)
	if err != nil {
		return broker.Mint{}, err
	}
	path, _, _ := b.Access(t)
	return broker.Mint{
		Path: path, TTL: g.Expires.Sub(now) + time.Second, NoLease: true,
		Named: b.list != nil, // its index on the status list is in its lease
		Data:  map[string]any{"input": base64.StdEncoding.EncodeToString([]byte(input)), "marshaling_algorithm": "jws", "key_version": key.version},
		Finish: func(answer map[string]any, _ time.Time) (broker.Finished, error) {
			f, err := finish(answer, input, key, c)
			if err == nil && s.outlives > 0 {
				f.Outlives = f.Expires.Add(s.outlives)
			}
			return f, err
		},
	}, nil
}

func signingInput(h header, c claims) (string, error) {
	rawHeader, err := json.Marshal(h)
	if err != nil {
		return "", fmt.Errorf("jwt: encoding the header: %w", err)
	}
	rawClaims, err := json.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("jwt: encoding the claims: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(rawHeader) + "." + base64.RawURLEncoding.EncodeToString(rawClaims), nil
}

// finish parses the signature "vault:v<version>:<base64url>" and verifies it: a token with a wrong signature is useless
// to the agent.
func finish(answer map[string]any, input string, key signingKey, c claims) (broker.Finished, error) {
	text, _ := answer["signature"].(string)
	signature, ok := strings.CutPrefix(text, "vault:v"+strconv.Itoa(key.version)+":")
	raw, err := base64.RawURLEncoding.Strict().DecodeString(signature)
	if !ok || err != nil || len(raw) != 64 {
		return broker.Finished{}, errors.New("jwt: the response is not a signature by the requested key version")
	}
	digest := sha256.Sum256([]byte(input))
	if !ecdsa.Verify(key.public, digest[:], new(big.Int).SetBytes(raw[:32]), new(big.Int).SetBytes(raw[32:])) {
		return broker.Finished{}, errors.New("jwt: the signature does not verify")
	}
	token := input + "." + signature
	secret, err := json.Marshal(map[string]string{"token": token, "token_type": "Bearer"})
	if err != nil {
		return broker.Finished{}, errors.New("jwt: encoding the secret")
	}
	return broker.Finished{Secret: broker.NewSecret(secret), Ref: c.ref(), Expires: time.Unix(c.Expires, 0).UTC(),
		Digests: []broker.ValueDigest{broker.DigestValue(token)}}, nil
}

// Sever implements [broker.Severer]. Every status list served from now on marks the grants' tokens as invalid.
// Introspection needs no change: it reads the ledger.
func (b *Backend) Sever(_ context.Context, grants []broker.Grant) error {
	if b.list != nil {
		b.list.revoke(grants)
	}
	return nil
}

// Prove implements [broker.Prover]. A token cannot be recalled. Before its expiry, dead means that introspection
// refuses it, which Prove checks, and that the status list, if there is one, marks it as invalid.
func (b *Backend) Prove(ctx context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	out := make([]broker.Evidence, len(grants))
	for i, g := range grants {
		e, err := b.prove(ctx, g)
		if err != nil {
			return nil, err
		}
		out[i] = g.WithObtained(e)
	}
	return out, nil
}

func (b *Backend) prove(ctx context.Context, g broker.Grant) (broker.Evidence, error) {
	now, end := b.cfg.Now().UTC(), g.Expires.UTC().Format(time.RFC3339)
	if now.After(g.Expires.Add(broker.Leeway)) {
		return broker.Evidence{At: now, Check: "jwt: token expiry", Outcome: broker.OutcomeDead,
			Answer: "expired at " + end + " for verifiers that check exp"}, nil
	}
	active, err := b.cfg.Active(ctx, g.ID)
	if err != nil {
		return broker.Evidence{}, err
	}
	e := broker.Evidence{At: now, Check: "jwt: introspection", Outcome: broker.OutcomeAlive, Answer: "active until " + end}
	if active {
		return e, nil
	}
	e.Listed, e.Outcome = true, broker.OutcomeDead
	e.Answer = "inactive; a verifier that does not call introspection accepts it until " + end
	if b.list == nil || !now.Before(g.Expires) {
		return e, nil
	}
	if revoked, known := b.list.status(g.ID); known && !revoked {
		e.Check, e.Listed, e.Outcome = "jwt: status list", false, broker.OutcomeAlive
		e.Answer = "inactive, but still valid on the status list"
	} else if known {
		e.Check = "jwt: introspection and status list"
		e.Answer = fmt.Sprintf("inactive, and invalid on the status list; a verifier may use a copy "+
			"of the list that is %v old, and one that checks neither accepts it until %s", listTTL, end)
	}
	return e, nil
}
