package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker/args"
)

// GrantState is the progress of a grant. States only go forward, except that a CLOSED grant is live again when its
// secret is found to work.
type GrantState string

// The states of a grant.
const (
	StateIntent GrantState = "INTENT" // recorded; nothing in Vault can mint for it yet
	StateHandle GrantState = "HANDLE" // the token that mints is recorded; a mint may have been sent
	StateIssued GrantState = "ISSUED" // the lease is recorded, and the secret may be handed over
	StateClosed GrantState = "CLOSED" // ended; Evidence has the reasons to believe so
)

// Grant is the recorded permission for one step. It has everything that is known of the secret, but not the secret.
type Grant struct {
	ID         GrantID      `json:"id"`
	Chain      ChainID      `json:"chain"`
	Delegation DelegationID `json:"delegation"`
	Caller     spiffeid.ID  `json:"caller"`
	Tool       ToolName     `json:"tool"`
	Backend    string       `json:"backend"`
	Narrowing  Narrowing    `json:"narrowing"`
	Args       args.Args    `json:"args"`
	Purpose    string       `json:"purpose,omitempty"`
	Path       VaultPath    `json:"path,omitzero"` // of the tool, when the grant was made
	State      GrantState   `json:"state"`
	Created    time.Time    `json:"created"`
	Expires    time.Time    `json:"expires"`
	Bundle     string       `json:"bundle"`
	Policies   []string     `json:"policies,omitempty"`
	Token      Handle       `json:"token,omitzero"`  // from HANDLE on; zero: the step has no token of its own
	Lease      Lease        `json:"lease,omitzero"`  // from ISSUED on
	Fence      *Fence       `json:"fence,omitempty"` // on this grant alone
	Ending     Ending       `json:"ending,omitempty"`
	Ended      time.Time    `json:"ended,omitzero"`
	Outcome    Outcome      `json:"outcome,omitempty"`
	Evidence   []Evidence   `json:"evidence,omitempty"`

	// MintDeadline is the time after which no mint for this grant can complete, from HANDLE on.
	MintDeadline time.Time `json:"settles,omitzero"`

	// DelegationToken is the delegation's token that mints, from HANDLE on, for a step without a token of its own. It ends
	// with its delegation, never with this grant.
	DelegationToken Handle `json:"delegation_token,omitzero"`

	// ArgsDigest is the SHA-256 of the canonical Args in hex, as of the intent. The jwt and token tools write it into
	// their tokens. It is empty in a grant of a version that did not record it.
	ArgsDigest string `json:"args_digest,omitempty"`

	// Longest is the longest lifetime of the secret at its target, from HANDLE on. Zero: no longer than the step.
	Longest time.Duration `json:"longest,omitempty"`

	// Sealed is the thumbprint of the key to which the secret is sealed. Empty: the secret was in the answer.
	Sealed    string      `json:"sealed,omitempty"`
	Collector spiffeid.ID `json:"collector,omitzero"` // may collect a sealed secret
	Collected time.Time   `json:"collected,omitzero"` // zero: not collected

	// NothingMade says that Vault certainly made nothing for the grant. Such a grant is not counted in budgets and
	// histories once it is CLOSED.
	NothingMade bool `json:"nothing_made,omitempty"`
	// Held grants end when no connection of their caller holds them.
	Held bool `json:"held,omitempty"`

	// Counted has the keys of the ledger's records in which the step counts for its caller and its chain's principal.
	Counted []string `json:"counted,omitempty"`
}

// Ending is the reason why a grant ended.
type Ending string

// The endings.
const (
	EndingClosed  Ending = "closed"  // its agent closed it
	EndingExpired Ending = "expired" // it expired
	EndingRevoked Ending = "revoked" // it was fenced
	EndingFailed  Ending = "failed"  // the ledger has no record that its secret was handed over
	EndingLost    Ending = "lost"    // it was held, and its holder is gone
)

// Outcome is the proven state of a secret. The zero value means that nothing is proven.
type Outcome string

// The outcomes.
const (
	OutcomeUnknown Outcome = ""       // not proven either way
	OutcomeAlive   Outcome = "alive"  // shown to work still
	OutcomeDead    Outcome = "dead"   // shown not to work
	OutcomeStatic  Outcome = "static" // it works until it is rotated: it cannot be ended
)

// String is the outcome in words.
func (o Outcome) String() string {
	if o == OutcomeUnknown {
		return "not proven either way"
	}
	return string(o)
}

// Evidence is the result of one check whether a secret is dead.
type Evidence struct {
	At      time.Time `json:"at"`
	Check   string    `json:"check"` // "vault: lease lookup", "postgres: pg_roles and pg_stat_activity"
	Outcome Outcome   `json:"outcome,omitempty"`
	Answer  string    `json:"answer"` // in a few words; no secret

	// Listed means that the death of the secret rests on a list, or on an answer that a verifier must request. A
	// verifier that checks neither accepts the secret until it expires.
	Listed bool `json:"listed,omitempty"`

	// Final means that the target alone shows the secret dead, and that it stays so: nothing that Vault does with the
	// lease, or fails to do, makes it work again. The zero value leaves the lease a part of the proof.
	Final bool `json:"final,omitempty"`
}

// Handle is a Vault token as the ledger knows it: by its accessor, which can end the token but not use it.
type Handle struct {
	Accessor string    `json:"accessor"`
	Expires  time.Time `json:"expires,omitzero"` // its hard expiry, which no renewal extends
}

// Lease is what Vault returned for a grant.
type Lease struct {
	ID      string    `json:"id,omitempty"`  // Vault's lease id; empty if the engine gives none
	Ref     string    `json:"ref,omitempty"` // the backend's name: a role name, a serial number, a token id
	Expires time.Time `json:"expires"`

	// Outlives is when the target by itself no longer accepts the secret, if that is later than Expires. It bounds a
	// secret that cannot be ended sooner.
	Outlives time.Time `json:"outlives,omitzero"`

	// Request is Vault's request_id of the mint, as in Vault's audit log. It is empty in a grant of a version that did not
	// record it, and where the answer of the mint was lost.
	Request string `json:"request,omitempty"`

	// Digests identify the values of the secret that cannot be guessed.
	Digests []ValueDigest `json:"digests,omitempty"`
}

// Unrecorded reports whether the grant may have made a secret of which the ledger knows nothing but the end: the answer of
// its mint was lost, or a crash came before the record of the hand-over was durable. While the issue goes on it is false:
// a grant older than the broker's process, which began at started, is not being issued.
func (g Grant) Unrecorded(started time.Time) bool {
	return g.State == StateHandle && (g.Ending != "" || !g.Created.After(started)) && g.Lease.Expires.IsZero() && !g.NothingMade
}

// LatestEnd is the time by which the grant's secret has ended even if every revocation fails. It is never earlier
// than the true end. A mint with an unknown answer may complete as late as MintDeadline, and its secret then lives
// its whole lifetime.
func (g Grant) LatestEnd() time.Time {
	end := g.Expires
	for _, t := range []time.Time{g.Lease.Expires, g.Lease.Outlives, g.Token.Expires} {
		if t.After(end) {
			end = t
		}
	}
	if g.State == StateHandle && g.Lease.Expires.IsZero() && !g.NothingMade {
		if late := g.MintDeadline.Add(g.Longest + EndTolerance); late.After(end) {
			end = late
		}
		if late := g.MintDeadline.Add(g.Expires.Sub(g.Created)); late.After(end) {
			end = late
		}
	}
	return end
}
