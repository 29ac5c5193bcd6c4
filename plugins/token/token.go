// Package token hands out Vault tokens to tools that speak Vault themselves, wrapped: a child of the
// step's token with the policies of the step's arguments, an end, and nothing else.
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

// Tokens ends tokens and looks for them, by accessor, with the broker's own rights.
// plugins/vault's Client does. Safe for concurrent use.
type Tokens interface {
	// Kill revokes a token; nil when it is gone already.
	Kill(ctx context.Context, accessor string) error
	// TokensGone reports for each accessor whether Vault says that there is no such token. A
	// refusal is an error, which answers for none of them.
	TokensGone(ctx context.Context, accessors []string) ([]bool, error)
}

// Config says what the backend stands on.
type Config struct {
	Vault Tokens           // required; its policy opens auth/token/lookup-accessor and auth/token/revoke-accessor
	Now   func() time.Time // zero: time.Now
}

// Backend implements [broker.Backend], [broker.Severer] and [broker.Prover]. Safe for concurrent
// use.
type Backend struct{ cfg Config }

// New makes a Backend.
func New(cfg Config) (*Backend, error) {
	if cfg.Vault == nil {
		return nil, errors.New("token: Vault is required")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Backend{cfg}, nil
}

// Access gives the Vault path of the tool's mint and how it is used there.
func (b *Backend) Access(t broker.Tool) (path []string, write, leased bool) {
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
		return broker.Mint{}, "", broker.Errorf(broker.Expired, "issue", "the step's time is over").With(broker.CodeExpired)
	}
	digest := g.Args.Digest()
	ttl := fmt.Sprintf("%ds", int64(life/time.Second))
	return broker.Mint{
		Path: t.Path, Auth: true, Wrap: s.wrap, TTL: life,
		Data: map[string]any{
			"policies": policies, "no_default_policy": true, "renewable": false, "type": "service",
			"ttl": ttl, "explicit_max_ttl": ttl, "num_uses": s.uses, "display_name": string(g.ID),
			"meta": map[string]string{"pawl_grant": string(g.ID), "pawl_chain": string(g.Chain), "pawl_tool": string(t.Name),
				"pawl_args": hex.EncodeToString(digest[:])},
		},
		Finish: func(answer map[string]any, _ time.Time) (broker.Finished, error) {
			if s.wrap {
				return finishWrapped(answer, policies, s.uses)
			}
			return finish(answer, policies, s.uses)
		},
	}, string(g.ID), nil
}

// Wraps reports whether the tool's mint is asked for wrapped, so that its Vault policy can
// refuse every other.
func (b *Backend) Wraps(t broker.Tool) bool {
	s, err := load(t)
	return err == nil && s.wrap
}

// finish refuses a token that is anything but what was asked for: Vault's token role may add
// policies, or let it live on without the step's.
func finish(auth map[string]any, policies []string, uses int) (broker.Finished, error) {
	token, _ := auth["client_token"].(string)
	accessor, _ := auth["accessor"].(string)
	if !opaque(token) || !opaque(accessor) {
		return broker.Finished{}, errors.New("token: the answer is not a service token")
	}
	if err := narrow(auth, "token_type", "token_policies", policies, uses); err != nil {
		return broker.Finished{}, err
	}
	return handOver(map[string]string{"token": token}, token, accessor)
}

// finishWrapped is finish for a token that Vault keeps: "auth" is what Vault says of it by its
// accessor. Both are named, because the wrapping token hangs on no other: killing the step's ends
// what is inside and leaves it.
func finishWrapped(answer map[string]any, policies []string, uses int) (broker.Finished, error) {
	token, _ := answer["token"].(string)
	wrapping, _ := answer["accessor"].(string)
	accessor, _ := answer["wrapped_accessor"].(string)
	path, _ := answer["creation_path"].(string)
	inside, _ := answer["auth"].(map[string]any)
	if !opaque(token) || !opaque(wrapping) || !opaque(accessor) || !opaque(path) || strings.Contains(wrapping+accessor, pair) {
		return broker.Finished{}, errors.New("token: the answer is not a wrapped token")
	}
	if err := narrow(inside, "type", "policies", policies, uses); err != nil {
		return broker.Finished{}, err
	}
	return handOver(map[string]string{"wrapping_token": token, "creation_path": path}, token, accessor+pair+wrapping)
}

// pair joins the accessors of a wrapped token and of what wraps it; no accessor of Vault's has it.
const pair = ","

// narrow holds a token to what was asked for. Vault has other names for kind and policies where
// a token is made than where it is looked up.
func narrow(token map[string]any, kind, list string, policies []string, uses int) error {
	orphan, said := token["orphan"].(bool)
	renewable, _ := token["renewable"].(bool)
	got, ok := texts(token[list])
	identity, okToo := texts(token["identity_policies"])
	slices.Sort(got)
	switch {
	case token[kind] != "service":
		return errors.New("token: the answer is not a service token")
	case !said || orphan || renewable:
		return errors.New("token: the token would outlive the step's")
	case !ok || !okToo || !slices.Equal(got, policies) || len(identity) > 0:
		return errors.New("token: the token has other policies than were asked for")
	case fmt.Sprint(token["num_uses"]) != fmt.Sprint(uses):
		return errors.New("token: the token may be used more often, or less, than was asked for")
	}
	return nil
}

// handOver makes the secret; token is the one of its members that gives access.
func handOver(members map[string]string, token, ref string) (broker.Finished, error) {
	secret, err := json.Marshal(members)
	if err != nil {
		return broker.Finished{}, errors.New("token: encoding the secret")
	}
	return broker.Finished{Secret: broker.NewSecret(secret), Ref: ref, Digests: []broker.ValueDigest{broker.DigestValue(token)}}, nil
}

// texts reads a list of strings; none is one.
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

// opaque reports whether s can be a token or accessor: printable, without blanks.
func opaque(s string) bool {
	return s != "" && len(s) <= 4096 && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

// Sever implements [broker.Severer]. Killing the step's token would do, were it not for a token
// that Vault was still making while its parent died: that one is ended by its own name.
func (b *Backend) Sever(ctx context.Context, grants []broker.Grant) error {
	errs := make([]error, len(grants))
	var group errgroup.Group
	group.SetLimit(16)
	for i, g := range grants {
		if g.Lease.Ref == "" {
			continue // the engine kills the step's token, and Prove knows what that is worth
		}
		group.Go(func() error {
			for _, accessor := range strings.Split(g.Lease.Ref, pair) { // what is inside first: it is what can do something
				errs[i] = errors.Join(errs[i], b.cfg.Vault.Kill(ctx, accessor))
			}
			return nil
		})
	}
	_ = group.Wait() // errs has every error
	return errors.Join(errs...)
}

// Prove implements [broker.Prover]. A token whose answer was lost cannot be looked for: Vault
// finds tokens by accessor. It is dead once no token that began with this grant can live.
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
			return nil, fmt.Errorf("looking for vault tokens: %w", err)
		}
		if len(gone) != len(accessors) {
			return nil, fmt.Errorf("looking for vault tokens: %d answers for %d", len(gone), len(accessors))
		}
	}
	out := make([]broker.Evidence, len(grants))
	for i, g := range grants {
		if g.Lease.Ref == "" {
			out[i] = b.nameless(g)
			continue
		}
		n := 1 + strings.Count(g.Lease.Ref, pair)
		out[i] = b.known(gone[:n])
		gone = gone[n:]
	}
	return out, nil
}

// known judges a token by whether Vault still has it, and what wraps it.
func (b *Backend) known(gone []bool) broker.Evidence {
	e := broker.Evidence{At: b.cfg.Now().UTC(), Check: "vault: look the token up", Outcome: broker.OutcomeAlive, Answer: "known"}
	switch {
	case len(gone) == 1 && gone[0]:
		e.Outcome, e.Answer = broker.OutcomeDead, "no such token"
	case len(gone) == 2 && gone[0] && gone[1]:
		e.Outcome, e.Answer = broker.OutcomeDead, "no such token, and none that wraps it"
	case len(gone) == 2 && gone[0]:
		e.Answer = "the wrapping token is known; what it wraps is not"
	}
	return e
}

// nameless judges a grant of which no answer is known.
func (b *Backend) nameless(g broker.Grant) broker.Evidence {
	now := b.cfg.Now().UTC()
	e := broker.Evidence{At: now, Check: "ledger", Outcome: broker.OutcomeDead}
	// The last moment at which Vault can have made it, and its life from then.
	end := g.Settles.Add(g.Expires.Sub(g.Created) + time.Second)
	if end.Before(g.Expires) {
		end = g.Expires
	}
	switch {
	case g.Token.Accessor == "":
		e.Answer = "no token was recorded for the step, so nothing was made with it"
	case now.After(end):
		e.Answer = "past the end of whatever was made with the step's token"
	default:
		e.Outcome = broker.OutcomeUnknown
		e.Answer = "its name was lost; it dies with the step's token, and otherwise at " + end.UTC().Format(time.RFC3339)
	}
	return e
}
