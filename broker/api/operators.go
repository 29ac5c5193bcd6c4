package api

import (
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// Media types of what the broker signs.
const (
	ReportType     = "application/jose"          // a revocation's report, a compact JWS of typ "pawl-report+jws"
	CheckpointType = "text/plain; charset=utf-8" // a checkpoint of the audit log, a signed note
)

// Chain is one task's tree of delegations.
type Chain struct {
	ID     string            `json:"id"`
	Task   string            `json:"task"`
	Opener string            `json:"opener"` // a SPIFFE ID
	Opened time.Time         `json:"opened"`
	Labels map[string]string `json:"labels,omitzero"`
	Root   string            `json:"root"` // id of the root delegation
}

// ChainSummary is a chain in a list.
type ChainSummary struct {
	Chain       Chain  `json:"chain"`
	Delegations int    `json:"delegations"`
	Live        int    `json:"live"`           // grants that are not over
	Steps       int    `json:"steps"`          // begun in all
	Fence       *Fence `json:"fence,omitzero"` // over the whole chain
}

// Chains is the list of chains, the latest first.
type Chains struct {
	Chains []ChainSummary `json:"chains"`
}

// ChainView is one chain with everything under it.
type ChainView struct {
	Chain       Chain         `json:"chain"`
	Delegations []Delegation  `json:"delegations"`
	Grants      []GrantRecord `json:"grants"`
}

// GrantRecord is a grant as operators see it: all that is known of the secret but the secret.
type GrantRecord struct {
	Grant
	Caller   string         `json:"caller"` // a SPIFFE ID
	Args     jsontext.Value `json:"args"`
	Purpose  string         `json:"purpose,omitzero"`
	Path     string         `json:"path,omitzero"`  // Vault mount and role that it is minted at
	Lease    string         `json:"lease,omitzero"` // Vault's lease id
	Ref      string         `json:"ref,omitzero"`   // what the backend calls the secret
	Fence    *Fence         `json:"fence,omitzero"` // on this grant alone
	Evidence []Evidence     `json:"evidence,omitzero"`
}

// Evidence is one check of whether a secret is dead.
type Evidence struct {
	At      time.Time `json:"at"`
	Check   string    `json:"check"`            // what was asked of whom
	Outcome string    `json:"outcome,omitzero"` // "dead", "alive" or "static"; left out: not proven either way
	Answer  string    `json:"answer"`
}

// Canary is a value that opens nothing and was put where only a thief would find it. Whoever
// presents it commits the violation "canary" in the chain in which it was planted.
type Canary struct {
	ID      string    `json:"id"`
	Chain   string    `json:"chain,omitzero"` // in whose reach it was planted; left out: of no chain
	Note    string    `json:"note,omitzero"`
	By      string    `json:"by"` // the operator
	Planted time.Time `json:"planted"`
	Touched time.Time `json:"touched,omitzero"` // when it was last presented; left out: never
	Touches int       `json:"touches,omitzero"` // how often
}

// Canaries is the list of canaries, the latest first.
type Canaries struct {
	Canaries []Canary `json:"canaries"`
}

// PlantRequest asks for a canary.
type PlantRequest struct {
	Chain string `json:"chain,omitzero"` // left out: of no chain
	Note  string `json:"note,omitzero"`  // where it will be put, for people; in the audit
	Like  string `json:"like,omitzero"`  // what it looks like: "vault" or "github"; left out: "vault"
}

// Planted is a canary with its value, which nobody is given again.
type Planted struct {
	Canary Canary `json:"canary"`
	Value  string `json:"value"`
}

// PlanRequest asks what a revocation would hit.
type PlanRequest struct {
	Selector string `json:"selector"`
}

// Plan is what a revocation would hit, as of a revision of the ledger.
type Plan struct {
	Plan        string         `json:"plan"` // stands for exactly this set, in a RevokeRequest
	Selector    string         `json:"selector"`
	Revision    uint64         `json:"revision"`
	Made        time.Time      `json:"made"`
	Chains      int            `json:"chains"`
	Delegations int            `json:"delegations"`
	Later       int            `json:"later"`  // open delegations beside these, under which a step may still come that is meant
	Grants      int            `json:"grants"` // not over yet
	Issued      int            `json:"issued"` // of these, handed over
	Live        int            `json:"live"`   // of these, in their time and not being ended; the others only have to be proven dead
	ByTool      map[string]int `json:"by_tool"`
	ByBackend   map[string]int `json:"by_backend"`
	ByNarrowing map[string]int `json:"by_narrowing"`
	ByCaller    map[string]int `json:"by_caller"`
	Tasks       []PlannedTask  `json:"tasks"`               // that will break, those that lose most first; 20 at most
	TasksMore   int            `json:"tasks_more"`          // and how many more
	Static      int            `json:"static"`              // cannot be ended, only rotated; those whose grant is over included
	LatestEnd   time.Time      `json:"latest_end,omitzero"` // what lives ends by itself by then
}

// PlannedTask is a chain that a revocation would hit.
type PlannedTask struct {
	Chain       string `json:"chain"`
	Task        string `json:"task"`
	Delegations int    `json:"delegations"` // open
	Grants      int    `json:"grants"`      // not over yet
}

// RevokeRequest asks for a final revocation, or for a freeze.
type RevokeRequest struct {
	Selector   string `json:"selector"`
	Reason     string `json:"reason"`               // for the audit and the report; at most 256 bytes
	Plan       string `json:"plan,omitzero"`        // refuse when the set has grown since; left out: whatever is there
	IncludeNew bool   `json:"include_new,omitzero"` // with a plan: go on when the set has grown
	Freeze     bool   `json:"freeze,omitzero"`      // no new secrets, but nothing is cut; may be lifted
}

// Revocation is one act of revoking and how far it has come, and the data of a "revocation"
// event. Fenced and dead are two things: from Fenced on nothing is handed out, and Dead counts
// what was shown not to work.
type Revocation struct {
	ID        string    `json:"id"`
	Selector  string    `json:"selector"`
	Reason    string    `json:"reason"`
	By        string    `json:"by"`
	Freeze    bool      `json:"freeze,omitzero"`
	Unfreezer string    `json:"unfreezer,omitzero"` // the first operator who asked to lift the freeze
	Lifted    bool      `json:"lifted,omitzero"`    // a freeze that is over
	Asked     time.Time `json:"asked"`
	Fenced    time.Time `json:"fenced"`
	Revision  uint64    `json:"revision"`            // of the fence in the ledger
	Settled   time.Time `json:"settled,omitzero"`    // the closure will not change any more
	Closure   string    `json:"closure"`             // "CLOSED", "PARTIAL" or "UNKNOWN"
	Grants    int       `json:"grants"`              // that were not over when it was fenced, and static secrets handed out before
	Dead      int       `json:"dead"`                // of these, proven dead
	Alive     int       `json:"alive"`               // of these, shown to work still, statics included
	Unknown   int       `json:"unknown"`             // of these, not proven either way
	Static    int       `json:"static"`              // of these alive, that can only be rotated
	Tokens    int       `json:"tokens"`              // delegation tokens not shown revoked yet
	LatestEnd time.Time `json:"latest_end,omitzero"` // what is left ends by itself by then; left out: nothing is left, or never

	Unswept       bool `json:"unswept,omitzero"`        // a mint was under way when it was fenced, and what it may have left is still looked for
	CoversNothing bool `json:"covers_nothing,omitzero"` // a rule under which nothing fell when it was written; what is asked for later may
	Repeated      bool `json:"repeated,omitzero"`       // of the answer to a command: the same stood already, as it is here, and this command changed nothing

	Acknowledged *Acknowledged `json:"acknowledged,omitzero"` // who has heard of it; not in lists, and left out when nobody was to hear
}

// Acknowledged counts the holders who said that they have heard of a revocation and told their
// steps to stop. It is no part of the closure: a secret is dead whether its holder knows or not.
type Acknowledged struct {
	Agents int      `json:"agents"` // delegations under it that were open when it was fenced
	Heard  int      `json:"heard"`  // of these, acknowledged by their holders
	Silent []Silent `json:"silent"` // the first 50 of the others
}

// Silent is a holder who has not said that it has heard.
type Silent struct {
	Delegation string `json:"delegation"`
	Holder     string `json:"holder"` // a SPIFFE ID
}

// Revocations is the list of revocations, the latest first.
type Revocations struct {
	Revocations []Revocation `json:"revocations"`
}

// Entry is one line of the audit log.
type Entry struct {
	Revision   uint64    `json:"revision"` // numbers the lines from 1, without gaps
	At         time.Time `json:"at"`
	Actor      string    `json:"actor"` // a SPIFFE ID, an operator's name, or "pawl"
	Op         string    `json:"op"`
	Chain      string    `json:"chain,omitzero"`
	Delegation string    `json:"delegation,omitzero"`
	Grant      string    `json:"grant,omitzero"`
	Revocation string    `json:"revocation,omitzero"`
	Tool       string    `json:"tool,omitzero"`
	Code       string    `json:"code,omitzero"`
	Bundle     string    `json:"bundle,omitzero"`
	Policies   []string  `json:"policies,omitzero"`
	Detail     string    `json:"detail,omitzero"`
}

// Entries is a page of the audit log, the oldest first. The next page is after Next; an empty
// page is the end for now.
type Entries struct {
	Entries []Entry `json:"entries"`
	Next    uint64  `json:"next"`
}
