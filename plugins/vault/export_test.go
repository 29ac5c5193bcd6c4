package vault

import (
	"context"
	"time"

	"github.com/pawlsec/pawl/broker"
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

// Row is a row of the table of answers.
type Row struct {
	When, Phrase, Says string
	Status             int
	Nothing, Answered  bool
	Kind               broker.Kind
	Code               broker.Code
	Wait               time.Duration
}

// Rows returns the table of answers.
func Rows() (rows []Row) {
	for i, a := range answers {
		kind := a.kind
		if kind == broker.Internal {
			kind = broker.Unavailable
		}
		rows = append(rows, Row{When: a.when, Phrase: a.phrase, Says: a.says, Status: a.status, Nothing: a.nothing,
			Answered: a.cause == nil && i < len(answers)-1, Kind: kind, Code: a.code, Wait: a.wait})
	}
	return rows
}

// Bounds returns the bounds of the difference between the clocks.
func (c *Client) Bounds() (low, high time.Duration) {
	b, _ := c.wire.clock.read()
	return b.low, b.high
}
