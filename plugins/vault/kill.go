package vault

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
)

// Kill implements [broker.Killer]. The client stops using the token before it asks Vault, so that it makes nothing
// below a token that is being revoked. An errForbidden is an alarm: the broker's policy lacks the right, and the token
// is alive.
func (c *Client) Kill(ctx context.Context, accessor string) error {
	if !validToken(accessor) {
		return errors.New("revoking a vault token: not an accessor")
	}
	c.mu.Lock()
	delete(c.steps, accessor)
	if n := c.nodes[accessor]; n != nil && n.parent != nil {
		n.dead = true
	}
	c.mu.Unlock()
	_, err := c.doWithLogin(ctx, call{method: "POST", path: "auth/token/revoke-accessor",
		body: map[string]string{"accessor": accessor}})
	if err != nil && !gone(err, "invalid accessor", "token not found") {
		return fmt.Errorf("revoking a vault token: %w", err)
	}
	return nil
}

// Revoke implements [broker.Killer].
func (c *Client) Revoke(ctx context.Context, lease string) error {
	if err := checkLease(lease); err != nil {
		return fmt.Errorf("revoking a lease: %w", err)
	}
	_, err := c.doWithLogin(ctx, call{method: "POST", path: "sys/leases/revoke",
		body: map[string]any{"lease_id": lease, "sync": true}})
	if err != nil && !gone(err, "invalid lease", "lease not found") {
		return fmt.Errorf("revoking a lease: %w", err)
	}
	return nil
}

// gone reports whether Vault answered, with one of the phrases, that the token or lease does not exist. A 403 never
// counts as gone.
func gone(err error, phrases ...string) bool {
	var f *failure
	if !errors.As(err, &f) || f.status != 400 && f.status != 404 {
		return false
	}
	for _, p := range phrases {
		if f.phrase == p {
			return true
		}
	}
	return false
}

// listThreshold is the number of leases of one role from which one list is cheaper than a look-up of each.
const listThreshold = 8

// LeasesGone implements [broker.Killer]. Many leases of one role cost one list; a few cost one look-up each. Where Vault
// answers the list with an error, each lease costs a look-up too. An error leaves the status of every lease unknown.
func (c *Client) LeasesGone(ctx context.Context, leases []string) ([]bool, error) {
	roles := map[string][]int{}
	for i, id := range leases {
		if err := checkLease(id); err != nil {
			return nil, err
		}
		role := id[:max(strings.LastIndexByte(id, '/'), 0)]
		roles[role] = append(roles[role], i)
	}
	out := make([]bool, len(leases))
	var single []int
	for role, at := range roles {
		if len(at) < listThreshold {
			single = append(single, at...)
			continue
		}
		known, err := c.list(ctx, role)
		if listRefused(err) {
			c.cfg.Log.Warn("vault refused a list of leases: looking up each by itself", "leases", len(at), "error", err)
			single = append(single, at...)
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, i := range at {
			_, alive := known[leases[i]]
			out[i] = !alive
		}
	}
	err := forEach(ctx, len(single), func(ctx context.Context, i int) error {
		l, err := c.lookUpLease(ctx, leases[single[i]])
		out[single[i]] = err == nil && l == nil
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// listRefused reports whether Vault answered a list with an error that need not apply to the look-up of one lease. An
// audit device that cannot write the long answer has this effect, and so has a policy without the right to list. A Vault
// that does not answer, is sealed or limits the rate gets no further requests.
func listRefused(err error) bool {
	var f *failure
	if errors.As(err, &f) {
		return f.status != 429 && f.status != 503
	}
	return errors.Is(err, errTooLarge)
}

// forEach runs f for 0 to n-1, at most 16 at once. It returns the first error, which cancels the rest.
func forEach(ctx context.Context, n int, f func(context.Context, int) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range n {
		g.Go(func() error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return f(ctx, i)
		})
	}
	return g.Wait()
}

var _ broker.Vault = (*Client)(nil)

// TokensGone reports for each accessor whether Vault no longer knows its token. An error leaves the status of every
// token unknown.
func (c *Client) TokensGone(ctx context.Context, accessors []string) ([]bool, error) {
	out := make([]bool, len(accessors))
	err := forEach(ctx, len(accessors), func(ctx context.Context, i int) error {
		if !validToken(accessors[i]) {
			return errors.New("looking up a vault token: not an accessor")
		}
		_, err := c.doWithLogin(ctx, call{method: "POST", path: "auth/token/lookup-accessor",
			body: map[string]string{"accessor": accessors[i]}})
		if out[i] = gone(err, "invalid accessor"); out[i] {
			return nil
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}
