package agent

import (
	"context"
	"fmt"
	"net/http"

	"github.com/pawlsec/pawl/broker/api"
)

// Violation is a breach of policy under a delegation.
type Violation struct {
	Code       string       // such as "prompt_injection": lower-case letters, digits and _, at most 64; required
	Delegation DelegationID // required
	Grant      GrantID      // the step that broke policy; empty: no step in particular
	Detail     string       // for the audit; at most 256 bytes
}

// Reported is the broker's answer to a report.
type Reported struct {
	Consequence string       // "deny" (only recorded), "revoke-step", "revoke-subtree", "revoke-chain", "freeze-caller"
	Revocation  RevocationID // empty: nothing was revoked
}

// Report reports a violation. The agent must hold the delegation or one above it, or policy must permit
// it to report. Policy decides the consequence. Report blocks for one request. It may be repeated after
// ErrUnavailable: the broker records a second report like the first.
func (c *Client) Report(ctx context.Context, v Violation) (Reported, error) {
	in := api.ReportRequest{
		Delegation: string(v.Delegation), Grant: string(v.Grant), Violation: v.Code, Detail: v.Detail,
	}
	var out api.Reported
	err := c.http.Call(ctx, http.MethodPost, "/v1/violations", nil, in, &out)
	reported := Reported{Consequence: out.Consequence}
	if err == nil && out.Revocation != "" {
		reported.Revocation = answerID(out.Revocation, ParseRevocationID, &err)
	}
	if err != nil {
		return Reported{}, fmt.Errorf("reporting a violation: %w", err)
	}
	return reported, nil
}
