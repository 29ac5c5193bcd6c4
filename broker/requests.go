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

// Plan is what a revocation would hit, as of a revision.
type Plan struct {
	Token     string           `json:"token"` // stands for exactly this set
	Selector  string           `json:"selector"`
	Revision  Revision         `json:"revision"`
	Made      time.Time        `json:"made"`
	Chains    int              `json:"chains"`
	Nodes     int              `json:"delegations"`
	Later     int              `json:"later"`  // open delegations beside these, under which a step may still come that a rule meets
	Grants    int              `json:"grants"` // not over yet
	Issued    int              `json:"issued"` // of these, handed over
	Live      int              `json:"live"`   // of these, in their time and not being ended; the others only have to be proven dead
	ByTool    map[ToolName]int `json:"by_tool,omitempty"`
	ByBackend map[string]int   `json:"by_backend,omitempty"`
	ByLabel   map[string]int   `json:"by_narrowing,omitempty"`
	ByCaller  map[string]int   `json:"by_caller,omitempty"`
	Tasks     []PlannedTask    `json:"tasks,omitempty"`      // that will break, those that lose most first; MaxPlannedTasks at most
	TasksMore int              `json:"tasks_more,omitempty"` // and how many more
	Static    int              `json:"static"`               // cannot be ended, only rotated; those whose grant is over included
	LatestEnd time.Time        `json:"latest_end,omitzero"`
}

// PlannedTask is a chain that a revocation would hit.
type PlannedTask struct {
	Chain       ChainID `json:"chain"`
	Task        string  `json:"task"`
	Delegations int     `json:"delegations"` // open
	Grants      int     `json:"grants"`      // not over yet
}

// MaxPlannedTasks is how many tasks a plan names.
const MaxPlannedTasks = 20

// Closure is the honest state of a revocation.
type Closure string

// The closures. A revocation is CLOSED only with evidence for every grant.
const (
	ClosureUnknown Closure = "UNKNOWN" // some are not proven either way
	ClosurePartial Closure = "PARTIAL" // some are known to be alive
	ClosureClosed  Closure = "CLOSED"  // all are dead, with evidence
)

// Revocation is one act of revoking and how far it has come.
type Revocation struct {
	ID        RevocationID `json:"id"`
	Selector  string       `json:"selector"`
	Reason    string       `json:"reason"`
	By        string       `json:"by"`
	Freeze    bool         `json:"freeze,omitempty"`
	Lifted    bool         `json:"lifted,omitempty"`    // a freeze that is over
	Unfreezer string       `json:"unfreezer,omitempty"` // the first operator who asked to lift it
	Chain     ChainID      `json:"chain,omitempty"`     // of Node or Grant
	Node      DelegationID `json:"node,omitempty"`      // the fence is on this node
	Grant     GrantID      `json:"grant,omitempty"`     // or on this grant; else it is a rule
	Asked     time.Time    `json:"asked"`
	Fenced    time.Time    `json:"fenced"`           // nothing is handed out from here on
	Revision  Revision     `json:"revision"`         // of the fence
	Settled   time.Time    `json:"settled,omitzero"` // when Closure became CLOSED, or final with statics left
	Closure   Closure      `json:"closure"`
	Nothing   bool         `json:"nothing,omitempty"`   // a rule under which nothing fell when it was written; later steps may
	Repeated  bool         `json:"-"`                   // the command was given before and stands: nothing was changed by this one
	Grants    int          `json:"grants"`              // that were not over when it was fenced, and static secrets handed out before
	Dead      int          `json:"dead"`                // of these, proven dead
	Alive     int          `json:"alive"`               // of these, shown to work still, statics included
	Unknown   int          `json:"unknown"`             // of these, not proven either way
	Static    int          `json:"static"`              // of these alive, that can only be rotated
	Tokens    int          `json:"tokens"`              // delegation tokens not shown revoked yet
	Unswept   bool         `json:"unswept,omitempty"`   // a mint was under way when it was fenced, and what it may have left is still looked for
	LatestEnd time.Time    `json:"latest_end,omitzero"` // what is left ends by itself by then; zero: nothing is left, or never
}

// CanaryID names a planted value, "cn…".
type CanaryID string

// ParseCanaryID accepts exactly what this package makes.
func ParseCanaryID(s string) (CanaryID, error) { return CanaryID(s), parseID(s, "cn", "canary") }

// Canary is a value that opens nothing and was put where only a thief would find it. Whoever presents it has
// read what he had no business with. The value itself is kept nowhere: the ledger has its [ValueDigest], as
// for values that were handed out.
type Canary struct {
	ID      CanaryID  `json:"id"`
	Chain   ChainID   `json:"chain,omitempty"` // in whose reach it was planted; empty: of no chain
	Note    string    `json:"note,omitempty"`  // where it was put, for people
	By      string    `json:"by"`              // the operator
	Planted time.Time `json:"planted"`
	Touched time.Time `json:"touched,omitzero"` // when it was last presented; zero: never
	Touches int       `json:"touches,omitempty"`
}

// Guise is what kind of token a canary's value looks like. The zero value is GuiseVault.
type Guise string

// The guises: tokens that thieves try and scanners know.
const (
	GuiseVault  Guise = "vault"  // a Vault service token, as steps of the token plugin are given
	GuiseGitHub Guise = "github" // a personal access token, whose checksum is right
)

// PlantRequest asks for a canary.
type PlantRequest struct {
	Chain ChainID // empty: of no chain
	Note  string  // at most MaxTask bytes
	Like  Guise
}

// Acknowledgement is one holder who was to hear of a revocation: of a delegation that the fence
// covers and that was open when it was set.
type Acknowledgement struct {
	Chain      ChainID      `json:"chain"`
	Delegation DelegationID `json:"delegation"`
	Holder     spiffeid.ID  `json:"holder"`
	At         time.Time    `json:"at,omitzero"` // when the holder said that it has heard; zero: not yet
}

// ChainSummary is one line about a chain.
type ChainSummary struct {
	Chain       Chain
	Delegations int
	Live        int    // grants that are not over
	Fence       *Fence // on the root
	Steps       int    // begun in all
}

// ChainView is all that the ledger holds of one chain.
type ChainView struct {
	Chain       Chain
	Delegations []Delegation // ancestors before descendants
	Grants      []Grant      // by time of creation; those that are over come too
}

// Event is what others may be told about an entry of the audit log.
type Event struct {
	Entry      Entry
	Revocation Revocation  // as it stands now, which may be later than the entry
	Opener     spiffeid.ID // of the revocation's chain; zero when it is a rule's
	Tally      Tally       // of a closure: as of the entry
}

// Tally is a closure with its counts.
type Tally struct {
	Closure                      Closure
	Dead, Alive, Unknown, Grants int
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

// Limits of sealed secrets that wait to be collected, over all chains.
const (
	MaxWaiting     = 4096     // deliveries
	MaxWaitingEach = 256      // of them, asked for by one caller
	MaxSealed      = 64 << 10 // bytes of one
	MaxSealedBytes = 64 << 20 // bytes of all
)

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
