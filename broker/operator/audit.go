package operator

import (
	"context"
	"net/url"
)

// Report returns the signed report of a revocation, a compact JWS. A broker without a signing key answers with the
// code "no_signing_key".
func (c *Client) Report(ctx context.Context, id string) ([]byte, error) {
	return c.http.Fetch(ctx, "/v1/revocations/"+url.PathEscape(id)+"/report")
}

// Checkpoint returns a signed checkpoint of the audit log, a note. Kept outside the broker, it shows later whether an
// earlier entry was changed or removed.
func (c *Client) Checkpoint(ctx context.Context) ([]byte, error) {
	return c.http.Fetch(ctx, "/v1/audit/checkpoint")
}
