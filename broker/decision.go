package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker/args"
)

// Action is what a question is about.
type Action string

// The actions.
const (
	ActionOpen     Action = "open"     // may open a chain whose scope has the tool
	ActionUse      Action = "use"      // may take this step
	ActionDelegate Action = "delegate" // may pass the tool on to Receiver
	ActionReport   Action = "report"   // Violation was reported or noticed: what follows
)

// Question is everything a decision depends on. Purpose and other free text of the agent are
// not in it: justification never influences a decision.
type Question struct {
	Action    Action
	Caller    Caller
	Tool      Tool          // the zero Tool for a report that names none
	Args      args.Args     // for use
	Receiver  spiffeid.ID   // for delegate
	Violation ViolationCode // for report
	Chain     Chain
	Depth     int               // of the caller's delegation: 0 at the root
	History   map[ToolName]Past // what the whole chain has begun before this
	Now       time.Time
}

// Decision is allow or deny and what comes with it. The zero Decision denies.
type Decision struct {
	Allow       bool
	Policies    []string      // ids of the policies that decided
	Consequence Consequence   // of a deny: what follows
	Approval    string        // of an allow: who must approve first ("2 of oncall"); empty: nobody
	TTL         time.Duration // of an allow: the longest life; zero: the tool's
	Narrowing   Narrowing     // of an allow: the weakest label accepted
	Domains     []string      // of an allow to delegate: the trust domains that the permit names
	Failed      bool          // something failed to evaluate, so this is a deny
	Remedy      string        // how to ask, in the bundle's own words, at most MaxRemedy bytes; empty: it has none
}

// Consequence is what follows a violation. The zero value is that the request is refused and
// nothing else.
type Consequence uint8

// The consequences, mildest first.
const (
	ConsequenceDeny Consequence = iota
	ConsequenceRevokeStep
	ConsequenceRevokeSubtree
	ConsequenceRevokeChain
	ConsequenceFreezeCaller // freeze the caller everywhere, and revoke the chain
)

var consequenceNames = []string{"deny", "revoke-step", "revoke-subtree", "revoke-chain", "freeze-caller"}

func (c Consequence) String() string { return consequenceNames[min(int(c), len(consequenceNames)-1)] }

// ParseConsequence reads a name as the @violation annotation writes it.
func ParseConsequence(s string) (Consequence, bool) {
	for i, name := range consequenceNames {
		if s == name {
			return Consequence(i), true
		}
	}
	return ConsequenceDeny, false
}

// ViolationCode names a breach that policy may attach a consequence to.
type ViolationCode string

// The violations that the broker notices itself. Reporters may send others of the same form:
// lower-case words joined by underscores.
const (
	ViolationForbidden ViolationCode = "forbidden_tool"   // a forbid with @violation
	ViolationScope     ViolationCode = "outside_scope"    // tool or argument outside the delegation
	ViolationBudget    ViolationCode = "budget_exhausted" // one step too many
	ViolationHolder    ViolationCode = "wrong_holder"     // a delegation presented by somebody else: a replay
	ViolationReplay    ViolationCode = "replayed_key"     // an idempotency key used again, for another tool or other arguments
	ViolationSecondUse ViolationCode = "second_use"       // a sealed secret collected once more
	ViolationCanary    ViolationCode = "canary"           // a tool, or a value, that nobody has business with
	ViolationHeartbeat ViolationCode = "lost_heartbeat"   // an agent that promised to be heard was not
)
