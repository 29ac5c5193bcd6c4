package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

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

// Tally is a closure with its counts.
type Tally struct {
	Closure                      Closure
	Dead, Alive, Unknown, Grants int
}

// Acknowledgement is one holder who was to hear of a revocation: of a delegation that the fence
// covers and that was open when it was set.
type Acknowledgement struct {
	Chain      ChainID      `json:"chain"`
	Delegation DelegationID `json:"delegation"`
	Holder     spiffeid.ID  `json:"holder"`
	At         time.Time    `json:"at,omitzero"` // when the holder said that it has heard; zero: not yet
}
