// Package operator is the client for operators. It reads chains, plans and starts revocations, follows them and reads
// the audit log. Errors are *[api.Problem].
package operator

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
)

// Config holds the address of the operators' listener and the operator's identity.
type Config = client.Config

// Client connects to one broker as one operator. Create one with [New]; it is safe for concurrent use. Each method
// except Follow blocks for one request, which it never repeats.
type Client struct {
	http     *client.Client
	patience time.Duration
}

// New validates cfg and returns a client. It opens no connection.
func New(cfg Config) (*Client, error) {
	h, err := client.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("operator: %w", err)
	}
	return &Client{h, cmp.Or(cfg.Patience, time.Minute)}, nil
}

// Close closes idle connections.
func (c *Client) Close() { c.http.Close() }

// Chains lists the active chains, or all chains, the latest first.
func (c *Client) Chains(ctx context.Context, all bool) ([]api.ChainSummary, error) {
	path := "/v1/chains"
	if all {
		path += "?all=true"
	}
	list, err := get[api.Chains](ctx, c, path)
	return list.Chains, err
}

// Chain returns one chain with its delegations and grants.
func (c *Client) Chain(ctx context.Context, id string) (api.ChainView, error) {
	return get[api.ChainView](ctx, c, "/v1/chains/"+url.PathEscape(id))
}

// Plan returns the scope of a revocation.
func (c *Client) Plan(ctx context.Context, selector string) (api.Plan, error) {
	return post[api.Plan](ctx, c, "/v1/plans", api.PlanRequest{Selector: selector})
}

// Revoke revokes or freezes. When it returns, the selected set is fenced. [Client.Follow] waits until it is dead.
func (c *Client) Revoke(ctx context.Context, r api.RevokeRequest) (api.Revocation, error) {
	return post[api.Revocation](ctx, c, "/v1/revocations", r)
}

// Revocations lists the revocations, the latest first.
func (c *Client) Revocations(ctx context.Context) ([]api.Revocation, error) {
	list, err := get[api.Revocations](ctx, c, "/v1/revocations")
	return list.Revocations, err
}

// Revocation returns the progress of a revocation.
func (c *Client) Revocation(ctx context.Context, id string) (api.Revocation, error) {
	return get[api.Revocation](ctx, c, "/v1/revocations/"+url.PathEscape(id))
}

// Unfreeze asks to lift a freeze. The first operator receives a problem with the code "second_person_needed", and the
// second the lifted freeze.
func (c *Client) Unfreeze(ctx context.Context, id string) (api.Revocation, error) {
	return post[api.Revocation](ctx, c, "/v1/revocations/"+url.PathEscape(id)+"/unfreeze", api.Nothing{})
}

// Plant plants a canary. Its value is in this answer and in no other.
func (c *Client) Plant(ctx context.Context, r api.PlantRequest) (api.Planted, error) {
	return post[api.Planted](ctx, c, "/v1/canaries", r)
}

// Canaries lists the canaries, the latest first.
func (c *Client) Canaries(ctx context.Context) ([]api.Canary, error) {
	list, err := get[api.Canaries](ctx, c, "/v1/canaries")
	return list.Canaries, err
}

// Pull removes a canary.
func (c *Client) Pull(ctx context.Context, id string) (api.Canary, error) {
	return post[api.Canary](ctx, c, "/v1/canaries/"+url.PathEscape(id)+"/pull", api.Nothing{})
}

// Audit returns at most limit entries of the audit log after a revision, and the revision after which the next page
// starts. A limit of zero is the broker's default.
func (c *Client) Audit(ctx context.Context, after uint64, limit int) (api.Entries, error) {
	return get[api.Entries](ctx, c, "/v1/audit"+page(after, limit))
}

// ChainAudit is Audit for one chain.
func (c *Client) ChainAudit(ctx context.Context, id string, after uint64, limit int) (api.Entries, error) {
	return get[api.Entries](ctx, c, "/v1/chains/"+url.PathEscape(id)+"/audit"+page(after, limit))
}

func page(after uint64, limit int) string {
	q := url.Values{"after": {strconv.FormatUint(after, 10)}}
	if limit > 0 {
		q.Set("limit", strconv.Itoa(limit))
	}
	return "?" + q.Encode()
}

func get[Out any](ctx context.Context, c *Client, path string) (out Out, err error) {
	err = c.http.Call(ctx, http.MethodGet, path, nil, nil, &out)
	return out, err
}

func post[Out any](ctx context.Context, c *Client, path string, in any) (out Out, err error) {
	err = c.http.Call(ctx, http.MethodPost, path, nil, in, &out)
	return out, err
}
