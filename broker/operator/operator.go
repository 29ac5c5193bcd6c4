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

// ChainPage returns at most limit of the active chains, or of all chains, the latest first. The first page has an empty
// after, and the next one the Next of the page before. A limit of zero is the broker's default.
func (c *Client) ChainPage(ctx context.Context, all bool, after string, limit int) (api.Chains, error) {
	q := page(after, limit)
	if all {
		q.Set("all", "true")
	}
	return get[api.Chains](ctx, c, "/v1/chains?"+q.Encode())
}

// Chains is ChainPage for all pages.
func (c *Client) Chains(ctx context.Context, all bool) ([]api.ChainSummary, error) {
	return collect(func(after string) ([]api.ChainSummary, string, error) {
		p, err := c.ChainPage(ctx, all, after, most)
		return p.Chains, p.Next, err
	})
}

// Chain returns one chain with all its delegations and grants, in one request for each page of them.
func (c *Client) Chain(ctx context.Context, id string) (v api.ChainView, err error) {
	for after, more := "", true; more && err == nil; more = after != "" {
		var p api.ChainView
		p, err = get[api.ChainView](ctx, c, "/v1/chains/"+url.PathEscape(id)+"?"+page(after, most).Encode())
		v.Chain, after = p.Chain, p.Next
		v.Delegations, v.Grants = append(v.Delegations, p.Delegations...), append(v.Grants, p.Grants...)
	}
	return v, err
}

// Plan returns the scope of a revocation.
func (c *Client) Plan(ctx context.Context, selector string) (api.Plan, error) {
	return post[api.Plan](ctx, c, "/v1/plans", api.PlanRequest{Selector: selector})
}

// Revoke revokes or freezes. When it returns, the selected set is fenced. [Client.Follow] waits until it is dead.
func (c *Client) Revoke(ctx context.Context, r api.RevokeRequest) (api.Revocation, error) {
	return post[api.Revocation](ctx, c, "/v1/revocations", r)
}

// RevocationPage returns a page of the revocations, the latest first, as ChainPage does.
func (c *Client) RevocationPage(ctx context.Context, after string, limit int) (api.Revocations, error) {
	return get[api.Revocations](ctx, c, "/v1/revocations?"+page(after, limit).Encode())
}

// Revocations is RevocationPage for all pages.
func (c *Client) Revocations(ctx context.Context) ([]api.Revocation, error) {
	return collect(func(after string) ([]api.Revocation, string, error) {
		p, err := c.RevocationPage(ctx, after, most)
		return p.Revocations, p.Next, err
	})
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

// CanaryPage returns a page of the canaries, the latest first, as ChainPage does.
func (c *Client) CanaryPage(ctx context.Context, after string, limit int) (api.Canaries, error) {
	return get[api.Canaries](ctx, c, "/v1/canaries?"+page(after, limit).Encode())
}

// Canaries is CanaryPage for all pages.
func (c *Client) Canaries(ctx context.Context) ([]api.Canary, error) {
	return collect(func(after string) ([]api.Canary, string, error) {
		p, err := c.CanaryPage(ctx, after, most)
		return p.Canaries, p.Next, err
	})
}

// Pull removes a canary.
func (c *Client) Pull(ctx context.Context, id string) (api.Canary, error) {
	return post[api.Canary](ctx, c, "/v1/canaries/"+url.PathEscape(id)+"/pull", api.Nothing{})
}

// Audit returns at most limit entries of the audit log after a revision, and the revision after which the next page
// starts. A limit of zero is the broker's default.
func (c *Client) Audit(ctx context.Context, after uint64, limit int) (api.Entries, error) {
	return get[api.Entries](ctx, c, "/v1/audit?"+page(strconv.FormatUint(after, 10), limit).Encode())
}

// ChainAudit is Audit for one chain.
func (c *Client) ChainAudit(ctx context.Context, id string, after uint64, limit int) (api.Entries, error) {
	return get[api.Entries](ctx, c, "/v1/chains/"+url.PathEscape(id)+"/audit?"+page(strconv.FormatUint(after, 10), limit).Encode())
}

// most is the largest page that a broker gives.
const most = 1000

// page is the query for a page.
func page(after string, limit int) url.Values {
	q := url.Values{}
	if after != "" {
		q.Set("after", after)
	}
	if limit > 0 {
		q.Set("limit", strconv.Itoa(limit))
	}
	return q
}

// collect reads all pages of a list.
func collect[T any](read func(after string) (list []T, next string, err error)) (all []T, err error) {
	for after := ""; ; {
		list, next, err := read(after)
		if all = append(all, list...); err != nil || next == "" {
			return all, err
		}
		after = next
	}
}

func get[Out any](ctx context.Context, c *Client, path string) (out Out, err error) {
	err = c.http.Call(ctx, http.MethodGet, path, nil, nil, &out)
	return out, err
}

func post[Out any](ctx context.Context, c *Client, path string, in any) (out Out, err error) {
	err = c.http.Call(ctx, http.MethodPost, path, nil, in, &out)
	return out, err
}
