package audit

import (
	"bytes"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker"
)

// ReportType is the typ of a report's JWS.
const ReportType = "pawl-report+jws"

// Limits of a report. What is over them is counted and left out; what may still work is never
// left out for what is dead.
const (
	MaxReport   = 64 << 20 // bytes of its JWS
	MaxGrants   = 5000     // grants listed
	MaxTimeline = 5000     // entries of the timeline
	MaxAgents   = 5000     // holders listed who were to hear of it
)

// Report tells what a revocation was about and what it came to, as the ledger had it when the
// report was made. It holds no secret, and nothing by which one could be ended or used.
type Report struct {
	Version    int               `json:"version"` // 1
	Issuer     string            `json:"issuer"`  // the signer's name
	Made       time.Time         `json:"made"`
	Revocation broker.Revocation `json:"revocation"`

	Chains        []Chain                  `json:"chains"`               // with something in its scope
	Timeline      []broker.Entry           `json:"timeline"`             // what was decided and what followed; the grants' own steps are with them
	TimelineMore  int                      `json:"timeline_more"`        // entries that were left out, the latest of the timeline
	Grants        []Grant                  `json:"grants"`               // in its scope, those that may still work first
	GrantsMore    int                      `json:"grants_more"`          // that were left out
	Agents        []broker.Acknowledgement `json:"agents,omitzero"`      // who was to hear of it, and when they said that they had; no part of the closure
	AgentsMore    int                      `json:"agents_more,omitzero"` // that were left out, after those who have not said so
	Window        Window                   `json:"window"`               // between the breach and the fence
	Residual      Residual                 `json:"residual"`             // what is left to worry about
	Untouched     []Untouched              `json:"untouched"`            // what stands close to it and was not revoked
	UntouchedMore int                      `json:"untouched_unseen"`     // open chains that were not looked through for it
}

// Chain is a chain with something in the revocation's scope.
type Chain struct {
	ID          broker.ChainID `json:"id"`
	Task        string         `json:"task"`
	Opener      string         `json:"opener"`
	Opened      time.Time      `json:"opened"`
	Delegations int            `json:"delegations"` // in scope
	Grants      int            `json:"grants"`      // in scope, those that were over before the fence too
}

// Grant is a grant in the revocation's scope.
type Grant struct {
	ID         broker.GrantID      `json:"id"`
	Chain      broker.ChainID      `json:"chain"`
	Delegation broker.DelegationID `json:"delegation"`
	Caller     string              `json:"caller"`
	Tool       broker.ToolName     `json:"tool"`
	Narrowing  string              `json:"narrowing"`
	Args       string              `json:"args"` // canonical JSON, to the letter
	Purpose    string              `json:"purpose,omitzero"`
	Path       string              `json:"path,omitzero"`  // Vault mount and role
	Lease      string              `json:"lease,omitzero"` // Vault's lease id
	Ref        string              `json:"ref,omitzero"`   // what the backend calls the secret
	Created    time.Time           `json:"created"`
	HandedOver time.Time           `json:"handed_over,omitzero"` // from here on the agent may have had the secret; left out: it never had
	Ended      time.Time           `json:"ended,omitzero"`       // with evidence; left out: it is not over
	Ending     broker.Ending       `json:"ending,omitzero"`
	Before     bool                `json:"before,omitzero"` // it was over before the fence
	Outcome    broker.Outcome      `json:"outcome"`         // empty: not proven either way
	LatestEnd  time.Time           `json:"latest_end"`      // it ends by itself by then, unless it is static
	Evidence   []broker.Evidence   `json:"evidence"`
}

// Window is what could be used between the first recorded breach and the fence.
type Window struct {
	Breach *broker.Entry    `json:"breach,omitzero"` // the first violation in the scope's chains before the fence; left out: none is recorded
	Fenced time.Time        `json:"fenced"`
	Issued []broker.GrantID `json:"issued"` // handed over in the window
	Live   []broker.GrantID `json:"live"`   // handed over before it, and not over when it began
}

// Residual is what the revocation did not, or could not, make harmless.
type Residual struct {
	Rotate     []broker.GrantID `json:"rotate"`              // static: works until it is rotated where it is kept
	Alive      []broker.GrantID `json:"alive"`               // shown to work still
	Unproven   []broker.GrantID `json:"unproven"`            // not shown either way
	LatestEnd  time.Time        `json:"latest_end,omitzero"` // alive and unproven ones end by themselves by then
	Tokens     int              `json:"tokens"`              // delegation tokens not shown revoked
	Listed     []broker.GrantID `json:"listed"`              // dead for whoever looks at a list or asks (ssh, pki, jwt): a verifier that does neither takes them until ListedEnd
	ListedEnd  time.Time        `json:"listed_end,omitzero"` // by which these end by themselves everywhere
	OverBefore int              `json:"over_before"`         // secrets handed over and over before the fence: what was done with them stays done
}

// Untouched is a delegation that can still be used and stands close to the revocation: in one of its
// chains, or with one of its holders.
type Untouched struct {
	Chain      broker.ChainID      `json:"chain"`
	Delegation broker.DelegationID `json:"delegation"`
	Holder     string              `json:"holder"`
	Expires    time.Time           `json:"expires"`
	Live       int                 `json:"live"`       // grants directly under it that are not over
	SameChain  bool                `json:"same_chain"` // else it shares a holder
}

// Sign gives the report as a compact JWS of typ [ReportType].
func (s *Signer) Sign(r Report) ([]byte, error) {
	r.Issuer = s.name
	payload, err := r.encode()
	if err != nil {
		return nil, err
	}
	return s.jws(payload), nil
}

// encode gives the one JSON text of the report.
func (r Report) encode() ([]byte, error) {
	payload, err := json.Marshal(r, json.Deterministic(true))
	if err != nil {
		return nil, fmt.Errorf("encoding the report of %s: %w", r.Revocation.ID, err)
	}
	return payload, nil
}

// VerifyReport opens a signed report with the public key alone. Errors wrap [ErrForeign] when
// another key signed it or it is no report, and [ErrChanged] when it is not what was signed.
func VerifyReport(jws []byte, key jose.JSONWebKey) (Report, error) {
	var r Report
	if len(jws) > MaxReport {
		return r, fmt.Errorf("%w: larger than %d bytes", ErrForeign, MaxReport)
	}
	payload, err := openJWS(jws, key)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(payload, &r, json.RejectUnknownMembers(true)); err != nil || r.Version != 1 {
		return Report{}, fmt.Errorf("the report is of a version that is not known here")
	}
	if again, err := r.encode(); err != nil || !bytes.Equal(again, payload) {
		return Report{}, fmt.Errorf("the report is of a version that is not known here")
	}
	return r, nil
}
