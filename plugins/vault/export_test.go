package vault

import (
	"context"
	"time"
)

// Sentinels for tests that compare errors.
var (
	ErrForbidden = errForbidden
	ErrWider     = errWider
	ErrNoSession = errNoSession
)

// TokenLogin lets a test log in with a token of its own instead of an SVID.
func TokenLogin(token string) Login { return Login{token: token} }

// DecodeResponse gives the fuzzer access to the decoder.
func DecodeResponse(raw []byte) (lease string, data map[string]any, err error) {
	r, err := decodeResponse(raw)
	return r.LeaseID, r.Data, err
}

// TokenEnd returns when Vault ends a token, unless it is renewed.
func (c *Client) TokenEnd(ctx context.Context, accessor string) (time.Time, error) {
	resp, err := c.doWithLogin(ctx, call{method: "POST", path: "auth/token/lookup-accessor",
		body: map[string]string{"accessor": accessor}})
	if err != nil {
		return time.Time{}, err
	}
	return parseTime(resp.Data["expire_time"])
}
