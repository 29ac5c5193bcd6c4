package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Plan is the preview of a revocation, as of a revision.
type Plan struct {
	Token    string    `json:"token"` // identifies exactly this set
	Selector string    `json:"selector"`
	Revision Revision  `json:"revision"`
	Made     time.Time `json:"made"`
	Chains   int       `json:"chains"`
	Nodes    int       `json:"delegations"`
	// Later counts the other open delegations: those under which a later step may match the rule.
	Later  int `json:"later"`
	Grants int `json:"grants"` // not closed yet
	Issued int `json:"issued"` // of Grants: handed over
	// Live counts those of Grants that have not expired and are not being ended. The others must only be proven dead.
	Live      int              `json:"live"`
	ByTool    map[ToolName]int `json:"by_tool,omitempty"`
	ByBackend map[string]int   `json:"by_backend,omitempty"`
	ByLabel   map[string]int   `json:"by_narrowing,omitempty"`
	ByCaller  map[string]int   `json:"by_caller,omitempty"`
	// Tasks lists the tasks that the revocation breaks, those with the largest loss first: at most MaxPlannedTasks.
	Tasks     []PlannedTask `json:"tasks,omitempty"`
	TasksMore int           `json:"tasks_more,omitempty"` // the tasks beyond these
	Static    int           `json:"static"`               // can only be rotated; those of closed grants included
	LatestEnd time.Time     `json:"latest_end,omitzero"`
}

// PlannedTask is a chain that a revocation would hit.
type PlannedTask struct {
	Chain       ChainID `json:"chain"`
	Task        string  `json:"task"`
	SignedTask  string  `json:"signed_task,omitempty"`  // of its envelope
	Behalf      string  `json:"on_behalf_of,omitempty"` // of its envelope
	Delegations int     `json:"delegations"`            // open
	Grants      int     `json:"grants"`                 // not closed yet
}

// Closure is the honest state of a revocation.
type Closure string

// The closures. A revocation is CLOSED only with evidence for every grant.
const (
	ClosureUnknown Closure = "UNKNOWN" // some are not proven either way
	ClosurePartial Closure = "PARTIAL" // some are known to be alive
	ClosureClosed  Closure = "CLOSED"  // all are dead, with evidence
)

// Revocation is one act of revoking, with its progress.
type Revocation struct {
	ID        RevocationID `json:"id"`
	Selector  string       `json:"selector"`
	Reason    string       `json:"reason"`
	By        string       `json:"by"`
	Freeze    bool         `json:"freeze,omitempty"`
	Lifted    bool         `json:"lifted,omitempty"`    // the freeze was lifted
	Unfreezer string       `json:"unfreezer,omitempty"` // the first operator who asked to lift it
	// LiftedAlone: root lifted it on a stopped broker, without a second person, for this reason. Empty: not so.
	LiftedAlone string       `json:"lifted_alone,omitempty"`
	Chain       ChainID      `json:"chain,omitempty"` // of Node or Grant
	Node        DelegationID `json:"node,omitempty"`  // the fence is on this node
	Grant       GrantID      `json:"grant,omitempty"` // or on this grant; without either it is a rule
	Asked       time.Time    `json:"asked"`
	Fenced      time.Time    `json:"fenced"`   // nothing is handed out after this
	Revision    Revision     `json:"revision"` // of the fence
	Closure     Closure      `json:"closure"`
	Repeated    bool         `json:"-"`       // an earlier command is in force, and this one changed nothing
	Dead        int          `json:"dead"`    // of Grants: proven dead
	Alive       int          `json:"alive"`   // of Grants: shown to work still, statics included
	Unknown     int          `json:"unknown"` // of Grants: not proven either way
	Static      int          `json:"static"`  // of Alive: can only be rotated
	Tokens      int          `json:"tokens"`  // delegation tokens that are not shown to be revoked yet

	// Settled is when Closure became CLOSED, or became final because only statics are left. It is zero again when a
	// secret is found to work that was proven dead.
	Settled time.Time `json:"settled,omitzero"`

	// Nothing: a rule that matched nothing when it was written. Later steps may match it.
	Nothing bool `json:"nothing,omitempty"`

	// Grants counts the grants that were not closed when it was fenced, and the static secrets handed out before.
	Grants int `json:"grants"`
	// Uncounted: the grants are not counted yet, and the counts are zero. Those of a freeze never are.
	Uncounted bool `json:"uncounted,omitempty"`

	// Unswept: a mint was in flight at the fence, and the sweep for its orphans has not finished.
	Unswept bool `json:"unswept,omitempty"`

	// Leases counts the leases that Vault has still to remove for grants that are CLOSED. It is housekeeping and not part
	// of the closure: the target has shown that their secrets are dead.
	Leases int `json:"leases,omitempty"`

	// LatestEnd is the time by which everything that is left ends by itself. Zero: nothing is left, or it never ends.
	LatestEnd time.Time `json:"latest_end,omitzero"`
}

// Tally is a closure with its counts.
type Tally struct {
	Closure                      Closure
	Dead, Alive, Unknown, Grants int
}

// Awaited is a grant for which a revocation waits.
type Awaited struct {
	Grant   GrantID   `json:"grant"`
	Chain   ChainID   `json:"chain"`
	Tool    ToolName  `json:"tool"`
	Backend string    `json:"backend"`
	Why     string    `json:"why"`   // the check that has not shown it dead, and its answer
	Until   time.Time `json:"until"` // when the cause of the wait ends by itself
}

// MaxAwaited is the number of grants that are named as awaited.
const MaxAwaited = 20

// Acknowledgement is one holder who was to hear of a revocation: of a delegation that the fence
// covers and that was open when it was set.
type Acknowledgement struct {
	Chain      ChainID      `json:"chain"`
	Delegation DelegationID `json:"delegation"`
	Holder     spiffeid.ID  `json:"holder"`
	At         time.Time    `json:"at,omitzero"` // when the holder acknowledged; zero: not yet
}
