package broker

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker/args"
)

// OpenRequest asks for a new chain, with a root that the caller holds.
type OpenRequest struct {
	Task   string            // its purpose, in the words of the agent's starter; 1 to MaxTask bytes
	Rights []Right           // of the root
	Budget Budget            // of the whole chain
	Depth  int               // how many times it may be passed on, 0 to MaxDepth
	TTL    time.Duration     // zero: DefaultChainTTL
	Labels map[string]string // for policies and selectors

	// Envelope is a signed statement about the chain, a compact JWS of an issuer that the policy bundle names. It is kept
	// nowhere. Empty: none.
	Envelope string

	// Heartbeat is the longest time between two heartbeats that the caller promises, MinHeartbeat or more. Zero: no
	// promise.
	Heartbeat time.Duration
}

// Excess is one respect in which a request to open goes beyond the caps.
type Excess struct {
	What   string // "budget:steps", "depth", "ttl" or "label:team"
	Remedy string // the request to make instead, such as "at most 50 steps"
}

// Capped gives the fields of r that are zero the value of their cap, where zero means no limit or a default. A depth of
// zero is the least, and stays. It also returns each respect in which r goes beyond the caps. Signed are the labels of
// r's envelope.
func (r OpenRequest) Capped(c Caps, signed map[string]string) (OpenRequest, []Excess) {
	var beyond []Excess
	over := func(is bool, what, remedy string, args ...any) {
		if is {
			beyond = append(beyond, Excess{what, fmt.Sprintf(remedy, args...)})
		}
	}
	if c.Steps > 0 {
		over(r.Budget.Steps > c.Steps, "budget:steps", "at most %d steps", c.Steps)
		r.Budget.Steps = cmp.Or(r.Budget.Steps, c.Steps)
	}
	if c.Depth != nil {
		over(r.Depth > *c.Depth, "depth", "a depth of at most %d", *c.Depth)
	}
	if c.TTL > 0 {
		over(r.TTL > c.TTL, "ttl", "a lifetime of at most %s", c.TTL)
		r.TTL = cmp.Or(r.TTL, min(c.TTL, DefaultChainTTL))
	}
	if c.Labels != nil {
		for _, name := range slices.Sorted(maps.Keys(r.Labels)) {
			over(!slices.Contains(c.Labels, name), "label:"+name, "no label %q", name)
		}
	}
	for _, name := range c.Required {
		_, asked := r.Labels[name]
		_, stated := signed[name]
		over(!asked && !stated, "label:"+name, "the label %q", name)
	}
	return r, beyond
}

// DelegateRequest asks to pass on less than the caller's own delegation to another SPIFFE ID.
type DelegateRequest struct {
	From   DelegationID
	To     spiffeid.ID
	Rights []Right
	Budget Budget // zero fields take the parent's limit
	Depth  int    // how many times the receiver may pass it on; less than the parent's

	// TTL is the lifetime. Zero: the delegation expires with its parent. More than the parent's whole lifetime is
	// refused. A shorter one that still passes the parent's expiry ends there.
	TTL time.Duration

	// Heartbeat is the longest time between two heartbeats of the receiver. It may not be longer than the caller's own.
	// Zero: the same as the caller's.
	Heartbeat time.Duration
}

// StepRequest asks for one secret for one step.
type StepRequest struct {
	Delegation DelegationID
	Tool       ToolName
	Args       args.Args
	Purpose    string        // for the audit only; at most MaxTask bytes
	Key        string        // idempotency key, at most 128 bytes; empty: every request is another step
	TTL        time.Duration // zero: as long as tool, policy and delegation allow
	Seal       *Seal         // nil: the secret is in the answer
	Held       bool          // its secret ends when no connection of the caller holds the step any more
}

// Seal asks the broker to keep a step's secret instead of returning it. The secret stays encrypted to a key until its
// collector collects it, once.
type Seal struct {
	Thumbprint string      // of the key (RFC 7638)
	Collector  spiffeid.ID // may collect it; zero: the caller

	// Encrypt returns the secret encrypted to the key. It is called once, with a secret that is wiped afterwards.
	// Nothing else of the request sees the secret.
	Encrypt func(Grant, Secret) ([]byte, error)
}

// Issued is the answer to a step.
type Issued struct {
	Grant    Grant
	Secret   Secret // empty if Repeated or sealed
	Repeated bool   // the key was used for the same step before: the answer is the grant, never a second secret
}

// ReportRequest reports a violation of policy under a delegation.
type ReportRequest struct {
	Delegation DelegationID
	Grant      GrantID // empty: no particular grant
	Violation  ViolationCode
	Detail     string // for the audit; at most MaxTask bytes
}

// Reported is the result of a report.
type Reported struct {
	Consequence Consequence
	Revocation  RevocationID // empty if nothing was revoked
}

// Status is the state of a delegation for its holder.
type Status struct {
	Delegation Delegation
	Fence      *Fence // the nearest fence over it; nil: it may be used

	// Ended lists the holder's grants under it that were fenced by themselves or by a rule. Their steps must stop.
	// Under a final Fence all steps must stop, and Ended lists none.
	Ended []GrantID
}

// Adoption asks to put a policy bundle in force.
type Adoption struct {
	Name    string
	Version int64
	Digest  string
	Signers []string // ids of the platform keys that signed it
	By      string   // the requesting operator; empty: the broker itself, from its configuration

	// Back accepts an older version than the last one in force, or a bundle with another name. It is an operator's
	// deliberate act, and the audit records it as such.
	Back bool
}

// Operator is a person or system that may read and revoke. The operators' listener authenticates it. Every procedure
// refuses the zero Operator.
type Operator struct{ Name string }

// localOperator begins the names of the operators at the local socket.
const localOperator = "local:"

// LocalOperator is a user of the broker's machine at the local socket.
func LocalOperator(uid uint32) Operator {
	return Operator{Name: fmt.Sprintf("%suid=%d", localOperator, uid)}
}

// SamePerson reports whether two operators, by their names, count as one person. The users of the local socket do: the
// one who is root there is also each other user.
func SamePerson(a, b string) bool {
	return a == b || strings.HasPrefix(a, localOperator) && strings.HasPrefix(b, localOperator)
}

// Check refuses the zero Operator.
func (o Operator) Check(op string) error {
	if o.Name == "" {
		return Errorf(Unauthenticated, op, "no operator")
	}
	return nil
}
