package broker

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Ledger is the truth about chains, delegations, grants and revocations. It keeps records by key and an append-only log
// of entries, and commits both together.
//
// All methods are safe for concurrent use. A secret is never in a record.
type Ledger interface {
	// Update runs f in one transaction that is serializable with every other. When Update returns nil, everything that
	// f put and appended is durable. If f returns an error, nothing is applied and Update returns that error.
	//
	// An error that wraps ErrNotCommitted means that the store certainly left nothing behind. After any other error of
	// the store the outcome is unknown, and only a new read can tell. A transaction that puts a record and appends no
	// entry is refused. f may run more than once.
	Update(ctx context.Context, f func(Tx) error) error
	// Order is [Ledger.Update] that does not wait until f's changes are durable. When Order returns nil, they have their
	// place among all others, and every later transaction sees them. They are durable with the next Update that changes
	// something and returns nil, and within [MaxOrderDelay] on a store that works. A crash before that loses them,
	// together with all that was ordered after them.
	//
	// After Order has returned nil, or just before, the store calls done, once: with nil when the changes are durable,
	// and before the Update returns that made them so. With an error when their write failed: then they are gone, or the
	// outcome is unknown, as after an error of Update. done must not block and must not use the ledger. It is not called
	// when Order returns an error.
	Order(ctx context.Context, f func(Tx) error, done func(error)) error
	// View runs f on a consistent snapshot. The snapshot is not older than the last Update or Order that returned before
	// the call. Put and Append fail inside View.
	View(ctx context.Context, f func(Tx) error) error
	// Entries returns at most limit entries of the audit log after a revision, oldest first. It returns durable ones
	// alone, so that an entry that is signed or sent elsewhere stays in the log.
	Entries(ctx context.Context, after Revision, limit int) ([]Entry, error)
}

// Urgent returns a context for a [Ledger.Update] that reduces authority, such as a fence. A store may run it before other
// updates that wait, and in a transaction without them. It passes over none of them twice.
func Urgent(ctx context.Context) context.Context { return context.WithValue(ctx, urgent{}, true) }

// IsUrgent reports whether the context is of [Urgent].
func IsUrgent(ctx context.Context) bool { return ctx.Value(urgent{}) != nil }

type urgent struct{}

// MaxOrderDelay is how long the changes of [Ledger.Order] wait for an Update that makes them durable.
const MaxOrderDelay = 5 * time.Millisecond

// Tx is one transaction. One goroutine uses it, and only until f returns.
type Tx interface {
	// Get returns the record's value, or nil if there is none. The caller must not change the value. It is valid until
	// f returns.
	Get(key string) ([]byte, error)
	// Put sets the record; a nil value deletes it.
	Put(key string, value []byte) error
	// Scan calls f with the records that have keys with the prefix, in the order of the keys, until f returns false. It
	// begins after the key after, or at the first record if after is empty. It sees the records that this transaction
	// put.
	Scan(prefix, after string, f func(key string, value []byte) bool) error
	// ScanBack is Scan in the opposite order. It begins before the key before, or at the last record if before is empty.
	ScanBack(prefix, before string, f func(key string, value []byte) bool) error
	// Append adds an entry to the audit log and returns its revision. The store sets Revision and chains the entry's
	// digest to that of the previous entry.
	Append(Entry) (Revision, error)
	// Head returns the revision of the last entry that this transaction sees, its own included. It is 0 if there is
	// none.
	Head() (Revision, error)
	// Trim removes the entries up to a revision from the audit log, after they were kept elsewhere. Entries returns the
	// later ones alone from then on, and revisions go on. It needs an Update of a store that was checked.
	Trim(through Revision) error
}

// Archive keeps records and entries that the ledger needs no more, in segments that are written once. What decides about
// authority reads the ledger alone, so no fault of the archive keeps the broker from revoking.
//
// All methods are safe for concurrent use. Errors with CodeArchiveDamaged name the segment that is missing or damaged.
type Archive interface {
	// History is the ledger's View with all that was archived. A record of the ledger comes before an archived one with
	// its key. Only the segments are opened that may have what f reads.
	History(ctx context.Context, f func(Tx) error) error
	// Add makes a segment of records, in any order, and of the oldest entries of the log that were made before a time, at
	// most as many as a segment takes. When it returns nil, the segment is durable and the ledger lists it. With nothing
	// to keep the Segment is zero. After an error it may be listed: see Unfinished. There may be no unfinished one.
	Add(ctx context.Context, records []Archived, before time.Time) (Segment, error)
	// Unfinished returns the listed segment whose records were not all removed from the ledger, if there is one.
	Unfinished(ctx context.Context) (s Segment, ok bool, err error)
	// Records calls f with the records of a segment, in the order of their keys, some at a time.
	Records(ctx context.Context, s Segment, f func([]Archived) error) error
	// Finish records in a transaction that the records of a segment were removed from the ledger.
	Finish(tx Tx, s Segment) error
}

// Archived is a record as a segment has it.
type Archived struct {
	Key   string
	Value []byte
}

// Segment is one file of an [Archive].
type Segment struct {
	Number  uint64 // from 1, without gaps
	Name    string
	Records uint64
	First   Revision // of its first entry; after Last: it has none
	Last    Revision // of the last archived entry, in this segment or an earlier one
}

// ErrNotCommitted means that a failed Update certainly left nothing behind.
var ErrNotCommitted = errors.New("the ledger did not commit")

// ErrChecking means that the store still checks what it has. Until it knows that nothing is missing, it takes only
// updates that reduce authority.
var ErrChecking = errors.New("the ledger is being checked")

// ErrNoEntry is the store's refusal of a change without an audit entry.
var ErrNoEntry = errors.New("a change without an audit entry")

// Policy is one immutable snapshot of the running bundle. Its methods are pure functions and safe for concurrent use.
type Policy interface {
	// Decide answers a question. A failed evaluation denies.
	Decide(Question) Decision
	// Tool returns a declared tool.
	Tool(ToolName) (Tool, bool)
	// Digest identifies the bundle in grants and in the audit.
	Digest() string
}

// EnvelopeVerifier is a [Policy] that names issuers of envelopes. A policy that is none refuses every envelope.
type EnvelopeVerifier interface {
	// VerifyEnvelope returns the content of an envelope that one of the issuers signed for the caller, and that is valid
	// now. The error says why it is refused, has no part of the token, and is for the caller.
	VerifyEnvelope(token string, caller spiffeid.ID, now time.Time) (Envelope, error)
}

// CallerPolicy is a [Policy] with rules over the steps of a caller in all chains. For a policy that is none, no such
// history is kept.
type CallerPolicy interface {
	// CallerWindows returns the windows of these rules.
	CallerWindows() []time.Duration
}

// CallerWindows returns the windows of the policy's rules over the steps of a caller in all chains.
func CallerWindows(p Policy) []time.Duration {
	if c, ok := p.(CallerPolicy); ok {
		return c.CallerWindows()
	}
	return nil
}

// ReadEnvelope verifies the envelope of a request to open with the policy's issuers. It returns nil for an empty token.
func ReadEnvelope(op string, p Policy, token string, caller spiffeid.ID, now time.Time) (*Envelope, *Error) {
	if token == "" {
		return nil, nil
	}
	refuse := func(why string) *Error {
		return Errorf(Denied, op, "the envelope is refused: %s", why).With(CodeEnvelopeRefused).
			Lacks("ask its issuer for another envelope, for your SPIFFE ID and this broker")
	}
	v, ok := p.(EnvelopeVerifier)
	if !ok {
		return nil, refuse("the bundle names no issuer")
	}
	e, err := v.VerifyEnvelope(token, caller, now)
	if err != nil {
		return nil, refuse(err.Error())
	}
	return &e, nil
}

// Vault is the part of Vault that the procedures use. The tokens of delegations form one tree below the broker's own
// token. So one call on a root ends everything below it, even without Pawl. A Vault may also be a [LeaseLister] and an
// [IrrevocableLister].
type Vault interface {
	TokenTree
	Minter
	Killer
}

// TokenTree makes the tokens of delegations. The tokens stay inside the implementation, in memory; the ledger knows
// them by accessor. Safe for concurrent use.
type TokenTree interface {
	// HasToken reports whether a usable token of the delegation is in memory.
	HasToken(DelegationID) bool
	// CreateDelegationToken makes a token for a delegation below its parent's. The token holds the given Vault policies
	// and may create children. It ends soon after it is no longer renewed, and when d expires at the latest. It has no
	// use before Activate. The error is an ErrNoParent if the parent's token is not in memory.
	CreateDelegationToken(ctx context.Context, d Delegation, policies []string) (Handle, error)
	// Activate puts a created token into use, after its accessor was recorded.
	Activate(DelegationID, Handle)
}

// ErrNoParent means that the parent of a new token is not in memory.
var ErrNoParent = errors.New("the parent's token is not in memory")

// Minter makes the token of one step, where it needs one, and the secret. Safe for concurrent use.
type Minter interface {
	// CreateStepToken makes the token of a step below its delegation's: step 3 of issue. The token holds one Vault
	// policy, may have no children and ends at g.Expires in any case. Its display name and its metadata have the
	// grant's id.
	CreateStepToken(ctx context.Context, g Grant, displayName, policy string) (Handle, error)
	// DelegationToken returns the token in use of g's delegation, for a step without a token of its own: step 3 of issue.
	// The error is an ErrNoParent if there is none in memory.
	DelegationToken(g Grant, policy string) (Handle, error)
	// Mint sends one request with the step's token, once, or with its delegation's where m.Shared is set: step 5 of
	// issue. The caller calls it once for a grant. An error that wraps ErrNotMinted means that certainly nothing was
	// made. After any other error the outcome is unknown.
	Mint(ctx context.Context, token Handle, m Mint) (Lease, Secret, error)
}

// ErrNotMinted means that a failed mint certainly made nothing.
var ErrNotMinted = errors.New("nothing was minted")

// Killer ends tokens and leases. Its methods do not retry, may be repeated, and take long only if Vault does. Safe for
// concurrent use.
type Killer interface {
	// Kill revokes a token by accessor, and with it its children and their leases. Vault may only have queued that when
	// Kill returns. Kill returns nil if the token is already gone.
	Kill(ctx context.Context, accessor string) error
	// Revoke revokes one lease and waits for it. It returns nil if the lease is already gone.
	Revoke(ctx context.Context, lease string) error
	// LeasesGone reports for each lease whether Vault no longer knows it.
	LeasesGone(ctx context.Context, leases []string) ([]bool, error)
}

// LeaseLister is a Vault that can list the leases below the paths at which tools mint.
type LeaseLister interface {
	// Leases returns the id of every lease below the mint paths of tools, from any requester. A nil tools stands for the
	// tools of the running bundle. Of other tools only Backend and Path are known. With an error, Leases also returns
	// the ids that it could list. It costs one request for each path.
	Leases(ctx context.Context, tools []Tool) ([]string, error)
	// LookUpLeases returns the leases of these ids that still exist. It costs one request for each id.
	LookUpLeases(ctx context.Context, ids []string) ([]FoundLease, error)
}

// IrrevocableLister is a Vault that stops trying to revoke a lease after some attempts, and lists such leases.
type IrrevocableLister interface {
	// Irrevocable returns their ids, including those of leases that are not Pawl's.
	Irrevocable(ctx context.Context) ([]string, error)
}

// Backend does for one kind of target the work that Vault cannot do alone. A Backend that can also sever or prove is a
// [Severer] and a [Prover]. One that can list or remove the credentials under our names is a [Finder] and a [Remover].
// Safe for concurrent use.
type Backend interface {
	// Load checks a tool's declaration: its path, its settings, and how each argument reaches the target. It does not
	// contact the target.
	Load(Tool) error
	// Prepare narrows the mint to the grant's arguments. At the target it creates only rights that many grants share,
	// never a credential. The result displayName is the name of the step's token. It has at most 100 letters, digits
	// and hyphens and begins with the grant's id.
	Prepare(ctx context.Context, t Tool, g Grant) (m Mint, displayName string, err error)
}

// Severer ends access at the target, in bulk and without Vault.
type Severer interface {
	// Sever makes the grants' secrets useless and ends the sessions opened with them, all at once where the target can.
	// A grant without a secret is no error. It may be repeated.
	Sever(ctx context.Context, grants []Grant) error
}

// Prover checks at the target whether secrets are dead.
type Prover interface {
	// Prove returns one Evidence for each grant, in order. It searches for everything with the grant's id, so that it
	// also finds a secret if the answer of its mint was lost. With a Final one the grant is closed before Vault has
	// removed its lease.
	Prove(ctx context.Context, grants []Grant) ([]Evidence, error)
}

// Finder lists the credentials at the target under our names.
type Finder interface {
	// Find returns the grant id in each credential's name.
	Find(ctx context.Context) ([]GrantID, error)
}

// Remover removes from the target, without Vault, the credentials under a grant's name.
type Remover interface {
	Remove(ctx context.Context, grants []GrantID) error
}

// Watcher notices when another server takes the place of its target. After a failover that server may not have what was
// done at the one before.
type Watcher interface {
	// Replaced returns a channel that receives a value when the target was first reached, and when another server may
	// have taken its place.
	Replaced() <-chan struct{}
}
