package broker

import "time"

// Revision numbers the entries of the ledger's audit log from 1, without gaps.
type Revision uint64

// Entry is one line of the audit log. It never holds a secret, a token or an SVID.
type Entry struct {
	Revision   Revision     `json:"revision"`
	At         time.Time    `json:"at"`
	Actor      string       `json:"actor"` // a SPIFFE ID, an operator's name, or "pawl"
	Op         Op           `json:"op"`
	Chain      ChainID      `json:"chain,omitempty"`
	Delegation DelegationID `json:"delegation,omitempty"`
	Grant      GrantID      `json:"grant,omitempty"`
	Revocation RevocationID `json:"revocation,omitempty"`
	Tool       ToolName     `json:"tool,omitempty"`
	Code       Code         `json:"code,omitempty"`
	Bundle     string       `json:"bundle,omitempty"`   // digest of the policy bundle that decided
	Policies   []string     `json:"policies,omitempty"` // ids of the policies that decided
	Detail     string       `json:"detail,omitempty"`
}

// Op says what an entry records.
type Op string

// The ops, in about the order in which a chain sees them.
const (
	OpOpen         Op = "open"
	OpDelegate     Op = "delegate"
	OpToken        Op = "token" // a delegation's Vault token was recorded
	OpIntent       Op = "intent"
	OpHandle       Op = "handle"
	OpIssued       Op = "issued"
	OpCollected    Op = "collected" // a sealed secret was given to its collector
	OpUnknown      Op = "unknown"   // a mint's outcome is not known
	OpDenied       Op = "denied"
	OpViolation    Op = "violation"
	OpEnd          Op = "end" // a grant was closed by its agent, expired or was given up
	OpFence        Op = "fence"
	OpFreeze       Op = "freeze"
	OpUnfreeze     Op = "unfreeze"
	OpEvidence     Op = "evidence"     // what a check of a fenced grant found
	OpClosed       Op = "closed"       // a grant is over, with evidence
	OpClosure      Op = "closure"      // a revocation's state changed
	OpAcknowledged Op = "acknowledged" // a holder acknowledged a revocation
	OpOrphan       Op = "orphan"       // something lives under our names that the ledger does not know
	OpPlant        Op = "plant"        // an operator planted a canary
	OpPull         Op = "pull"         // an operator took one away
	OpResume       Op = "resume"
	OpPolicy       Op = "policy"    // a policy bundle came into force
	OpDelivered    Op = "delivered" // up to which revision events were delivered to a subscriber
)

// former has the ops that builds before the first release wrote under other names.
var former = map[Op]Op{"heard": OpAcknowledged, "stray": OpOrphan, "told": OpDelivered}

// Current gives today's name of an op that an earlier build may have written.
func (o Op) Current() Op {
	if now, ok := former[o]; ok {
		return now
	}
	return o
}
