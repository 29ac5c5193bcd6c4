package audit

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker"
)

// ReportType is the typ of a report's JWS.
const ReportType = "pawl-report+jws"

// Limits of a report. Items above a limit are counted and left out. A grant that may still work is never left out in
// favour of a dead one.
const (
	MaxReport   = 64 << 20 // bytes of its JWS
	MaxGrants   = 5000     // grants listed
	MaxTimeline = 5000     // entries of the timeline
	MaxAgents   = 5000     // acknowledgements listed
)

// Report describes the scope and the result of a revocation, from the ledger at the time of the report. It holds no
// secret, and nothing that can end or use one.
type Report struct {
	Version    int               `json:"version"` // 1
	Issuer     string            `json:"issuer"`  // the signer's name
	Made       time.Time         `json:"made"`
	Revocation broker.Revocation `json:"revocation"`

	Chains        []Chain                  `json:"chains"`                // with something in scope
	Timeline      []broker.Entry           `json:"timeline"`              // the decisions and their consequences; the progress of single grants is in Grants
	TimelineMore  int                      `json:"timeline_more"`         // entries left out, the latest of the timeline
	Grants        []Grant                  `json:"grants"`                // in scope, those that may still work first
	GrantsMore    int                      `json:"grants_more"`           // left out
	Agents        []broker.Acknowledgement `json:"agents,omitzero"`       // the holders notified, and when they acknowledged; not part of the closure
	AgentsMore    int                      `json:"agents_more,omitzero"`  // left out, after the holders without an acknowledgement
	Window        Window                   `json:"window"`                // between the breach and the fence
	Residual      Residual                 `json:"residual"`              // the remaining risk
	Untouched     []Untouched              `json:"untouched"`             // close to it and not revoked
	UntouchedMore int                      `json:"untouched_unseen"`      // open chains that were not searched for these
	LiftedAlone   []Lifted                 `json:"lifted_alone,omitzero"` // every freeze of this broker that root lifted without a second person
}

// Lifted is a freeze that root lifted on a stopped broker, without a second person.
type Lifted struct {
	Revocation broker.RevocationID `json:"revocation"`
	At         time.Time           `json:"at"`
	Reason     string              `json:"reason"`
}

// Chain is a chain with something in the revocation's scope.
type Chain struct {
	ID          broker.ChainID `json:"id"`
	Task        string         `json:"task"`
	Opener      string         `json:"opener"`
	Opened      time.Time      `json:"opened"`
	Delegations int            `json:"delegations"` // in scope
	Grants      int            `json:"grants"`      // in scope, including those that ended before the fence

	Envelope *broker.Envelope `json:"envelope,omitzero"` // left out: it was opened with none, and the task is the opener's claim
}

// Grant is a grant in the revocation's scope.
type Grant struct {
	ID         broker.GrantID      `json:"id"`
	Chain      broker.ChainID      `json:"chain"`
	Delegation broker.DelegationID `json:"delegation"`
	Caller     string              `json:"caller"`
	Tool       broker.ToolName     `json:"tool"`
	Narrowing  string              `json:"narrowing"`
	Args       string              `json:"args"` // canonical JSON, byte for byte
	Purpose    string              `json:"purpose,omitzero"`
	Path       string              `json:"path,omitzero"`    // Vault mount and role
	Lease      string              `json:"lease,omitzero"`   // Vault's lease id
	Ref        string              `json:"ref,omitzero"`     // the backend's name for the secret
	Request    string              `json:"request,omitzero"` // the id of the mint's request in Vault's audit log; left out: not recorded
	Created    time.Time           `json:"created"`
	HandedOver time.Time           `json:"handed_over,omitzero"` // from then on the agent may have had the secret; left out: not recorded
	Ended      time.Time           `json:"ended,omitzero"`       // with evidence; left out: not ended
	Ending     broker.Ending       `json:"ending,omitzero"`
	Before     bool                `json:"before,omitzero"` // ended before the fence
	Outcome    broker.Outcome      `json:"outcome"`         // empty: not proven either way
	LatestEnd  time.Time           `json:"latest_end"`      // it expires by then, unless it is static
	Evidence   []broker.Evidence   `json:"evidence"`
}

// Window lists the secrets that could be used between the first recorded breach and the fence.
type Window struct {
	Breach *broker.Entry    `json:"breach,omitzero"` // the first violation before the fence in the chains in scope; left out: none is recorded
	Fenced time.Time        `json:"fenced"`
	Issued []broker.GrantID `json:"issued"` // handed over in the window
	Live   []broker.GrantID `json:"live"`   // handed over before it, and not ended when it began
}

// Residual lists the secrets that the revocation did not, or could not, make harmless.
type Residual struct {
	Rotate      []broker.GrantID `json:"rotate"`              // static: works until it is rotated at its source
	Alive       []broker.GrantID `json:"alive"`               // shown to be alive
	Unproven    []broker.GrantID `json:"unproven"`            // not proven either way
	LatestEnd   time.Time        `json:"latest_end,omitzero"` // alive and unproven ones expire by then
	Tokens      int              `json:"tokens"`              // delegation tokens not confirmed revoked
	Listed      []broker.GrantID `json:"listed"`              // dead for a verifier that checks the list or introspects (ssh, pki, jwt); any other accepts them until ListedEnd
	ListedEnd   time.Time        `json:"listed_end,omitzero"` // these expire everywhere by then
	EndedBefore int              `json:"over_before"`         // secrets handed over and ended before the fence; their use is not undone
}

// Untouched is a usable delegation close to the revocation but outside it: in one of its chains, or with one of its
// holders.
type Untouched struct {
	Chain      broker.ChainID      `json:"chain"`
	Delegation broker.DelegationID `json:"delegation"`
	Holder     string              `json:"holder"`
	Expires    time.Time           `json:"expires"`
	Live       int                 `json:"live"`       // grants directly under it that have not ended
	SameChain  bool                `json:"same_chain"` // otherwise it shares a holder
}

// Sign returns the report as a compact JWS of typ [ReportType].
func (s *Signer) Sign(r Report) ([]byte, error) {
	r.Issuer = s.name
	payload, err := r.encode()
	if err != nil {
		return nil, err
	}
	return s.jws(payload), nil
}

// encode returns the canonical JSON of the report.
func (r Report) encode() ([]byte, error) {
	payload, err := json.Marshal(r, json.Deterministic(true))
	if err != nil {
		return nil, fmt.Errorf("encoding the report of %s: %w", r.Revocation.ID, err)
	}
	return payload, nil
}

var errVersion = errors.New("unknown report version")

// VerifyReport opens a signed report with the public key alone. Errors wrap [ErrForeign] if another key signed it or
// it is not a report. They wrap [ErrChanged] if it differs from the signed report.
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
		return Report{}, errVersion
	}
	if again, err := r.encode(); err != nil || !bytes.Equal(again, payload) {
		return Report{}, errVersion
	}
	return r, nil
}
