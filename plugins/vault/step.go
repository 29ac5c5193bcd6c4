package vault

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// step is a step's token, in memory from Child to Mint.
type step struct {
	token   string
	expires time.Time // its hard end
}

// errMemory says that more step tokens are in memory than may be.
var errMemory = errors.New("too many vault tokens of steps are waiting for their mint")

// Child implements [broker.Minter]. An ErrNoParent says that the delegation has no usable token
// in memory: branch it again.
func (c *Client) Child(ctx context.Context, g broker.Grant, displayName, policy string) (broker.Handle, error) {
	if err := checkSegment(displayName); err != nil {
		return broker.Handle{}, fmt.Errorf("display name of a vault token: %w", err)
	}
	life := ceil(g.Expires.Sub(c.cfg.Now()))
	if life <= 0 {
		return broker.Handle{}, broker.Errorf(broker.Expired, "issue", "the step's time is over").With(broker.CodeExpired)
	}
	c.mu.Lock()
	full := len(c.steps) >= maxSteps
	c.mu.Unlock()
	if full {
		return broker.Handle{}, errMemory
	}
	parent, err := c.use(g.Delegation)
	if err != nil {
		return broker.Handle{}, err
	}
	n, err := c.create(ctx, parent, "auth/token/create", newToken{
		Policies: []string{policy}, DisplayName: displayName, TTL: text(life), ExplicitMaxTTL: text(life),
		Meta: map[string]string{"pawl_grant": string(g.ID), "pawl_chain": string(g.Chain)},
	})
	if err != nil {
		return broker.Handle{}, err
	}
	h := broker.Handle{Accessor: n.accessor, Expires: c.cfg.Now().Add(life)}
	c.mu.Lock()
	c.steps[h.Accessor] = step{token: n.token, expires: h.Expires}
	c.mu.Unlock()
	return h, nil
}

// Mint implements [broker.Minter]. The token leaves memory before the request leaves the
// process, so that one handle mints once, whatever happens.
func (c *Client) Mint(ctx context.Context, h broker.Handle, m broker.Mint) (broker.Lease, broker.Secret, error) {
	c.mu.Lock()
	s, ok := c.steps[h.Accessor]
	delete(c.steps, h.Accessor)
	c.mu.Unlock()
	now := c.cfg.Now()
	if !ok || !now.Before(s.expires) {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("minting: the step's token is not in memory: %w", broker.ErrNotMinted)
	}
	path, err := join(m.Path)
	if err != nil || m.Finish == nil || m.Wrap && (!m.Auth || m.TTL <= 0) {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("minting: the mint is malformed: %w", errors.Join(err, broker.ErrNotMinted))
	}
	r := call{method: "GET", path: path, token: s.token, once: true}
	if m.Data != nil {
		r.method, r.body = "POST", m.Data
	}
	if m.Wrap {
		r.wrap = text(ceil(m.TTL))
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.MintTimeout)
	defer cancel()
	a, err := c.wire.send(ctx, r)
	if err != nil && certain(err) {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("minting: %w: %w", broker.ErrNotMinted, err)
	}
	if err != nil {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("minting: %w", err)
	}
	lease, secret, err := c.accept(ctx, a, path, s, m)
	if err != nil {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("minting: %w", err)
	}
	return lease, secret, nil
}

// certain reports whether a failed mint made nothing: it never left, or Vault turned it away
// before any engine saw it. 429 and 412 may come from a node that passed it on, 5xx from one
// that had made the secret (hardening.md, "Vault answers"), 408 and the rest from a proxy.
func certain(err error) bool {
	var f *failure
	if errors.As(err, &f) {
		return slices.Contains([]int{400, 403, 404, 405, 413}, f.status) || errors.Is(f, errSealed)
	}
	return errors.Is(err, errUnsent)
}

// accept checks the answer of a mint. Whatever it refuses exists in Vault, so its errors leave
// the outcome unknown and the caller ends the token.
func (c *Client) accept(ctx context.Context, a answer, path string, s step, m broker.Mint) (broker.Lease, broker.Secret, error) {
	now := c.cfg.Now()
	if m.Wrap {
		return c.acceptWrapped(ctx, a, path, s, m)
	}
	if m.Auth && a.Auth != nil && a.Data == nil && a.LeaseID == "" {
		return c.acceptToken(a, s, m)
	}
	switch {
	case m.Auth || a.Data == nil || a.Auth != nil || a.Wrap != nil:
		return broker.Lease{}, broker.Secret{}, errors.New("vault's answer is not a secret")
	case m.Leased && a.LeaseID == "":
		return broker.Lease{}, broker.Secret{}, errors.New("vault's answer has no lease id: nothing could end this secret")
	case a.LeaseDuration < 0 || a.LeaseID != "" && a.LeaseDuration == 0:
		return broker.Lease{}, broker.Secret{}, errors.New("vault's lease has no end")
	}
	lease := broker.Lease{Expires: s.expires}
	var end time.Time
	if a.LeaseID != "" {
		rest, ours := strings.CutPrefix(a.LeaseID, path+"/")
		if !ours || checkSegment(rest) != nil {
			return broker.Lease{}, broker.Secret{}, errors.New("vault's lease is of another path than the mint")
		}
		if a.LeaseDuration > maxLease || m.TTL > 0 && seconds(a.LeaseDuration) > ceil(m.TTL) {
			return broker.Lease{}, broker.Secret{}, errors.New("vault's lease is longer than the tool allows")
		}
		// Counted from now, the latest moment that it can have begun; the token's end bounds it.
		if end = now.Add(seconds(a.LeaseDuration)); end.After(s.expires) {
			end = s.expires
		}
		lease.ID, lease.Expires = a.LeaseID, end
	}
	return finish(m, a.Data, lease, end, now)
}

// acceptToken checks an answer that is a token. One below the step's token ends with it.
func (c *Client) acceptToken(a answer, s step, m broker.Mint) (broker.Lease, broker.Secret, error) {
	if err := a.token("service"); err != nil {
		return broker.Lease{}, broker.Secret{}, err
	}
	life := seconds(a.Auth.LeaseDuration)
	if a.Auth.Orphan || m.TTL > 0 && life > ceil(m.TTL) {
		return broker.Lease{}, broker.Secret{}, errors.New("vault's token outlives the step's, or lives longer than the tool allows")
	}
	now := c.cfg.Now()
	end := now.Add(life)
	if end.After(s.expires) {
		end = s.expires
	}
	return finish(m, a.Auth.Members, broker.Lease{Expires: end}, end, now)
}

// finish has the backend turn the answer into what the agent gets.
func finish(m broker.Mint, data map[string]any, lease broker.Lease, end, now time.Time) (broker.Lease, broker.Secret, error) {
	f, err := m.Finish(data, end)
	if err != nil {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("reading the secret: %w", err)
	}
	lease.Outlives, lease.Digests = f.Outlives, f.Digests
	if lease.Ref = f.Ref; !f.Expires.IsZero() {
		lease.Expires = f.Expires
	}
	if f.Secret.Empty() {
		return broker.Lease{}, broker.Secret{}, errors.New("the secret is empty")
	}
	if m.TTL > 0 && lease.Expires.After(now.Add(ceil(m.TTL)+time.Second)) {
		f.Secret.Wipe()
		return broker.Lease{}, broker.Secret{}, errors.New("the secret lives longer than the tool allows")
	}
	return lease, f.Secret, nil
}
