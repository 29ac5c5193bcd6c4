package vault

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
)

// node is a token with children: the login token, or a delegation's. Client.mu guards begun,
// ends, used, kept and dead; the rest never changes.
type node struct {
	token    string
	accessor string
	parent   *node     // nil: a login token
	hard     time.Time // its end, however often it is renewed
	begun    time.Time // of its making or last renewal
	ends     time.Time // unless it is renewed
	used     time.Time // it, or a node below
	kept     bool      // in use; before, and when another took its place, it is not
	dead     bool      // killed, or refused by Vault
}

// aliveLocked reports whether Vault still takes the token, by what we know: it and all above it.
func (c *Client) aliveLocked(n *node) bool {
	now := c.cfg.Now()
	for ; n != nil; n = n.parent {
		if n.dead || !now.Before(n.ends) {
			return false
		}
	}
	return true
}

// heldLocked gives the token in use for a delegation. One that hangs on a former login token
// does not count: it ends with it.
func (c *Client) heldLocked(d broker.DelegationID) *node {
	n := c.kept[d]
	if n == nil || !c.aliveLocked(n) {
		return nil
	}
	top := n
	for top.parent != nil {
		top = top.parent
	}
	if top != c.session {
		return nil
	}
	return n
}

// Holds implements [broker.TokenTree].
func (c *Client) Holds(d broker.DelegationID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.heldLocked(d) != nil
}

// use gives the token in use for a delegation and marks it and all above as used.
func (c *Client) use(d broker.DelegationID) (*node, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.heldLocked(d)
	if n == nil {
		return nil, fmt.Errorf("delegation %s: %w", d, broker.ErrNoParent)
	}
	now := c.cfg.Now()
	for up := n; up != nil; up = up.parent {
		up.used = now
	}
	return n, nil
}

// Branch implements [broker.TokenTree]. A root hangs on the login token by way of the token
// role, which allows our tools' policies and so spares the broker from holding them; below,
// plain creation of a child, which Vault holds to a subset of its parent's policies: its
// refusal is an errWider, and of kind broker.Denied.
func (c *Client) Branch(ctx context.Context, d broker.Delegation, policies []string) (broker.Handle, error) {
	policies = append(slices.Clone(policies), c.cfg.Delegation)
	life := ceil(d.Expires.Sub(c.cfg.Now()))
	if life <= 0 {
		return broker.Handle{}, broker.Errorf(broker.Expired, "delegate", "the delegation is over").With(broker.CodeExpired)
	}
	var parent *node
	var err error
	path := "auth/token/create"
	if d.Parent == "" {
		parent, err = c.root(ctx)
		path += "/" + c.cfg.TokenRole
	} else {
		parent, err = c.use(d.Parent)
	}
	if err != nil {
		return broker.Handle{}, err
	}
	n, err := c.create(ctx, parent, path, newToken{
		Policies: policies, DisplayName: string(d.ID), Renewable: true,
		TTL: text(min(life, ceil(c.cfg.DeadMan))), ExplicitMaxTTL: text(life),
		Meta: map[string]string{"pawl_delegation": string(d.ID), "pawl_chain": string(d.Chain)},
	})
	if err != nil {
		return broker.Handle{}, err
	}
	n.hard, n.used = c.cfg.Now().Add(life), c.cfg.Now()
	c.mu.Lock()
	c.nodes[n.accessor] = n
	c.mu.Unlock()
	return broker.Handle{Accessor: n.accessor, Expires: n.hard}, nil
}

// Keep implements [broker.TokenTree]. The token that was in use before, if any, stays alive as
// long as steps may hang on it.
func (c *Client) Keep(d broker.DelegationID, h broker.Handle) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := c.nodes[h.Accessor]; n != nil && n.parent != nil {
		n.kept = true
		c.kept[d] = n
	}
}

// newToken is the body of a request for a token.
type newToken struct {
	Policies        []string          `json:"policies"`
	NoDefaultPolicy bool              `json:"no_default_policy"`
	Renewable       bool              `json:"renewable"`
	TTL             string            `json:"ttl"`
	ExplicitMaxTTL  string            `json:"explicit_max_ttl"`
	DisplayName     string            `json:"display_name"`
	Meta            map[string]string `json:"meta"`
	Type            string            `json:"type"`
}

// create makes a token below parent. What Vault made is compared with what was asked for: a
// token with any other policy, an identity's included, is ended and refused.
func (c *Client) create(ctx context.Context, parent *node, path string, t newToken) (*node, error) {
	for _, p := range t.Policies {
		if err := checkPolicy(p); err != nil {
			return nil, err
		}
	}
	t.NoDefaultPolicy, t.Type = true, "service"
	sent := c.cfg.Now()
	a, err := c.ask(ctx, call{method: "POST", path: path, token: parent.token, body: t})
	switch {
	case errors.Is(err, errWider):
		return nil, broker.Errorf(broker.Denied, "delegate", "Vault refuses a token wider than its parent's").
			With(broker.CodeDelegationWider).Because(fmt.Errorf("%w: %w", errWider, err))
	case errors.Is(err, errForbidden):
		c.refused(parent)
		return nil, fmt.Errorf("creating a vault token: %w: %w", broker.ErrNoParent, err)
	case err != nil:
		return nil, fmt.Errorf("creating a vault token: %w", err)
	}
	if err := a.token("service"); err != nil {
		if a.Auth != nil && opaque(a.Auth.Accessor) {
			c.discard(ctx, a.Auth.Accessor)
		}
		return nil, fmt.Errorf("creating a vault token: %w", err)
	}
	want := slices.Compact(slices.Sorted(slices.Values(t.Policies)))
	got := slices.Sorted(slices.Values(a.Auth.Policies))
	if !slices.Equal(want, got) || len(a.Auth.Identity) > 0 || a.Auth.Orphan || a.Auth.Renewable != t.Renewable {
		c.discard(ctx, a.Auth.Accessor)
		return nil, errors.New("creating a vault token: it can do other things than were asked for")
	}
	return &node{token: a.Auth.Token, accessor: a.Auth.Accessor, parent: parent, begun: sent,
		ends: sent.Add(seconds(a.Auth.LeaseDuration))}, nil
}

// refused notes that Vault does not take a token: the engine makes another.
func (c *Client) refused(n *node) {
	if n.parent == nil {
		c.look()
		return
	}
	c.mu.Lock()
	n.dead = true
	c.mu.Unlock()
}

// discard ends a token that is not going to be used. Should that fail, its life does.
func (c *Client) discard(ctx context.Context, accessor string) {
	if err := c.Kill(context.WithoutCancel(ctx), accessor); err != nil {
		c.cfg.Log.Warn("a refused vault token lives on to its end", "error", err)
	}
}

// token checks that an answer brings one.
func (a answer) token(kind string) error {
	switch {
	case a.Auth == nil || !opaque(a.Auth.Token) || !opaque(a.Auth.Accessor) || a.Wrap != nil:
		return errors.New("vault's answer brings no token")
	case a.Auth.Type != kind:
		return fmt.Errorf("vault's token is not of type %s", kind)
	case a.Auth.LeaseDuration <= 0 || a.Auth.LeaseDuration > maxLease:
		return errors.New("vault's token has no end, or one beyond all bounds")
	}
	return nil
}

// maxLease is the longest life in seconds that an answer may name: ten years.
const maxLease = 10 * 366 * 24 * 3600

// opaque reports whether s can be a token or accessor: printable, without blanks.
func opaque(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return s != "" && len(s) <= 4096
}

// keepRenewed renews the tokens of delegations in use, and forgets those that are over.
func (c *Client) keepRenewed(ctx context.Context) {
	tick := time.NewTicker(c.cfg.DeadMan / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			c.renewAll(ctx, c.sweepMemory())
		}
	}
}

// sweepMemory forgets what is over and gives the nodes to renew: used of late and through at
// least a third of their life.
func (c *Client) sweepMemory() (due []*node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.cfg.Now()
	for accessor, n := range c.nodes {
		if n != c.session && (n.dead || !now.Before(n.ends)) {
			delete(c.nodes, accessor)
			continue
		}
		fresh := now.Sub(n.begun) < n.ends.Sub(n.begun)/3
		if n.parent != nil && n.kept && !fresh && now.Sub(n.used) < c.cfg.Idle && n.ends.Before(n.hard) {
			due = append(due, n)
		}
	}
	for d, n := range c.kept {
		if c.nodes[n.accessor] != n {
			delete(c.kept, d)
		}
	}
	for accessor, s := range c.steps {
		if !now.Before(s.expires) {
			delete(c.steps, accessor)
		}
	}
	return due
}

// renewAll renews at most 8 tokens at once.
func (c *Client) renewAll(ctx context.Context, due []*node) {
	var g errgroup.Group
	g.SetLimit(8)
	for _, n := range due {
		g.Go(func() error {
			if err := c.renew(ctx, n, false); err != nil && ctx.Err() == nil {
				c.cfg.Log.Warn("a delegation's vault token was not renewed", "accessor", n.accessor, "error", err)
			}
			return nil
		})
	}
	_ = g.Wait() // nil: each failure is logged, and the next tick retries it
}

// renew renews a token with itself. A refusal marks it dead; another error leaves it as it is,
// to be tried again.
func (c *Client) renew(ctx context.Context, n *node, fresh bool) error {
	if c.cfg.Login.token != "" && n.parent == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		n.begun = c.cfg.Now()
		n.ends = n.begun.Add(time.Hour)
		return nil
	}
	sent := c.cfg.Now()
	a, err := c.ask(ctx, call{method: "POST", path: "auth/token/renew-self", token: n.token, body: struct{}{}, fresh: fresh})
	var f *failure
	if errors.As(err, &f) && (f.status == 403 || f.status == 400) {
		c.mu.Lock()
		n.dead = n.parent != nil || f.status == 403
		c.mu.Unlock()
	}
	if err != nil {
		return err
	}
	if err := a.token("service"); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	n.begun, n.ends = sent, sent.Add(seconds(a.Auth.LeaseDuration))
	return nil
}

// ceil rounds up to a second, Vault's unit.
func ceil(d time.Duration) time.Duration { return (d + time.Second - 1).Truncate(time.Second) }

func seconds(n int64) time.Duration { return time.Duration(n) * time.Second }

func text(d time.Duration) string { return fmt.Sprintf("%ds", int64(d/time.Second)) }
