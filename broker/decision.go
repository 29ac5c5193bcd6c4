package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker/args"
)

// Action is the subject of a question to the policy.
type Action string

// The actions.
const (
	ActionOpen     Action = "open"     // open a chain with the tool in its scope
	ActionUse      Action = "use"      // take this step
	ActionDelegate Action = "delegate" // pass the tool on to Receiver
	ActionReport   Action = "report"   // judge Violation, which was reported or detected
)

// Question has all inputs of a decision. Purpose and other free text of the agent are not in it: a justification never
// influences a decision.
type Question struct {
	Action    Action
	Caller    Caller
	Tool      Tool          // the zero Tool for a report that names none
	Args      args.Args     // for use
	Receiver  spiffeid.ID   // for delegate
	Open      *OpenRequest  // for open: the request
	Violation ViolationCode // for report
	Chain     Chain
	Depth     int               // of the caller's delegation: 0 at the root
	History   map[ToolName]Past // the earlier steps of the whole chain
	Now       time.Time

	// CallerHistory has the earlier steps of the caller in all chains, in each window of the policy's rules. A step
	// counts for its caller and for the principal of its chain.
	CallerHistory map[time.Duration]map[ToolName]Past
}

// Limit bounds the steps of a caller, and of a chain's principal, in all chains together.
type Limit struct {
	Policy string        // the id of the permit under which they are counted
	Steps  int           // at most, in any Window
	Window time.Duration // whole minutes up to an hour, or whole hours up to MaxWindow
	Label  string        // the name of a label of the envelope by which they are counted apart; empty: none
	Value  string        // of that label
}

// Decision is allow or deny, with its limits and consequences. The zero Decision denies.
type Decision struct {
	Allow       bool
	Policies    []string      // ids of the policies that decided
	Consequence Consequence   // of a deny
	Approval    string        // of an allow: the approval that it needs first ("2 of oncall"); empty: none
	TTL         time.Duration // of an allow: the longest lifetime; zero: the tool's
	Narrowing   Narrowing     // of an allow: the weakest acceptable label
	Domains     []string      // of an allow to delegate: the trust domains that the permit names
	Caps        Caps          // of an allow to open
	Limits      []Limit       // of an allow to use
	Failed      bool          // an evaluation failed, so this is a deny
	Remedy      string        // how to ask, in the bundle's own words, at most MaxRemedy bytes; may be empty
}

// Consequence is the consequence of a violation. The zero value only refuses the request.
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

// String is the name in the @violation annotation.
func (c Consequence) String() string { return consequenceNames[min(int(c), len(consequenceNames)-1)] }

// ParseConsequence reads a name of the @violation annotation.
func ParseConsequence(s string) (Consequence, bool) {
	for i, name := range consequenceNames {
		if s == name {
			return Consequence(i), true
		}
	}
	return ConsequenceDeny, false
}

// ViolationCode names a violation to which policy may attach a consequence.
type ViolationCode string

// The violations that the broker itself detects. Reporters may send other codes of the same form: lower-case words
// joined by underscores.
const (
	ViolationForbidden ViolationCode = "forbidden_tool"   // a forbid with @violation
	ViolationScope     ViolationCode = "outside_scope"    // a tool or an argument outside the delegation
	ViolationBudget    ViolationCode = "budget_exhausted" // one step too many
	ViolationHolder    ViolationCode = "wrong_holder"     // a delegation that its holder did not present: a replay
	ViolationReplay    ViolationCode = "replayed_key"     // an idempotency key reused with another tool or arguments
	ViolationSecondUse ViolationCode = "second_use"       // a sealed secret, collected again
	ViolationCanary    ViolationCode = "canary"           // a tool or a value that no caller has a reason to use
	ViolationHeartbeat ViolationCode = "lost_heartbeat"   // a holder promised a heartbeat and missed it
)
