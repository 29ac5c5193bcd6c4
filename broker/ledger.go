package broker

import (
	"context"
	"errors"
	"time"
)

// Revision numbers the entries of the ledger's audit log from 1, without gaps.
type Revision uint64

// Ledger is the truth about chains, delegations, grants and revocations. It keeps records by
// key and an append-only log of entries, and commits both together.
//
// All methods are safe for concurrent use. A secret is never in a record.
type Ledger interface {
	// Update runs f in one transaction that is serialisable with every other. When it returns
	// nil, what f put and appended is durable. When f returns an error nothing is applied and
	// Update returns that error. A failure of the store that certainly left nothing behind
	// wraps ErrNotCommitted; after any other failure the outcome is unknown, and only reading
	// again can tell. A transaction that puts a record and appends no entry is refused.
	// f may run more than once.
	Update(ctx context.Context, f func(Tx) error) error
	// View runs f on a consistent snapshot that is not older than the last Update that returned
	// before View was called. Put and Append fail inside it.
	View(ctx context.Context, f func(Tx) error) error
	// Entries gives at most limit entries of the audit log after a revision, oldest first.
	Entries(ctx context.Context, after Revision, limit int) ([]Entry, error)
}

// Tx is one transaction. It is used by one goroutine and not after f has returned.
type Tx interface {
	// Get gives the record's value, nil when there is none. The value must not be changed and
	// is valid until f returns.
	Get(key string) ([]byte, error)
	// Put sets the record; a nil value deletes it.
	Put(key string, value []byte) error
	// Scan calls f with each record whose key begins with prefix and is greater than after
	// (empty: from the first), in the order of keys, until f returns false. Records that this
	// transaction put are seen.
	Scan(prefix, after string, f func(key string, value []byte) bool) error
	// Append adds an entry to the audit log and gives its revision. The store sets Revision
	// and chains the entry's digest to the one before.
	Append(Entry) (Revision, error)
	// Head is the revision of the last entry that this transaction sees, its own included; 0 when
	// there is none.
	Head() (Revision, error)
}

// ErrNotCommitted says that a failed Update certainly left nothing behind.
var ErrNotCommitted = errors.New("the ledger did not commit")

// ErrNoEntry is the store's refusal of a change without an audit entry.
var ErrNoEntry = errors.New("a change without an audit entry")

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

// Op says what an entry records.
type Op string

// The ops, in about the order in which a chain sees them.
const (
	OpOpen         Op = "open"
	OpDelegate     Op = "delegate"
	OpToken        Op = "token" // a delegation's Vault token was recorded
	OpIntent       Op = "intent"
	OpHandle       Op = "handle"
	OpIssued       Op = "issued"
	OpCollected    Op = "collected" // a sealed secret was given to its collector
	OpUnknown      Op = "unknown"   // a mint's outcome is not known
	OpDenied       Op = "denied"
	OpViolation    Op = "violation"
	OpEnd          Op = "end" // a grant was closed by its agent, expired or was given up
	OpFence        Op = "fence"
	OpFreeze       Op = "freeze"
	OpUnfreeze     Op = "unfreeze"
	OpEvidence     Op = "evidence"     // what a check of a fenced grant found
	OpClosed       Op = "closed"       // a grant is over, with evidence
	OpClosure      Op = "closure"      // a revocation's state changed
	OpAcknowledged Op = "acknowledged" // a holder acknowledged a revocation
	OpOrphan       Op = "orphan"       // something lives under our names that the ledger does not know
	OpPlant        Op = "plant"        // an operator planted a canary
	OpPull         Op = "pull"         // an operator took one away
	OpResume       Op = "resume"
	OpPolicy       Op = "policy"    // a policy bundle came into force
	OpDelivered    Op = "delivered" // up to which revision events were delivered to a subscriber
)

// former has the ops that builds before the first release wrote under other names.
var former = map[Op]Op{"heard": OpAcknowledged, "stray": OpOrphan, "told": OpDelivered}

// Current gives today's name of an op that an earlier build may have written.
func (o Op) Current() Op {
	if now, ok := former[o]; ok {
		return now
	}
	return o
}
