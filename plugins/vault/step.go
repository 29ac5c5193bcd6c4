package vault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// step is a step's token, in memory from Child to Mint.
type step struct {
	token   string
	expires time.Time // its hard expiry
	tool    broker.ToolName
	policy  string // its only one
}

// errTooManySteps means that maxSteps step tokens are in memory.
var errTooManySteps = errors.New("too many vault step tokens wait for their mint")

// Child implements [broker.Minter]. An ErrNoParent means that the delegation has no usable token in memory: branch it
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
	c.steps[h.Accessor] = step{token: n.token, expires: h.Expires, tool: g.Tool, policy: policy}
	c.mu.Unlock()
	return h, nil
}

// Mint implements [broker.Minter]. It drops the token from memory before it sends the request, so that one handle can
// never mint twice.
func (c *Client) Mint(ctx context.Context, h broker.Handle, m broker.Mint) (broker.Lease, broker.Secret, error) {
	c.mu.Lock()
	s, ok := c.steps[h.Accessor]
	delete(c.steps, h.Accessor)
	c.mu.Unlock()
	now := c.cfg.Now()
	if !ok || !now.Before(s.expires) {
		return broker.Lease{}, broker.Secret{},
			fmt.Errorf("minting: the step's token is not in memory: %w", broker.ErrNotMinted)
	}
	if m.Path.IsZero() || m.Finish == nil || m.Wrap && (!m.Auth || m.TTL <= 0) {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("minting: the request is malformed: %w", broker.ErrNotMinted)
	}
	path := m.Path.String()
	r := call{method: "GET", path: path, token: s.token, once: true}
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
	case m.Leased && resp.LeaseID == "":
		return broker.Lease{}, broker.Secret{},
			errors.New("vault's response has no lease id: this secret could not be revoked")
	case resp.LeaseDuration < 0 || resp.LeaseID != "" && resp.LeaseDuration == 0:
		return broker.Lease{}, broker.Secret{}, errors.New("vault's lease has no expiry")
	}
	lease := broker.Lease{Expires: s.expires}
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
	return finish(m, resp.Auth.Members, broker.Lease{Expires: end}, end, now)
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
