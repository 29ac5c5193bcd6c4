package broker

import (
	"context"
	"errors"
	"time"
)

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

// Mint is one request to Vault that makes a secret.
type Mint struct {
	Path   []string       // segments, each valid by the rules of plugins/vault; never spliced text
	Data   map[string]any // body; nil means that the path is read
	Leased bool           // an answer without a lease id is then refused
	Auth   bool           // the answer is a token: Finish gets its "auth" member for data
	Wrap   bool           // with Auth: asked for wrapped; Finish gets "wrap_info", whose "auth" is what Vault says of the token inside
	TTL    time.Duration  // the longest life accepted; an answer with more is refused
	// Finish turns the answer's data into what the agent gets, and gives the name by which the
	// backend knows it. expires is the end that Vault's lease gave, zero without a lease.
	Finish func(answer map[string]any, expires time.Time) (Finished, error)
}

// Finished is a secret ready for delivery.
type Finished struct {
	Secret  Secret
	Ref     string    // the backend's name for it; empty when it has none
	Expires time.Time // its end; zero: the lease's

	Outlives time.Time // when the target lets it in no more by itself; zero: at its end

	// Digests are of the members of Secret that give access and that a machine drew, see
	// [ValueDigest]; none for a value that a person may have chosen.
	Digests []ValueDigest
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

// FoundLease is a lease that Vault lists.
type FoundLease struct {
	ID     string
	Issued time.Time
}

// Remover is a backend that can take away, without Vault, what lives under a grant's name.
type Remover interface {
	Remove(ctx context.Context, grants []GrantID) error
}
