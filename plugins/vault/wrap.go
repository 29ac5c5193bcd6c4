package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// acceptWrapped checks a response that wraps a token. The response does not describe the wrapped token, so
// acceptWrapped looks it up by its accessor. The wrapping token is not a child of the step's token, so acceptWrapped
// revokes one that it refuses. The wrapped token ends with the step's token.
func (c *Client) acceptWrapped(ctx context.Context, resp response, path string, s step, m broker.Mint) (
	broker.Lease, broker.Secret, error,
) {
	lease, secret, err := c.checkWrapped(ctx, resp, path, s, m)
	if err != nil && resp.Wrap != nil && validToken(resp.Wrap.Accessor) {
		c.discard(ctx, resp.Wrap.Accessor)
	}
	return lease, secret, err
}

func (c *Client) checkWrapped(ctx context.Context, resp response, path string, s step, m broker.Mint) (
	broker.Lease, broker.Secret, error,
) {
	w := resp.Wrap
	switch {
	case w == nil || resp.Auth != nil || resp.Data != nil || resp.LeaseID != "":
		return broker.Lease{}, broker.Secret{}, errors.New("vault's response is not wrapped")
	case !validToken(w.Token) || !validToken(w.Accessor) || !validToken(w.WrappedAccessor) ||
		w.WrappedAccessor == w.Accessor:
		return broker.Lease{}, broker.Secret{}, errors.New("vault's response wraps no token that could be revoked")
	case w.CreationPath != path:
		return broker.Lease{}, broker.Secret{},
			errors.New("vault's response wraps a token from another path than the mint")
	case w.TTL <= 0 || w.TTL > maxLeaseSeconds || m.TTL > 0 && seconds(w.TTL) > ceilSecond(m.TTL):
		return broker.Lease{}, broker.Secret{}, errors.New("vault's wrapping token lives longer than the tool allows")
	}
	wrapped, err := c.doWithLogin(ctx, call{method: "POST", path: "auth/token/lookup-accessor",
		body: map[string]string{"accessor": w.WrappedAccessor}})
	if err != nil {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("looking up the wrapped token: %w", err)
	}
	life, err := checkWrappedToken(wrapped.Data, w, path, m.TTL)
	if err != nil {
		return broker.Lease{}, broker.Secret{}, err
	}
	now := c.cfg.Now()
	end := now.Add(max(life, seconds(w.TTL))) // the later one, since the agent may unwrap it or not
	if end.After(s.expires) {
		end = s.expires
	}
	w.Members["auth"] = wrapped.Data
	return finish(m, w.Members, broker.Lease{Expires: end}, end, now)
}

// checkWrappedToken applies the checks of acceptToken to the look-up of the wrapped token.
func checkWrappedToken(token map[string]any, w *wrapInfo, path string, limit time.Duration) (time.Duration, error) {
	accessor, _ := token["accessor"].(string)
	created, _ := token["path"].(string)
	kind, _ := token["type"].(string)
	orphan, hasOrphan := token["orphan"].(bool)
	digits, _ := token["ttl"].(json.Number)
	ttl, err := digits.Int64()
	switch {
	case accessor != w.WrappedAccessor || created != path || kind != "service":
		return 0, errors.New("vault's wrapped token does not match the request")
	case err != nil || ttl <= 0 || ttl > maxLeaseSeconds:
		return 0, errors.New("vault's wrapped token has no expiry, or one more than ten years away")
	case !hasOrphan || orphan || limit > 0 && seconds(ttl) > ceilSecond(limit):
		return 0, errors.New("vault's wrapped token outlives the step's token, or lives longer than the tool allows")
	}
	return seconds(ttl), nil
}
