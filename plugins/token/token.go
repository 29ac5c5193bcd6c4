// Package token issues wrapped Vault tokens to tools that call Vault themselves. Such a token is a child of the step's
// token. It has the policies that the step's arguments select, an expiry, and nothing else.
package token

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
)

// Tokens revokes tokens and looks them up, by accessor, with the broker's own rights. It must be safe for concurrent
// use. The Client of plugins/vault implements it.
type Tokens interface {
	// Kill revokes a token. It returns nil if the token is already gone.
	Kill(ctx context.Context, accessor string) error
	// TokensGone reports for each accessor whether Vault confirms that there is no such token. On an error, such as a
	// refusal, the state of every token is unknown.
	TokensGone(ctx context.Context, accessors []string) ([]bool, error)
}

// Config configures a [Backend].
type Config struct {
	Vault Tokens           // required; its policy must allow auth/token/lookup-accessor and auth/token/revoke-accessor
	Now   func() time.Time // zero: time.Now
}

// Backend implements [broker.Backend], [broker.Severer] and [broker.Prover]. Safe for concurrent
// use.
type Backend struct{ cfg Config }

// New checks the configuration and returns a Backend.
func New(cfg Config) (*Backend, error) {
	if cfg.Vault == nil {
		return nil, errors.New("token: Vault is required")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Backend{cfg}, nil
}

// Access returns the Vault path of the tool's mint, whether the mint is a write, and whether it yields a lease.
func (b *Backend) Access(t broker.Tool) (path broker.VaultPath, write, leased bool) {
	return t.Path, true, false
}

// Prepare implements [broker.Backend].
func (b *Backend) Prepare(_ context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	s, err := load(t)
	if err != nil {
		return broker.Mint{}, "", err
	}
	policies, err := s.policies(g.Args)
	if err != nil {
		return broker.Mint{}, "", broker.Errorf(broker.Malformed, "issue", "%s", err).With(broker.CodeArgumentOutside)
	}
	life := (g.Expires.Sub(b.cfg.Now()) + time.Second - 1).Truncate(time.Second) // Vault counts in seconds
	if life <= 0 {
		return broker.Mint{}, "", broker.Errorf(broker.Expired, "issue", "the step has expired").With(broker.CodeExpired)
	}
	digest := g.Args.Digest()
	ttl := fmt.Sprintf("%ds", int64(life/time.Second))
	return broker.Mint{
		Path: t.Path, Auth: true, Wrap: s.wrap, TTL: life,
		Named: s.wrap, // a wrapping token has no parent, so only its accessor ends it
		Data: map[string]any{
			"policies": policies, "no_default_policy": true, "renewable": false, "type": "service",
			"ttl": ttl, "explicit_max_ttl": ttl, "num_uses": s.uses, "display_name": string(g.ID),
			"meta": map[string]string{"pawl_grant": string(g.ID), "pawl_chain": string(g.Chain), "pawl_tool": string(t.Name),
				"pawl_args": hex.EncodeToString(digest[:])},
		},
		Finish: func(answer map[string]any, _ time.Time) (broker.Finished, error) {
			accept := finish
			if s.wrap {
				accept = finishWrapped
			}
			f, err := accept(answer, policies, s.uses)
			if err == nil && s.outlives > 0 {
				f.Outlives = g.Expires.Add(s.outlives)
			}
			return f, err
		},
	}, string(g.ID), nil
}

// Wraps reports whether the tool's mint requests a wrapped response. The tool's Vault policy can then refuse every
// request for an unwrapped one.
func (b *Backend) Wraps(t broker.Tool) bool {
	s, err := load(t)
	return err == nil && s.wrap
}

// finish rejects a token that differs from the request. Vault's token role may add policies, or let the token outlive
// the step's token.
func finish(auth map[string]any, policies []string, uses int) (broker.Finished, error) {
	token, _ := auth["client_token"].(string)
	accessor, _ := auth["accessor"].(string)
	if !opaque(token) || !opaque(accessor) {
		return broker.Finished{}, errors.New("token: the response is not a service token")
	}
	if err := check(auth, "token_type", "token_policies", policies, uses); err != nil {
		return broker.Finished{}, err
	}
	return finished(map[string]string{"token": token}, token, accessor)
}

// finishWrapped is finish for a token inside a wrapping token: "auth" is the lookup of the inner token by its accessor.
// The ledger's name has both accessors, because the wrapping token has no parent: a kill of the step's token ends the
// inner token only.
func finishWrapped(answer map[string]any, policies []string, uses int) (broker.Finished, error) {
	token, _ := answer["token"].(string)
	wrapping, _ := answer["accessor"].(string)
	accessor, _ := answer["wrapped_accessor"].(string)
	path, _ := answer["creation_path"].(string)
	inside, _ := answer["auth"].(map[string]any)
	if !opaque(token) || !opaque(wrapping) || !opaque(accessor) || !opaque(path) || strings.Contains(wrapping+accessor, pair) {
		return broker.Finished{}, errors.New("token: the response is not a wrapped token")
	}
	if err := check(inside, "type", "policies", policies, uses); err != nil {
		return broker.Finished{}, err
	}
	return finished(map[string]string{"wrapping_token": token, "creation_path": path}, token, accessor+pair+wrapping)
}

// pair joins the accessors of a wrapped token and of its wrapping token. No Vault accessor contains it.
const pair = ","

// check compares a token with the request. kind and list are the members for type and policies: Vault names them
// differently in the response to a creation and to a lookup.
func check(token map[string]any, kind, list string, policies []string, uses int) error {
	orphan, known := token["orphan"].(bool)
	renewable, _ := token["renewable"].(bool)
	got, ok := texts(token[list])
	identity, okToo := texts(token["identity_policies"])
	slices.Sort(got)
	switch {
	case token[kind] != "service":
		return errors.New("token: the response is not a service token")
	case !known || orphan || renewable:
		return errors.New("token: the token would outlive the step's token")
	case !ok || !okToo || !slices.Equal(got, policies) || len(identity) > 0:
		return errors.New("token: the token has other policies than requested")
	case fmt.Sprint(token["num_uses"]) != fmt.Sprint(uses):
		return errors.New("token: the token has another number of uses than requested")
	}
	return nil
}

// finished encodes the secret. token is the member that gives access.
func finished(members map[string]string, token, ref string) (broker.Finished, error) {
	secret, err := json.Marshal(members)
	if err != nil {
		return broker.Finished{}, errors.New("token: encoding the secret")
	}
	return broker.Finished{Secret: broker.NewSecret(secret), Ref: ref, Digests: []broker.ValueDigest{broker.DigestValue(token)}}, nil
}

// texts reads a list of strings. A missing list is an empty one.
func texts(v any) (list []string, ok bool) {
	if v == nil {
		return nil, true
	}
	values, ok := v.([]any)
	for _, v := range values {
		s, isText := v.(string)
		list, ok = append(list, s), ok && isText
	}
	return list, ok
}

// opaque reports whether s can be a token or accessor: printable ASCII without spaces.
func opaque(s string) bool {
	return s != "" && len(s) <= 4096 && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

// Sever implements [broker.Severer]. A kill of the step's token is not enough: it misses a child that Vault was still
// creating at that moment. So Sever kills each token by its own accessor.
func (b *Backend) Sever(ctx context.Context, grants []broker.Grant) error {
	errs := make([]error, len(grants))
	var group errgroup.Group
	group.SetLimit(16)
	for i, g := range grants {
		if g.Lease.Ref == "" {
			continue // the engine kills the step's token, and Prove accounts for a child without a name
		}
		group.Go(func() error {
			for _, accessor := range strings.Split(g.Lease.Ref, pair) { // the inner token first: it gives access
				errs[i] = errors.Join(errs[i], b.cfg.Vault.Kill(ctx, accessor))
			}
			return nil
		})
	}
	_ = group.Wait() // errs has every error
	return errors.Join(errs...)
}

// Prove implements [broker.Prover]. If the response of a mint was lost, so was the token's accessor, and Vault cannot
// look it up. Such a grant is dead once every token that it can have created must have expired.
func (b *Backend) Prove(ctx context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	var accessors []string
	for _, g := range grants {
		if g.Lease.Ref != "" {
			accessors = append(accessors, strings.Split(g.Lease.Ref, pair)...)
		}
	}
	var gone []bool
	if len(accessors) > 0 {
		var err error
		if gone, err = b.cfg.Vault.TokensGone(ctx, accessors); err != nil {
			return nil, fmt.Errorf("looking up vault tokens: %w", err)
		}
		if len(gone) != len(accessors) {
			return nil, fmt.Errorf("looking up vault tokens: %d answers for %d", len(gone), len(accessors))
		}
	}
	out := make([]broker.Evidence, len(grants))
	for i, g := range grants {
		if g.Lease.Ref == "" {
			out[i] = b.unnamed(g)
			continue
		}
		n := 1 + strings.Count(g.Lease.Ref, pair)
		out[i] = g.WithObtained(b.named(gone[:n]))
		gone = gone[n:]
	}
	return out, nil
}

// named returns the evidence for a token, and its wrapping token if there is one, from the lookups of both.
func (b *Backend) named(gone []bool) broker.Evidence {
	e := broker.Evidence{At: b.cfg.Now().UTC(), Check: "vault: token lookup", Outcome: broker.OutcomeAlive, Answer: "known"}
	switch {
	case len(gone) == 1 && gone[0]:
		e.Outcome, e.Answer = broker.OutcomeDead, "no such token"
	case len(gone) == 2 && gone[0] && gone[1]:
		e.Outcome, e.Answer = broker.OutcomeDead, "no such token, and no wrapping token"
	case len(gone) == 2 && gone[0]:
		e.Answer = "the wrapping token is known; the wrapped token is gone"
	}
	return e
}

// unnamed returns the evidence for a grant without a recorded accessor.
func (b *Backend) unnamed(g broker.Grant) broker.Evidence {
	now := b.cfg.Now().UTC()
	e := broker.Evidence{At: now, Check: "ledger", Outcome: broker.OutcomeDead}
	// The last moment at which Vault can have created the token, plus the token's lifetime.
	end := g.MintDeadline.Add(g.Expires.Sub(g.Created) + time.Second)
	if end.Before(g.Expires) {
		end = g.Expires
	}
	switch {
	case g.Token.Accessor == "":
		e.Answer = "no token was recorded for the step, so no secret was minted with it"
	case now.After(end):
		e.Answer = "every token that the step's token can have created has expired"
	default:
		e.Outcome = broker.OutcomeUnknown
		e.Answer = "its accessor was lost; it ends with the step's token, or at the latest at " +
			end.UTC().Format(time.RFC3339)
	}
	return e
}
