package vault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// step is the token that mints for a step. One of its own is in memory from CreateStepToken to Mint.
type step struct {
	token   string
	expires time.Time // of the token, or of a step without one of its own
	tool    broker.ToolName
	grant   broker.GrantID
	policy  string // of the tool
	shared  *node  // the delegation's token; nil: it is the step's own, and policy its only one
}

// errTooManySteps means that maxSteps step tokens are in memory.
var errTooManySteps = errors.New("too many vault step tokens wait for their mint")

// CreateStepToken implements [broker.Minter]. An ErrNoParent means that the delegation has no usable token in memory: branch it
// again.
func (c *Client) CreateStepToken(ctx context.Context, g broker.Grant, displayName, policy string) (broker.Handle, error) {
	if err := broker.CheckVaultName(displayName); err != nil {
		return broker.Handle{}, fmt.Errorf("display name of a vault token: %w", err)
	}
	life := ceilSecond(g.Expires.Sub(c.cfg.Now()))
	if life <= 0 {
		return broker.Handle{}, broker.Errorf(broker.Expired, "issue", "the step has expired").With(broker.CodeExpired)
	}
	c.mu.Lock()
	full := len(c.steps) >= maxSteps
	c.mu.Unlock()
	if full {
		return broker.Handle{}, errTooManySteps
	}
	if err := c.reachable(); err != nil {
		return broker.Handle{}, err
	}
	parent, err := c.touch(g.Delegation)
	if err != nil {
		return broker.Handle{}, c.told(err)
	}
	n, err := c.create(ctx, parent, "auth/token/create", newToken{
		Policies: []string{policy}, DisplayName: displayName, TTL: formatTTL(life), ExplicitMaxTTL: formatTTL(life),
		Meta: map[string]string{"pawl_grant": string(g.ID), "pawl_chain": string(g.Chain)},
	})
	if err != nil {
		return broker.Handle{}, c.told(err)
	}
	h := broker.Handle{Accessor: n.accessor, Expires: c.cfg.Now().Add(life)}
	c.mu.Lock()
	c.steps[h.Accessor] = step{token: n.token, expires: h.Expires, tool: g.Tool, grant: g.ID, policy: policy}
	c.mu.Unlock()
	return h, nil
}

// nearEnd is how close to its end a delegation's token that can be renewed is taken for ended. Vault's answer to a mint
// could be that it has ended, and no mint is sent twice.
const nearEnd = time.Second

// DelegationToken implements [broker.Minter]. It asks Vault nothing. The token has the policies that its delegation's
// tools had when it was made. An errWider means that the tool's policy is none of them, as Vault answers for a token
// below it.
func (c *Client) DelegationToken(g broker.Grant, policy string) (broker.Handle, error) {
	if !c.cfg.Now().Before(g.Expires) {
		return broker.Handle{}, broker.Errorf(broker.Expired, "issue", "the step has expired").With(broker.CodeExpired)
	}
	if err := c.reachable(); err != nil {
		return broker.Handle{}, err
	}
	n, err := c.touch(g.Delegation)
	if err != nil {
		return broker.Handle{}, c.told(err)
	}
	c.mu.Lock()
	left := n.expires.Sub(c.cfg.Now())
	ending := left < nearEnd && n.expires.Before(n.maxExpires.Add(-nearEnd))
	c.mu.Unlock()
	if ending {
		c.markRefused(n)
		return broker.Handle{}, fmt.Errorf("delegation %s: %w", g.Delegation, broker.ErrNoParent)
	}
	if !slices.Contains(n.policies, policy) {
		return broker.Handle{}, broker.Errorf(broker.Denied, "issue", "the delegation's token in Vault was made without the "+
			"policy of tool %q", g.Tool).With(broker.CodeDelegationWider).Because(errWider)
	}
	return broker.Handle{Accessor: n.accessor, Expires: n.maxExpires}, nil
}

// minter returns the token that mints. It drops a step's own token from memory before the request is sent, so that one
// handle of a step can never mint twice.
func (c *Client) minter(h broker.Handle, m broker.Mint) (s step, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m.Shared == nil {
		s, ok = c.steps[h.Accessor]
		delete(c.steps, h.Accessor)
		return s, ok
	}
	n := c.nodes[h.Accessor]
	if n == nil || n.parent == nil || !n.inUse || !c.aliveLocked(n) {
		return step{}, false
	}
	return step{token: n.token, expires: m.Shared.Expires, tool: m.Shared.Tool, grant: m.Shared.Grant,
		policy: m.Shared.Policy, shared: n}, true
}

// mayShare reports whether a delegation's token may send a mint. Its own policy permits it to make tokens too.
func mayShare(m broker.Mint) bool {
	mount := m.Path.Segments()[0]
	return m.NoLease && mount != "auth" && mount != "sys"
}

// Mint implements [broker.Minter]. A mint with a delegation's token is refused unless its backend says that the secret
// has no lease: nothing that the grant's end must end may hang on a token that stays. The header X-Correlation-Id has
// the grant's id: Vault writes it to its audit log, also where the answer is lost.
func (c *Client) Mint(ctx context.Context, h broker.Handle, m broker.Mint) (broker.Lease, broker.Secret, error) {
	s, ok := c.minter(h, m)
	now := c.cfg.Now()
	if !ok || !now.Before(s.expires) {
		return broker.Lease{}, broker.Secret{},
			fmt.Errorf("minting: the token that mints is not in memory: %w", broker.ErrNotMinted)
	}
	if m.Path.IsZero() || m.Finish == nil || m.Wrap && (!m.Auth || m.TTL <= 0) || m.NoLease && (m.Leased || m.Auth) ||
		s.shared != nil && !mayShare(m) {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("minting: the request is malformed: %w", broker.ErrNotMinted)
	}
	path := m.Path.String()
	r := call{method: "GET", path: path, token: s.token, once: true, correlation: string(s.grant)}
	if m.Data != nil {
		r.method, r.body = "POST", m.Data
	}
	if m.Wrap {
		r.wrap = formatTTL(ceilSecond(m.TTL))
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.MintTimeout)
	defer cancel()
	if err := c.CheckClock(); err != nil && m.Absolute {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("minting: %w: %w", broker.ErrNotMinted, err)
	}
	resp, err := c.wire.send(ctx, r)
	if err != nil && m.Again != nil && answerTo(err).stale {
		return c.signAgain(ctx, r, s, m)
	}
	return c.minted(ctx, resp, err, r.path, s, m)
}

// signAgain signs once more, with a key that the backend has read again. Vault refused the version of the first request,
// so it signed nothing. Where a proxy may have sent that request twice, a signature exists that nobody received. It is
// no secret, and ends by itself.
func (c *Client) signAgain(ctx context.Context, r call, s step, m broker.Mint) (broker.Lease, broker.Secret, error) {
	again, err := m.Again(ctx)
	if err != nil {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("minting: %w: %w", broker.ErrNotMinted, err)
	}
	r.body = again.Data
	resp, err := c.wire.send(ctx, r)
	return c.minted(ctx, resp, err, r.path, s, again)
}

// minted returns the outcome of a mint.
func (c *Client) minted(ctx context.Context, resp response, err error, path string, s step, m broker.Mint) (
	broker.Lease, broker.Secret, error,
) {
	var f *failure
	if s.shared != nil && errors.As(err, &f) && f.badToken() {
		c.markRefused(s.shared) // the next step makes another
	}
	if err != nil && c.notMinted(err) {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("minting: %w: %w", broker.ErrNotMinted, c.toldMint(err, s, path))
	}
	if err != nil {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("minting: %w", err)
	}
	lease, secret, err := c.accept(ctx, resp, path, s, m)
	if err != nil {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("minting: %w", err)
	}
	return lease, secret, nil
}

// notMinted reports whether a failed mint certainly made nothing: the request was not sent, or Vault refused it before
// an engine saw it. A proxy may have sent a request twice, so that its answer, which is the second one, proves nothing.
func (c *Client) notMinted(err error) bool {
	a := answerTo(err)
	return a.nothing && (a.cause != nil || !c.cfg.BehindProxy)
}

// toldMint gives the failure of a mint that made nothing its reason for the agent: Vault refused the path to the step's
// own policy, or the reason of the last check. A token that has ended, as a revoked one, is another reason.
func (c *Client) toldMint(err error, s step, path string) error {
	var f *failure
	if errors.As(err, &f) && f.status == http.StatusForbidden && f.phrase == "permission denied" && s.policy != "" {
		return c.refusal(toolPolicyWrong(s.tool, s.policy, path)).Because(err)
	}
	return c.told(err)
}

// accept checks the response to a mint. A secret that it refuses exists in Vault, so its errors leave the outcome
// unknown and the caller revokes the step's token.
func (c *Client) accept(ctx context.Context, resp response, path string, s step, m broker.Mint) (
	broker.Lease, broker.Secret, error,
) {
	now := c.cfg.Now()
	if m.Wrap {
		return c.acceptWrapped(ctx, resp, path, s, m)
	}
	if m.Auth && resp.Auth != nil && resp.Data == nil && resp.LeaseID == "" {
		return c.acceptToken(resp, s, m)
	}
	switch {
	case m.Auth || resp.Data == nil || resp.Auth != nil || resp.Wrap != nil:
		return broker.Lease{}, broker.Secret{}, errors.New("vault's response is not a secret")
	case m.NoLease && resp.LeaseID != "":
		c.endStray(ctx, resp.LeaseID)
		return broker.Lease{}, broker.Secret{}, errors.New("vault's response has a lease, and such a tool's has none: " +
			"another engine is mounted at its path")
	case m.Leased && resp.LeaseID == "":
		return broker.Lease{}, broker.Secret{},
			errors.New("vault's response has no lease id: this secret could not be revoked")
	case resp.LeaseDuration < 0 || resp.LeaseID != "" && resp.LeaseDuration == 0:
		return broker.Lease{}, broker.Secret{}, errors.New("vault's lease has no expiry")
	}
	lease := broker.Lease{Expires: s.expires, Request: resp.RequestID}
	if resp.LeaseID == "" && !m.Expires.IsZero() {
		lease.Expires = m.Expires
	}
	var end time.Time
	if resp.LeaseID != "" {
		rest, below := strings.CutPrefix(resp.LeaseID, path+"/")
		if !below || broker.CheckVaultName(rest) != nil {
			return broker.Lease{}, broker.Secret{}, errors.New("vault's lease is for another path than the mint")
		}
		if resp.LeaseDuration > maxLeaseSeconds || m.TTL > 0 && seconds(resp.LeaseDuration) > ceilSecond(m.TTL) {
			return broker.Lease{}, broker.Secret{}, errors.New("vault's lease is longer than the tool allows")
		}
		// Counted from now, the latest time at which the lease can have started. The token's expiry bounds it.
		if end = now.Add(seconds(resp.LeaseDuration)); end.After(s.expires) {
			end = s.expires
		}
		lease.ID, lease.Expires = resp.LeaseID, end
	}
	return finish(m, resp.Data, lease, end, now)
}

// endStray revokes a lease that no tool was to give, as far as the broker's policy permits. It ends with the token that
// made it at the latest.
func (c *Client) endStray(ctx context.Context, lease string) {
	if err := c.Revoke(context.WithoutCancel(ctx), lease); err != nil {
		c.cfg.Log.Warn("a lease that no tool was to give was not revoked", "error", err)
	}
}

// acceptToken checks a response that is a token. A token below the step's token ends with it.
func (c *Client) acceptToken(resp response, s step, m broker.Mint) (broker.Lease, broker.Secret, error) {
	if err := resp.checkToken("service"); err != nil {
		return broker.Lease{}, broker.Secret{}, err
	}
	life := seconds(resp.Auth.LeaseDuration)
	if resp.Auth.Orphan || m.TTL > 0 && life > ceilSecond(m.TTL) {
		return broker.Lease{}, broker.Secret{},
			errors.New("vault's token outlives the step's token, or lives longer than the tool allows")
	}
	now := c.cfg.Now()
	end := now.Add(life)
	if end.After(s.expires) {
		end = s.expires
	}
	return finish(m, resp.Auth.Members, broker.Lease{Expires: end, Request: resp.RequestID}, end, now)
}

// finish lets the backend turn the response into the secret for the agent.
func finish(m broker.Mint, data map[string]any, lease broker.Lease, end, now time.Time) (
	broker.Lease, broker.Secret, error,
) {
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
	longest := ceilSecond(m.TTL) + time.Second
	if m.Absolute {
		longest += broker.MaxSkew
	}
	if m.TTL > 0 && lease.Expires.After(now.Add(longest)) {
		f.Secret.Wipe()
		return broker.Lease{}, broker.Secret{}, errors.New("the secret lives longer than the tool allows")
	}
	return lease, f.Secret, nil
}
