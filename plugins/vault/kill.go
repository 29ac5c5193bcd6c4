package vault

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
)

// Kill implements [broker.Killer]. What hangs on the token leaves memory before Vault is asked:
// nothing is made below it while it dies. An errForbidden is an alarm: the broker's policy
// lacks the right, and the token lives.
func (c *Client) Kill(ctx context.Context, accessor string) error {
	if !opaque(accessor) {
		return errors.New("revoking a vault token: not an accessor")
	}
	c.mu.Lock()
	delete(c.steps, accessor)
	if n := c.nodes[accessor]; n != nil && n.parent != nil {
		n.dead = true
	}
	c.mu.Unlock()
	_, err := c.command(ctx, call{method: "POST", path: "auth/token/revoke-accessor", body: map[string]string{"accessor": accessor}})
	if err != nil && !gone(err, "invalid accessor", "token not found") {
		return fmt.Errorf("revoking a vault token: %w", err)
	}
	return nil
}

// Revoke implements [broker.Killer].
func (c *Client) Revoke(ctx context.Context, lease string) error {
	if err := checkLease(lease); err != nil {
		return fmt.Errorf("revoking: %w", err)
	}
	_, err := c.command(ctx, call{method: "POST", path: "sys/leases/revoke", body: map[string]any{"lease_id": lease, "sync": true}})
	if err != nil && !gone(err, "invalid lease", "lease not found") {
		return fmt.Errorf("revoking a lease: %w", err)
	}
	return nil
}

// gone reports whether Vault says that what was named does not exist. A 403 never does.
func gone(err error, phrases ...string) bool {
	var f *failure
	if !errors.As(err, &f) || f.status != 400 && f.status != 404 {
		return false
	}
	for _, p := range phrases {
		if f.says == p {
			return true
		}
	}
	return false
}

// crowd is from how many leases of one role on a list is cheaper than looking each up.
const crowd = 8

// Gone implements [broker.Killer]. Many leases of one role cost one list, few a look-up each.
// An error answers for none of them.
func (c *Client) Gone(ctx context.Context, leases []string) ([]bool, error) {
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
		if len(at) < crowd {
			single = append(single, at...)
			continue
		}
		known, err := c.list(ctx, role)
		if err != nil {
			return nil, err
		}
		for _, i := range at {
			_, alive := known[leases[i]]
			out[i] = !alive
		}
	}
	err := each(ctx, len(single), func(ctx context.Context, i int) error {
		l, err := c.lookUp(ctx, leases[single[i]])
		out[single[i]] = err == nil && l == nil
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// each runs f for 0 to n-1, at most 16 at once, and returns the first error, which cancels the rest.
func each(ctx context.Context, n int, f func(context.Context, int) error) error {
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

// TokensGone reports for each accessor whether Vault says that there is no such token. An error
// answers for none of them.
func (c *Client) TokensGone(ctx context.Context, accessors []string) ([]bool, error) {
	out := make([]bool, len(accessors))
	err := each(ctx, len(accessors), func(ctx context.Context, i int) error {
		if !opaque(accessors[i]) {
			return errors.New("looking a vault token up: not an accessor")
		}
		_, err := c.command(ctx, call{method: "POST", path: "auth/token/lookup-accessor", body: map[string]string{"accessor": accessors[i]}})
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
