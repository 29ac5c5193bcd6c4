package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker/args"
)

// OpenRequest asks for a new chain, whose root the caller holds.
type OpenRequest struct {
	Task   string            // what it is for, in the words of whoever started the agent; 1 to 256 bytes
	Rights []Right           // what may happen under it
	Budget Budget            // over the whole chain
	Depth  int               // how many times it may be passed on, 0 to MaxDepth
	TTL    time.Duration     // zero: DefaultChainTTL
	Labels map[string]string // for policies and selectors

	Heartbeat time.Duration // how often the caller promises to be heard, MinHeartbeat or more; zero: no promise
}

// DelegateRequest asks to pass on less than the caller's own delegation to another SPIFFE ID.
type DelegateRequest struct {
	From   DelegationID
	To     spiffeid.ID
	Rights []Right
	Budget Budget        // zero fields take the parent's limit
	Depth  int           // how many times the receiver may pass it on; less than the parent's
	TTL    time.Duration // zero: as long as the parent. More than the parent's whole life is refused; what reaches past its end ends with it

	Heartbeat time.Duration // how often the receiver must be heard, not less often than the caller; zero: as often
}

// StepRequest asks for one secret for one step.
type StepRequest struct {
	Delegation DelegationID
	Tool       ToolName
	Args       args.Args
	Purpose    string        // for the audit only; at most 256 bytes
	Key        string        // idempotency key, at most 128 bytes; empty: every request is another step
	TTL        time.Duration // zero: as long as tool, policy and delegation allow
	Seal       *Seal         // nil: the secret is in the answer
}

// Seal asks that a step's secret is not in the answer, but kept encrypted to a key until whoever it
// is for collects it, once.
type Seal struct {
	Thumbprint string      // of the key (RFC 7638)
	Collector  spiffeid.ID // who may collect it; zero: the caller

	// Encrypt gives the secret encrypted to the key. It is called once, with a secret that is wiped
	// afterwards; nothing else of the request sees the secret.
	Encrypt func(Grant, Secret) ([]byte, error)
}

// Issued is the answer to a step.
type Issued struct {
	Grant    Grant
	Secret   Secret // empty when Repeated, or sealed
	Repeated bool   // the key was used for the same step before: the grant, never a second secret
}

// ReportRequest says that policy was broken under a delegation.
type ReportRequest struct {
	Delegation DelegationID
	Grant      GrantID // empty: none in particular
	Violation  ViolationCode
	Detail     string // for the audit; at most 256 bytes
}

// Reported is what a report led to.
type Reported struct {
	Consequence Consequence
	Revocation  RevocationID // empty when nothing was revoked
}

// Status is what a delegation's holder may still do under it.
type Status struct {
	Delegation Delegation
	Fence      *Fence    // the nearest fence over it; nil when it may be used
	Ended      []GrantID // the holder's grants under it that were fenced by themselves or a rule, and whose steps must stop; under a final Fence all must, and none is listed
}

// Adoption asks to put a policy bundle in force.
type Adoption struct {
	Name    string
	Version int64
	Digest  string
	Signers []string // ids of the platform keys that stand for it
	By      string   // the operator who asks; empty: the broker by itself, from its configuration

	// Back lets an older version, or a bundle of another name, follow the one that was in force
	// last. It is an operator's deliberate act and is recorded as such.
	Back bool
}

// Operator is a person or system that may look and revoke, as the operators' listener
// established. The zero Operator is refused.
type Operator struct{ Name string }

// Check refuses the zero Operator.
func (o Operator) Check(op string) error {
	if o.Name == "" {
		return Errorf(Unauthenticated, op, "no operator")
	}
	return nil
}
