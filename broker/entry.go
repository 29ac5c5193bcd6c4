package broker

import "time"

// Revision numbers the entries of the audit log from 1, without gaps.
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

// Op is the kind of an entry.
type Op string

// The ops, in about the order in which they occur in a chain.
const (
	OpOpen      Op = "open"
	OpDelegate  Op = "delegate"
	OpToken     Op = "token" // a Vault token was recorded: a delegation's, or one made ahead for the step Grant
	OpIntent    Op = "intent"
	OpHandle    Op = "handle"
	OpIssued    Op = "issued"
	OpCollected Op = "collected" // a sealed secret was delivered to its collector
	OpUnknown   Op = "unknown"   // the outcome of a mint is unknown
	OpDenied    Op = "denied"
	OpViolation Op = "violation"
	OpSummed    Op = "summed" // refusals of a caller beyond the limit of those recorded one by one, counted for a minute
	// OpEnd: a grant ended, since its agent closed it, it expired or its mint failed. Or final rules that cover no open
	// chain were dropped.
	OpEnd          Op = "end"
	OpFence        Op = "fence"
	OpFreeze       Op = "freeze"
	OpUnfreeze     Op = "unfreeze"
	OpEvidence     Op = "evidence"     // the result of a check of a fenced grant
	OpClosed       Op = "closed"       // a grant is CLOSED, with evidence
	OpClosure      Op = "closure"      // the closure of a revocation changed
	OpAcknowledged Op = "acknowledged" // a holder acknowledged a revocation
	OpOrphan       Op = "orphan"       // a lease or login has a grant's name that the ledger does not know
	OpPlant        Op = "plant"        // an operator planted a canary
	OpPull         Op = "pull"         // an operator removed a canary
	OpResume       Op = "resume"       // the broker started and took its unfinished work up again
	OpPolicy       Op = "policy"       // a policy bundle came into force
	OpArchived     Op = "archived"     // a segment of the archive was listed, or its records were removed from the ledger
	OpDelivered    Op = "delivered"    // the delivery cursor of a subscriber moved to a revision
)

// former maps the names of ops before the first release to the current ops.
var former = map[Op]Op{"heard": OpAcknowledged, "stray": OpOrphan, "told": OpDelivered}

// Current returns the current name of an op that an earlier build may have written.
func (o Op) Current() Op {
	if now, ok := former[o]; ok {
		return now
	}
	return o
}
