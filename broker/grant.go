package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker/args"
)

// GrantState is how far a grant has come. States only go forward.
type GrantState string

// The states of a grant.
const (
	StateIntent GrantState = "INTENT" // recorded; nothing exists in Vault that could mint
	StateHandle GrantState = "HANDLE" // the step's token is recorded; a mint may have been sent
	StateIssued GrantState = "ISSUED" // the lease is recorded and the secret may be handed over
	StateClosed GrantState = "CLOSED" // over, and why we believe so is in Evidence
)

// Grant is the recorded permission for one step. It holds all that is known of the secret but
// the secret.
type Grant struct {
	ID           GrantID      `json:"id"`
	Chain        ChainID      `json:"chain"`
	Delegation   DelegationID `json:"delegation"`
	Caller       spiffeid.ID  `json:"caller"`
	Tool         ToolName     `json:"tool"`
	Backend      string       `json:"backend"`
	Narrowing    Narrowing    `json:"narrowing"`
	Args         args.Args    `json:"args"`
	Purpose      string       `json:"purpose,omitempty"`
	Path         VaultPath    `json:"path,omitzero"` // Vault mount and role that it is minted at
	State        GrantState   `json:"state"`
	Created      time.Time    `json:"created"`
	Expires      time.Time    `json:"expires"`
	Bundle       string       `json:"bundle"`
	Policies     []string     `json:"policies,omitempty"`
	Token        Handle       `json:"token,omitzero"`   // from HANDLE on
	MintDeadline time.Time    `json:"settles,omitzero"` // from HANDLE on: no mint sent for it can complete after this
	Lease        Lease        `json:"lease,omitzero"`   // from ISSUED on
	Fence        *Fence       `json:"fence,omitempty"`  // on this grant alone
	Ending       Ending       `json:"ending,omitempty"`
	Ended        time.Time    `json:"ended,omitzero"`
	Outcome      Outcome      `json:"outcome,omitempty"`
	Evidence     []Evidence   `json:"evidence,omitempty"`

	// ArgsDigest is the SHA-256 of Args in their canonical form, in hex, as of the intent: what jwt and token
	// tools write into what they mint. Empty in a grant of a version that did not record it.
	ArgsDigest string `json:"args_digest,omitempty"`

	// Longest is the longest that what is minted can live at its target, from HANDLE on; zero: no longer
	// than the step.
	Longest time.Duration `json:"longest,omitempty"`

	Sealed    string      `json:"sealed,omitempty"`   // thumbprint of the key that the secret is sealed to; empty: it was in the answer
	Collector spiffeid.ID `json:"collector,omitzero"` // who may collect it, when it is sealed
	Collected time.Time   `json:"collected,omitzero"` // zero: it was not
}

// Ending says why a grant came to its end.
type Ending string

// The endings.
const (
	EndingClosed  Ending = "closed"  // by its agent
	EndingExpired Ending = "expired" // its time was over
	EndingRevoked Ending = "revoked" // fenced
	EndingFailed  Ending = "failed"  // it never came to a hand-over
)

// Outcome is what is known of a secret's life. The zero value is that nothing is.
type Outcome string

// The outcomes.
const (
	OutcomeUnknown Outcome = ""       // not proven either way
	OutcomeAlive   Outcome = "alive"  // shown to work still
	OutcomeDead    Outcome = "dead"   // shown not to work
	OutcomeStatic  Outcome = "static" // it cannot be ended, only rotated: it works on
)

// String is the outcome in words.
func (o Outcome) String() string {
	if o == OutcomeUnknown {
		return "not proven either way"
	}
	return string(o)
}

// Evidence is one check of whether a secret is dead.
type Evidence struct {
	At      time.Time `json:"at"`
	Check   string    `json:"check"` // what was asked of whom: "vault: lease lookup", "postgres: pg_roles and pg_stat_activity"
	Outcome Outcome   `json:"outcome,omitempty"`
	Answer  string    `json:"answer"` // in a few words; no secret

	// Listed says of a dead secret that this rests on a list, or on an answer to whoever asks: a verifier that
	// looks at neither takes it until its own end.
	Listed bool `json:"listed,omitempty"`
}

// Handle is a Vault token as the ledger knows it: by its accessor, which can end but not use it.
type Handle struct {
	Accessor string    `json:"accessor"`
	Expires  time.Time `json:"expires,omitzero"` // its hard end, however often it is renewed
}

// Lease is what Vault gave for a grant.
type Lease struct {
	ID      string    `json:"id,omitempty"`  // Vault's lease id; empty where the engine gives none
	Ref     string    `json:"ref,omitempty"` // what the backend calls it: a role name, a serial number, a token id
	Expires time.Time `json:"expires"`

	// Outlives is when the target itself lets the secret in no more, where that is later than
	// Expires: what bounds it when nobody can end it sooner.
	Outlives time.Time `json:"outlives,omitzero"`

	// Digests stand for the values that the secret had, where these are not to be guessed.
	Digests []ValueDigest `json:"digests,omitempty"`
}

// LatestEnd is when the grant's secret is over even if nobody can do anything about it. It is never earlier than
// the true end: a mint whose answer is not known may complete as late as MintDeadline, and lives its whole life from then.
func (g Grant) LatestEnd() time.Time {
	end := g.Expires
	for _, t := range []time.Time{g.Lease.Expires, g.Lease.Outlives, g.Token.Expires} {
		if t.After(end) {
			end = t
		}
	}
	if g.State == StateHandle && g.Lease.Expires.IsZero() {
		if late := g.MintDeadline.Add(g.Longest + EndTolerance); late.After(end) {
			end = late
		}
		if late := g.MintDeadline.Add(g.Expires.Sub(g.Created)); late.After(end) {
			end = late
		}
	}
	return end
}
