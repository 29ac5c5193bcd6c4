package broker

import (
	"context"
	"time"
)

// Mint is one request to Vault that makes a secret.
type Mint struct {
	Path   VaultPath
	Data   map[string]any // body; nil: the request reads the path
	Leased bool           // refuse an answer without a lease id
	Auth   bool           // the answer is a token, and Finish gets its member "auth"

	// NoLease says that the secret has no lease, so a token of its own would end nothing: its step needs none. An answer
	// with a lease or a token is refused.
	NoLease bool
	// Shared is set by the engine for a step without a token of its own. Nil: the step has one.
	Shared *SharedToken

	TTL time.Duration // the longest acceptable lifetime; an answer with a longer one is refused
	// Expires is the end of the step, where its token was made ahead and outlives it. Zero: they end together.
	Expires time.Time

	// Wrap, which requires Auth, asks for a wrapped answer. Finish gets the member "wrap_info"; its "auth" is Vault's
	// record of the token inside.
	Wrap bool

	// Named says that the secret can be ended only by what its answer names, which no other record has. The secret is
	// handed out when its lease is durable in the ledger, not before.
	Named bool

	// Absolute says that the secret ends at a time by Vault's clock, as a certificate does. It may then end MaxSkew later
	// than TTL allows, and is not asked for while the clocks differ by more.
	Absolute bool

	// Again makes the request once more, after Vault has refused the version of the key that this one names. Only a
	// backend whose secret is a signature sets it: one that nobody received is no secret. Nil: the request is sent once.
	Again func(context.Context) (Mint, error)

	// Finish makes the agent's secret from the answer's data, and gives the backend's name for it. It gets the expiry
	// of Vault's lease, or zero without a lease.
	Finish func(answer map[string]any, expires time.Time) (Finished, error)
}

// SharedToken says for which step a delegation's token mints.
type SharedToken struct {
	Grant   GrantID
	Tool    ToolName
	Policy  string    // the tool's Vault policy, which the token has among others
	Expires time.Time // of the grant
}

// Finished is a secret that is ready for delivery.
type Finished struct {
	Secret  Secret
	Ref     string    // the backend's name for it; empty: none
	Expires time.Time // zero: the lease's expiry

	Outlives time.Time // when the target by itself no longer accepts it; zero: at its expiry

	// Digests are of those members of Secret that give access and that a machine generated, see [ValueDigest]. A value
	// that a person may have chosen has none.
	Digests []ValueDigest
}

// FoundLease is a lease that Vault lists.
type FoundLease struct {
	ID     string
	Issued time.Time
}
