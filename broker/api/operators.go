package api

import (
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// Media types of answers that are not JSON.
const (
	ReportType     = "application/jose"          // a revocation's report, a compact JWS of typ "pawl-report+jws"
	CheckpointType = "text/plain; charset=utf-8" // a checkpoint of the audit log, a signed note
	MetricsType    = "text/plain"                // metrics for Prometheus; its own version of the format follows
)

// Chain is one task's tree of delegations.
type Chain struct {
	ID     string            `json:"id"`
	Task   string            `json:"task"`
	Opener string            `json:"opener"` // a SPIFFE ID
	Opened time.Time         `json:"opened"`
	Labels map[string]string `json:"labels,omitzero"`
	Root   string            `json:"root"` // id of the root delegation

	Envelope *Envelope `json:"envelope,omitzero"` // task and labels above are the opener's claims; omitted: it was opened with none
}

// Envelope has the signed statements about a chain.
type Envelope struct {
	Issuer     string            `json:"issuer"`
	ID         string            `json:"id"`     // its jti
	Digest     string            `json:"digest"` // "sha256:" and the hex digest of the token
	Task       string            `json:"task,omitzero"`
	Labels     map[string]string `json:"labels,omitzero"`
	OnBehalfOf string            `json:"on_behalf_of,omitzero"` // a SPIFFE ID, or the issuer's name for a subject
	Issued     time.Time         `json:"issued"`
	Expires    time.Time         `json:"expires"`
}

// ChainSummary is a chain in a list.
type ChainSummary struct {
	Chain       Chain  `json:"chain"`
	Delegations int    `json:"delegations"`
	Live        int    `json:"live"`           // grants that have not ended
	Steps       int    `json:"steps"`          // started in total
	Fence       *Fence `json:"fence,omitzero"` // on the whole chain
}

// Chains is a page of the list of chains, the latest first. A page before the last may have fewer than were asked for.
type Chains struct {
	Chains []ChainSummary `json:"chains"`
	Next   string         `json:"next,omitzero"` // the next page starts after it; omitted: this is the last page
}

// ChainView is one chain, with a page of its content: its delegations, and after them its grants.
type ChainView struct {
	Chain       Chain         `json:"chain"`
	Delegations []Delegation  `json:"delegations"`
	Grants      []GrantRecord `json:"grants"`
	Next        string        `json:"next,omitzero"` // the next page starts after it; omitted: this is the last page
}

// GrantRecord is a grant, as operators see it: all recorded data about the secret, without the secret.
type GrantRecord struct {
	Grant
	Caller   string         `json:"caller"` // a SPIFFE ID
	Args     jsontext.Value `json:"args"`
	Purpose  string         `json:"purpose,omitzero"`
	Path     string         `json:"path,omitzero"`    // the Vault mount and role that mint it
	Lease    string         `json:"lease,omitzero"`   // Vault's lease id
	Ref      string         `json:"ref,omitzero"`     // the backend's name for the secret
	Request  string         `json:"request,omitzero"` // the id of the mint's request in Vault's audit log; omitted: not recorded
	Fence    *Fence         `json:"fence,omitzero"`   // on this grant alone
	Evidence []Evidence     `json:"evidence,omitzero"`
}

// Evidence is one check of whether a secret is dead.
type Evidence struct {
	At      time.Time `json:"at"`
	Check   string    `json:"check"`            // the check, and the system that was asked
	Outcome string    `json:"outcome,omitzero"` // "dead", "alive" or "static"; omitted: not proven either way
	Answer  string    `json:"answer"`
}

// Canary is a value that grants no access and was planted where only an intruder finds it. Presenting it is the
// violation "canary" in the chain in which it was planted.
type Canary struct {
	ID      string    `json:"id"`
	Chain   string    `json:"chain,omitzero"` // the chain in which it was planted; omitted: none
	Note    string    `json:"note,omitzero"`
	By      string    `json:"by"` // the operator
	Planted time.Time `json:"planted"`
	Touched time.Time `json:"touched,omitzero"` // when it was last presented; omitted: never
	Touches int       `json:"touches,omitzero"` // how many times it was presented
}

// Canaries is a page of the list of canaries, the latest first.
type Canaries struct {
	Canaries []Canary `json:"canaries"`
	Next     string   `json:"next,omitzero"` // the next page starts after it; omitted: this is the last page
}

// PlantRequest asks for a new canary.
type PlantRequest struct {
	Chain string `json:"chain,omitzero"` // omitted: no chain
	Note  string `json:"note,omitzero"`  // where it will be planted, for people; kept in the audit log
	Like  string `json:"like,omitzero"`  // the kind of token that it imitates: "vault" or "github"; omitted: "vault"
}

// Planted is a canary with its value, which is returned only once.
type Planted struct {
	Canary Canary `json:"canary"`
	Value  string `json:"value"`
}

// PlanRequest asks for the scope of a revocation.
type PlanRequest struct {
	Selector string `json:"selector"`
}

// Plan is the scope of a revocation at a revision of the ledger.
type Plan struct {
	Plan        string         `json:"plan"` // identifies exactly this set in a RevokeRequest
	Selector    string         `json:"selector"`
	Revision    uint64         `json:"revision"`
	Made        time.Time      `json:"made"`
	Chains      int            `json:"chains"`
	Delegations int            `json:"delegations"`
	Later       int            `json:"later"`  // further open delegations under which a later step may match the selector
	Grants      int            `json:"grants"` // not ended
	Issued      int            `json:"issued"` // of these, handed over
	Live        int            `json:"live"`   // of these, not expired and not being ended; the others only have to be proven dead
	ByTool      map[string]int `json:"by_tool"`
	ByBackend   map[string]int `json:"by_backend"`
	ByNarrowing map[string]int `json:"by_narrowing"`
	ByCaller    map[string]int `json:"by_caller"`
	Tasks       []PlannedTask  `json:"tasks"`               // the tasks that will break, those that lose most first; at most 20
	TasksMore   int            `json:"tasks_more"`          // the number of further tasks
	Static      int            `json:"static"`              // secrets that can only be rotated, not ended; including those of ended grants
	LatestEnd   time.Time      `json:"latest_end,omitzero"` // every live secret expires by then
}

// PlannedTask is a chain in the scope of a revocation.
type PlannedTask struct {
	Chain       string `json:"chain"`
	Task        string `json:"task"`
	SignedTask  string `json:"signed_task,omitzero"`  // of its envelope
	OnBehalfOf  string `json:"on_behalf_of,omitzero"` // of its envelope
	Delegations int    `json:"delegations"`           // open
	Grants      int    `json:"grants"`                // not ended
}

// RevokeRequest asks for a final revocation, or for a freeze.
type RevokeRequest struct {
	Selector   string `json:"selector"`
	Reason     string `json:"reason"`               // for the audit log and the report; at most 256 bytes
	Plan       string `json:"plan,omitzero"`        // refuse if the set has grown since this plan; omitted: revoke the present set
	IncludeNew bool   `json:"include_new,omitzero"` // with a plan: continue if the set has grown
	Freeze     bool   `json:"freeze,omitzero"`      // no new secrets, but nothing is severed; may be lifted
}

// Revocation is one revocation and its progress, and the data of a "revocation" event. Fenced and dead are different:
// from Fenced on nothing is handed out, and Dead counts the secrets shown not to work.
type Revocation struct {
	ID        string `json:"id"`
	Selector  string `json:"selector"`
	Reason    string `json:"reason"`
	By        string `json:"by"`
	Freeze    bool   `json:"freeze,omitzero"`
	Unfreezer string `json:"unfreezer,omitzero"` // the first operator who asked to lift the freeze
	Lifted    bool   `json:"lifted,omitzero"`    // the freeze was lifted
	// root lifted the freeze on a stopped broker, without a second person, for this reason
	LiftedAlone string    `json:"lifted_alone,omitzero"`
	Asked       time.Time `json:"asked"`
	Fenced      time.Time `json:"fenced"`
	Revision    uint64    `json:"revision"`            // of the fence in the ledger
	Settled     time.Time `json:"settled,omitzero"`    // the closure is final since then, unless a failover of a target brings a secret back
	Closure     string    `json:"closure"`             // "CLOSED", "PARTIAL" or "UNKNOWN"
	Grants      int       `json:"grants"`              // not ended at the fence, and static secrets handed out before it
	Dead        int       `json:"dead"`                // of these, proven dead
	Alive       int       `json:"alive"`               // of these, shown to work, including static ones
	Unknown     int       `json:"unknown"`             // of these, not proven either way
	Static      int       `json:"static"`              // of those alive, secrets that can only be rotated
	Tokens      int       `json:"tokens"`              // delegation tokens not yet confirmed revoked
	Leases      int       `json:"leases"`              // leases of dead secrets that Vault has still to remove: housekeeping, and no part of the closure
	Uncounted   bool      `json:"uncounted,omitzero"`  // the grants are not counted yet, and the counts are zero; those of a freeze never are
	LatestEnd   time.Time `json:"latest_end,omitzero"` // the remaining secrets expire by then; omitted: none remain, or some never expire

	Unswept       bool `json:"unswept,omitzero"`        // a mint was in progress at the fence, and the sweep for its possible leftovers has not ended
	CoversNothing bool `json:"covers_nothing,omitzero"` // a rule that covered nothing when it was written; later requests may match it
	Repeated      bool `json:"repeated,omitzero"`       // in the answer to a command: the same revocation already existed, as shown here, and the command changed nothing

	// in the answer to a freeze: no two people can lift it, with the remedy
	Warning string `json:"warning,omitzero"`

	Acknowledged *Acknowledged `json:"acknowledged,omitzero"` // acknowledgements by holders; not in lists, and omitted if no holder had to be notified
	Waiting      *Waiting      `json:"waiting,omitzero"`      // the grants for which it waits; not in lists, and omitted once it is settled
}

// Waiting names the grants for which a revocation waits.
type Waiting struct {
	Grants []Awaited `json:"grants"` // not shown dead yet: at most 20, and of more the last to end; the last one first
}

// Awaited is a grant for which a revocation waits.
type Awaited struct {
	Grant   string    `json:"grant"`
	Chain   string    `json:"chain"`
	Tool    string    `json:"tool"`
	Backend string    `json:"backend"`
	Why     string    `json:"why"`   // the check that has not shown it dead, and its answer
	Until   time.Time `json:"until"` // when the cause of the wait ends by itself; the grant is checked until then and after
}

// Acknowledged counts the holders that acknowledged a revocation and ordered their steps to stop. It is not part of
// the closure: a secret is dead with or without an acknowledgement.
type Acknowledged struct {
	Agents int      `json:"agents"` // delegations under it that were open at the fence
	Done   int      `json:"done"`   // of these, acknowledged by their holders
	Silent []Silent `json:"silent"` // the first 50 of the others
}

// Silent is a holder without an acknowledgement.
type Silent struct {
	Delegation string `json:"delegation"`
	Holder     string `json:"holder"` // a SPIFFE ID
}

// Revocations is a page of the list of revocations, the latest first.
type Revocations struct {
	Revocations []Revocation `json:"revocations"`
	Next        string       `json:"next,omitzero"` // the next page starts after it; omitted: this is the last page
}

// Entry is one entry of the audit log.
type Entry struct {
	Revision   uint64    `json:"revision"` // numbers the entries from 1, without gaps
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

// Entries is a page of the audit log, the oldest first. The next page starts after Next. An empty page is the present
// end of the log.
type Entries struct {
	Entries []Entry `json:"entries"`
	Next    uint64  `json:"next"`
}
