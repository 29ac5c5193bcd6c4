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

// node is a token that may have children: the login token or a delegation's token. Client.mu guards renewed, expires,
// lastUsed, inUse and dead. The other fields never change.
type node struct {
	token      string
	accessor   string
	parent     *node     // nil: a login token
	policies   []string  // as asked of Vault, and compared with its answer
	maxExpires time.Time // its expiry, however often it is renewed
	renewed    time.Time // when it was created or last renewed
	expires    time.Time // unless it is renewed
	lastUsed   time.Time // of this node or one below
	inUse      bool      // Keep put it into use
	dead       bool      // revoked by Kill, or refused by Vault
}

// aliveLocked reports whether, as far as the client knows, Vault accepts the token and every token above it.
func (c *Client) aliveLocked(n *node) bool {
	now := c.cfg.Now()
	for ; n != nil; n = n.parent {
		if n.dead || !now.Before(n.expires) {
			return false
		}
	}
	return true
}

// currentLocked returns the token in use for a delegation. A token below a former login token does not count, since it
// ends with that one.
func (c *Client) currentLocked(d broker.DelegationID) *node {
	n := c.current[d]
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
func (c *Client) HasToken(d broker.DelegationID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.currentLocked(d) != nil
}

// touch returns the token in use for a delegation and marks it and all tokens above as used.
func (c *Client) touch(d broker.DelegationID) (*node, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.currentLocked(d)
	if n == nil {
		return nil, fmt.Errorf("delegation %s: %w", d, broker.ErrNoParent)
	}
	now := c.cfg.Now()
	for up := n; up != nil; up = up.parent {
		up.lastUsed = now
	}
	return n, nil
}

// Branch implements [broker.TokenTree]. It makes the token of a root delegation below the login token through the token
// role. The role allows Pawl's tool policies, so that the broker need not hold them. Below a root it creates a plain
// child, for which Vault enforces a subset of the parent's policies. If Vault refuses that, the error is an errWider of
// kind broker.Denied.
func (c *Client) CreateDelegationToken(ctx context.Context, d broker.Delegation, policies []string) (broker.Handle, error) {
	policies = append(slices.Clone(policies), c.cfg.Delegation)
	life := ceilSecond(d.Expires.Sub(c.cfg.Now()))
	if life <= 0 {
		return broker.Handle{}, broker.Errorf(broker.Expired, "delegate", "the delegation has expired").
			With(broker.CodeExpired)
	}
	if err := c.reachable(); err != nil {
		return broker.Handle{}, err
	}
	var parent *node
	var err error
	path := "auth/token/create"
	if d.Parent == "" {
		parent, err = c.loginToken(ctx)
		path += "/" + c.cfg.TokenRole
	} else {
		parent, err = c.touch(d.Parent)
	}
	if err != nil {
		return broker.Handle{}, c.told(err)
	}
	n, err := c.create(ctx, parent, path, newToken{
		Policies: policies, DisplayName: string(d.ID), Renewable: true,
		TTL: formatTTL(min(life, ceilSecond(c.cfg.DeadMan))), ExplicitMaxTTL: formatTTL(life),
		Meta: map[string]string{"pawl_delegation": string(d.ID), "pawl_chain": string(d.Chain)},
	})
	if err != nil {
		return broker.Handle{}, c.told(err)
	}
	n.maxExpires, n.lastUsed = c.cfg.Now().Add(life), c.cfg.Now()
	c.mu.Lock()
	c.nodes[n.accessor] = n
	c.mu.Unlock()
	return broker.Handle{Accessor: n.accessor, Expires: n.maxExpires}, nil
}

// Keep implements [broker.TokenTree]. A token that was in use before stays alive as long as steps may depend on it.
func (c *Client) Activate(d broker.DelegationID, h broker.Handle) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := c.nodes[h.Accessor]; n != nil && n.parent != nil {
		n.inUse = true
		c.current[d] = n
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

// create makes a token below parent and compares it with the request. If the token has any other policy, including one
// from an identity, create revokes it and fails.
func (c *Client) create(ctx context.Context, parent *node, path string, t newToken) (*node, error) {
	for _, p := range t.Policies {
		if err := checkPolicy(p); err != nil {
			return nil, err
		}
	}
	t.NoDefaultPolicy, t.Type = true, "service"
	sent := c.cfg.Now()
	resp, err := c.do(ctx, call{method: "POST", path: path, token: parent.token, body: t})
	switch {
	case errors.Is(err, errForbidden):
		c.markRefused(parent)
		return nil, fmt.Errorf("creating a vault token: %w: %w", broker.ErrNoParent, err)
	case err != nil:
		return nil, fmt.Errorf("creating a vault token: %w", err)
	}
	if err := resp.checkToken("service"); err != nil {
		if resp.Auth != nil && validToken(resp.Auth.Accessor) {
			c.discard(ctx, resp.Auth.Accessor)
		}
		return nil, fmt.Errorf("creating a vault token: %w", err)
	}
	want := slices.Compact(slices.Sorted(slices.Values(t.Policies)))
	got := slices.Sorted(slices.Values(resp.Auth.Policies))
	if wrong := c.foreignPolicies(resp.Auth.Identity, resp.Auth.Entity); wrong != (Condition{}) {
		c.discard(ctx, resp.Auth.Accessor)
		return nil, c.refusal(wrong).Because(errors.New(wrong.Text))
	}
	if !slices.Equal(want, got) || resp.Auth.Orphan || resp.Auth.Renewable != t.Renewable {
		c.discard(ctx, resp.Auth.Accessor)
		return nil, explain(fmt.Errorf("creating a vault token: %w", errRights))
	}
	return &node{token: resp.Auth.Token, accessor: resp.Auth.Accessor, parent: parent, policies: want, renewed: sent,
		expires: sent.Add(seconds(resp.Auth.LeaseDuration))}, nil
}

// markRefused records that Vault no longer accepts a token, so that the engine makes another.
func (c *Client) markRefused(n *node) {
	if n.parent == nil {
		c.recheckLogin()
		return
	}
	c.mu.Lock()
	n.dead = true
	c.mu.Unlock()
}

// discard revokes a token that the client will not use. If that fails, the token expires by itself.
func (c *Client) discard(ctx context.Context, accessor string) {
	if err := c.Kill(context.WithoutCancel(ctx), accessor); err != nil {
		c.cfg.Log.Warn("a discarded vault token was not revoked and is alive until it expires", "error", err)
	}
}

// renewLoop renews the tokens of delegations in use and drops expired tokens from memory.
func (c *Client) renewLoop(ctx context.Context) {
	tick := time.NewTicker(c.cfg.DeadMan / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			c.renewAll(ctx, c.reap())
		}
	}
}

// reap drops expired and dead tokens from memory. It returns the nodes to renew: those used within Config.Idle for
// which at least a third of their life has passed.
func (c *Client) reap() (due []*node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.cfg.Now()
	for accessor, n := range c.nodes {
		if n != c.session && (n.dead || !now.Before(n.expires)) {
			delete(c.nodes, accessor)
			continue
		}
		fresh := now.Sub(n.renewed) < n.expires.Sub(n.renewed)/3
		if n.parent != nil && n.inUse && !fresh && now.Sub(n.lastUsed) < c.cfg.Idle && n.expires.Before(n.maxExpires) {
			due = append(due, n)
		}
	}
	for d, n := range c.current {
		if c.nodes[n.accessor] != n {
			delete(c.current, d)
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
				c.cfg.Log.Warn("renewing a delegation's vault token failed", "accessor", n.accessor, "error", err)
			}
			return nil
		})
	}
	_ = g.Wait() // nil: each failure is logged, and the next tick retries it
}

// renew renews a token with itself, and never beyond maxExpires: Vault ends it at most a second and the time of the
// request later. A refusal marks the token dead; after another error the caller retries later.
func (c *Client) renew(ctx context.Context, n *node, newConn bool) error {
	if c.cfg.Login.token != "" && n.parent == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		n.renewed = c.cfg.Now()
		n.expires = n.renewed.Add(time.Hour)
		return nil
	}
	sent := c.cfg.Now()
	var body struct {
		Increment string `json:"increment,omitempty"`
	}
	if n.parent != nil {
		// Vault keeps the explicit_max_ttl of a token from a token role until its first renewal only.
		body.Increment = formatTTL(max(time.Second, ceilSecond(min(n.maxExpires.Sub(sent), c.cfg.DeadMan))))
	}
	resp, err := c.do(ctx, call{method: "POST", path: "auth/token/renew-self", token: n.token,
		body: body, newConn: newConn})
	var f *failure
	if errors.As(err, &f) && (f.status == 403 || f.status == 400) {
		c.mu.Lock()
		n.dead = n.parent != nil || f.status == 403
		c.mu.Unlock()
	}
	if err != nil {
		return err
	}
	if err := resp.checkToken("service"); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	n.renewed, n.expires = sent, sent.Add(seconds(resp.Auth.LeaseDuration))
	return nil
}

// ceilSecond rounds up to a second, Vault's unit.
func ceilSecond(d time.Duration) time.Duration { return (d + time.Second - 1).Truncate(time.Second) }

func seconds(n int64) time.Duration { return time.Duration(n) * time.Second }

func formatTTL(d time.Duration) string { return fmt.Sprintf("%ds", int64(d/time.Second)) }
