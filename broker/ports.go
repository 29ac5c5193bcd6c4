package broker

import (
	"context"
	"errors"
)

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

// Policy is one immutable snapshot of the running bundle. Its methods are pure functions and
// safe for concurrent use.
type Policy interface {
	// Decide answers a question. An evaluation that fails anywhere denies.
	Decide(Question) Decision
	// Tool gives a declared tool.
	Tool(ToolName) (Tool, bool)
	// Digest identifies the bundle in grants and in the audit.
	Digest() string
}

// Vault is what the procedures ask of Vault. Delegation tokens form one tree under the
// broker's own token, so that one call on a root ends everything below, even if Pawl is gone.
type Vault interface {
	TokenTree
	Minter
	Killer
}

// TokenTree makes the tokens that delegations hang on. Tokens stay inside the implementation,
// in memory; the ledger knows them by accessor. Safe for concurrent use.
type TokenTree interface {
	// Holds reports whether a usable token of the delegation is in memory.
	HasToken(DelegationID) bool
	// Branch makes a token for a delegation below its parent's, able to do what the given Vault
	// policies allow and to create children, ending by itself soon after renewal stops and at
	// until at the latest. It is used for nothing before Keep. The error is an ErrNoParent when
	// the parent's token is not in memory.
	CreateDelegationToken(ctx context.Context, d Delegation, policies []string) (Handle, error)
	// Keep puts a branched token into use, after its accessor was recorded.
	Activate(DelegationID, Handle)
}

// ErrNoParent says that the token to hang a new one on is not in memory.
var ErrNoParent = errors.New("the parent's token is not in memory")

// Minter makes the token of one step and the secret with it. Safe for concurrent use.
type Minter interface {
	// Child makes the token of a step below its delegation's: one Vault policy, no children, a
	// hard end at g.Expires, the grant id in its display name and metadata. Step 3 of issue.
	CreateStepToken(ctx context.Context, g Grant, displayName, policy string) (Handle, error)
	// Mint sends one request with the step's token, once. Step 5 of issue. An error that wraps
	// ErrNotMinted says that certainly nothing was made; after any other the outcome is unknown.
	Mint(ctx context.Context, token Handle, m Mint) (Lease, Secret, error)
}

// ErrNotMinted says that a failed mint certainly made nothing.
var ErrNotMinted = errors.New("nothing was minted")

// Killer ends what was made. Its methods do not retry, may be repeated, and take a long time
// only when Vault does. Safe for concurrent use.
type Killer interface {
	// Kill revokes a token by accessor, and with it its children and their leases; Vault may
	// only have queued that when Kill returns. It returns nil when the token is gone already.
	Kill(ctx context.Context, accessor string) error
	// Revoke ends one lease and waits for it. It returns nil when the lease is gone already.
	Revoke(ctx context.Context, lease string) error
	// Gone reports for each lease whether Vault no longer knows it.
	LeasesGone(ctx context.Context, leases []string) ([]bool, error)
}

// LeaseLister is a Vault that can list the leases below the paths at which tools mint.
type LeaseLister interface {
	// Leases gives every lease there is below the mint paths of tools, whoever asked for it: of the running
	// bundle's when tools is nil, otherwise of the given ones, of which only Backend and Path are known.
	// What could be listed is given with an error, too.
	Leases(ctx context.Context, tools []Tool) ([]FoundLease, error)
}

// IrrevocableLister is a Vault that gives up revoking a lease after some tries, and says of which.
type IrrevocableLister interface {
	// Irrevocable gives their ids, of leases that are not ours as well.
	Irrevocable(ctx context.Context) ([]string, error)
}

// Backend is what Vault cannot do alone for one kind of target. A Backend that can also cut or
// prove implements [Severer] and [Prover]; one that can list what lives under our names, [Finder].
// Safe for concurrent use.
type Backend interface {
	// Load checks a tool's declaration: its path, settings, and how each argument reaches the
	// target. It touches nothing.
	Load(Tool) error
	// Prepare narrows the mint to the grant's arguments. What it creates at the target is rights
	// that many grants share, never a credential. DisplayName is what the step's token is called,
	// at most 100 bytes of letters, digits and hyphens; it begins with the grant id.
	Prepare(ctx context.Context, t Tool, g Grant) (m Mint, displayName string, err error)
}

// Severer cuts at the target, in bulk, without Vault.
type Severer interface {
	// Sever makes the grants' secrets useless and ends what was opened with them, all in one go
	// where the target can. Grants whose secret was never made are no error. Repeatable.
	Sever(ctx context.Context, grants []Grant) error
}

// Prover checks at the target whether secrets are dead.
type Prover interface {
	// Prove gives one Evidence for each grant, in order. It looks for everything that carries the
	// grant's id, so that a secret whose answer was lost is found too.
	Prove(ctx context.Context, grants []Grant) ([]Evidence, error)
}

// Finder lists what lives at the target under our names.
type Finder interface {
	// Find gives the grant id that each credential's name carries.
	Find(ctx context.Context) ([]GrantID, error)
}

// Remover is a backend that can take away, without Vault, what lives under a grant's name.
type Remover interface {
	Remove(ctx context.Context, grants []GrantID) error
}
