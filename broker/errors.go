package broker

import (
	"errors"
	"fmt"
	"time"
)

// Kind is the class of a refusal or failure. The list is closed, and only broker/server maps it to HTTP. A Kind is
// itself an error, so that errors.Is(err, broker.Denied) works for every [Error].
type Kind uint8

// The kinds. The zero value is Internal: an unclassified error reveals nothing.
const (
	Internal        Kind = iota // a fault of the broker; its text stays internal
	Malformed                   // the request is not valid
	Unauthenticated             // no acceptable identity
	Denied                      // policy, scope or budget refuses
	NotFound                    // it does not exist, or is not the caller's: the caller cannot tell which
	Revoked                     // fenced
	Expired                     // its time has ended
	Conflict                    // the state changed, or the key was used for another request
	Unavailable                 // a necessary part does not answer; nothing was handed out
	OverLimit                   // the caller has too much of something at a time; it was refused before any act
)

var kindNames = [...]string{"internal", "malformed", "unauthenticated", "denied", "not-found",
	"revoked", "expired", "conflict", "unavailable", "over-limit"}

// String is the kind's name on the wire and in logs.
func (k Kind) String() string {
	if int(k) >= len(kindNames) {
		return "internal"
	}
	return kindNames[k]
}

// Error makes a Kind usable as the target of errors.Is.
func (k Kind) Error() string { return k.String() }

// Code is one exact reason. A code stays the same over releases, so that an agent can act on it without parsing text.
// An empty Code adds nothing to the kind's name.
type Code string

// The codes of refusals that an agent or an operator can act on.
const (
	CodeToolUnknown       Code = "tool_unknown"          // no such tool in the running policy bundle
	CodeToolNotDelegated  Code = "tool_not_delegated"    // the delegation does not hold the tool for use
	CodeArgumentOutside   Code = "argument_outside"      // an argument outside the delegation or the declaration
	CodePolicyDenied      Code = "policy_denied"         // no permit, or a forbid
	CodeViolation         Code = "violation"             // forbidden, and policy attaches a consequence
	CodeApprovalNeeded    Code = "approval_needed"       // allowed as soon as the obligation is met
	CodeNarrowingTooWeak  Code = "narrowing_too_weak"    // policy requires a stronger label than the tool's
	CodeBudgetExhausted   Code = "budget_exhausted"      // a limit of the chain is spent
	CodeTooFast           Code = "too_fast"              // a limit per minute is spent; retry later
	CodeCallerLimit       Code = "caller_limit"          // a limit on the caller's steps in all chains is reached
	CodeManyChains        Code = "too_many_chains"       // the caller has as many open chains as it may
	CodeDelegationUnknown Code = "delegation_unknown"    // no such delegation, or not held by the caller
	CodeChainOverCap      Code = "chain_over_cap"        // requests a chain beyond the caps of policy
	CodeEnvelopeRefused   Code = "envelope_refused"      // the envelope is not valid for the caller and now
	CodeDelegationWider   Code = "delegation_wider"      // requests more than the parent may pass on
	CodeDelegationDepth   Code = "delegation_depth"      // cannot be passed on again
	CodeForeignDomain     Code = "foreign_trust_domain"  // receiver in another trust domain, and no permit names both
	CodeGrantUnknown      Code = "grant_unknown"         // no such grant, or not the caller's
	CodeKeyOtherSeal      Code = "key_other_seal"        // the idempotency key was used for a step with another seal
	CodeAlreadyCollected  Code = "already_collected"     // the sealed secret was collected before
	CodeDeliveryLost      Code = "delivery_lost"         // the sealed secret is no longer kept; the grant has ended
	CodeDeliveriesFull    Code = "deliveries_full"       // too many sealed secrets wait to be collected
	CodeKeyOtherTool      Code = "key_other_tool"        // the idempotency key was used for a step with another tool
	CodeKeyOtherArguments Code = "key_other_arguments"   // the idempotency key was used for a step with other arguments
	CodeFenced            Code = "fenced"                // the chain, node or grant is revoked, by itself or by a rule
	CodeFrozen            Code = "frozen"                // no new secrets for now; may be lifted
	CodeExpired           Code = "expired"               // the delegation, grant or identity has expired
	CodeLedgerDown        Code = "ledger_unavailable"    // the ledger cannot commit
	CodeLedgerChecking    Code = "ledger_checking"       // the ledger is checked after a start; fences are taken
	CodeArchiveDamaged    Code = "archive_damaged"       // a segment of the archive is missing or damaged; revoking works
	CodeStopping          Code = "stopping"              // this broker is stopping; fences are taken
	CodeVaultDown         Code = "vault_unavailable"     // Vault cannot mint; nothing is left behind
	CodeVaultRefused      Code = "vault_refused"         // Vault refuses, and does so until a person changes Vault
	CodeVaultPolicy       Code = "vault_policy"          // the tool's policy in Vault is gone, or does not permit its path
	CodeVaultIdentity     Code = "vault_identity_policy" // Vault's identity gives the broker's tokens a policy of its own
	CodeVaultBusy         Code = "vault_busy"            // Vault limits requests or leases; nothing is left behind
	CodeClockSkew         Code = "clock_skew"            // the clocks of the broker and of Vault differ too much
	CodeLeasesLeft        Code = "leases_left"           // Vault does not remove the leases of secrets that are dead
	CodeOutcomeUnknown    Code = "outcome_unknown"       // a mint may have succeeded: it is revoked. Use a new key
	CodeBackendDown       Code = "backend_unavailable"   // the tool's target cannot be prepared
	CodeIssuingStopped    Code = "issuing_stopped"       // the broker doubts its clock, identity or restored ledger
	CodeRevocationUnknown Code = "revocation_unknown"    // no such revocation
	// CodeSelectorEmpty: the selector matches nothing, and nothing that is open can match later.
	CodeSelectorEmpty  Code = "selector_matches_nothing"
	CodeCanaryUnknown  Code = "canary_unknown"       // no such canary
	CodeCanaryValue    Code = "canary_value"         // the leaked value is a canary: no grant handed it out
	CodePlanStale      Code = "plan_stale"           // the set has grown since the plan
	CodePlanUnknown    Code = "plan_unknown"         // the token is not from this broker, or is too old
	CodeSecondPerson   Code = "second_person_needed" // unfreezing requires two people
	CodePolicyOlder    Code = "policy_older"         // the policy bundle is not newer than the one in force
	CodeTooManyMints   Code = "too_many_mints"       // too many steps of the caller wait for their mint
	CodeTooManyReports Code = "too_many_reports"     // too many reports of the caller without an effect
	CodeLedgerShare    Code = "ledger_share"         // the caller has written its share of the ledger
	// CodeTooManyConnections: too many connections of the SPIFFE ID are open, or without an SVID from the address.
	CodeTooManyConnections Code = "too_many_connections"
)

// Error is the only type of error that crosses the broker's API.
type Error struct {
	Kind Kind
	Op   string // the procedure: "open", "delegate", "issue", …
	Msg  string // for people; no secret, no policy text, no data of another caller
	Code Code   // empty: the kind's name
	Err  error  // cause, for logs; never leaves the broker

	// The rest is what an agent needs in order to act. A field is empty if it does not apply.
	Policies   []string      // ids of the policies that decided
	Missing    []string      // missing permissions, in the terms of the request: "tool:deploy:use", "argument:tables"
	Remedy     string        // how to ask for it
	RetryAfter time.Duration // zero: a retry changes nothing
	Revocation RevocationID  // the revocation that the violation caused
}

// Errorf makes an Error with a message. The message is visible to callers: give a cause to [Error.Because] instead.
func Errorf(kind Kind, op, format string, args ...any) *Error {
	return &Error{Kind: kind, Op: op, Msg: fmt.Sprintf(format, args...)}
}

// With sets the code.
func (e *Error) With(c Code) *Error { e.Code = c; return e }

// Because sets the cause, which stays internal.
func (e *Error) Because(err error) *Error { e.Err = err; return e }

// Lacks adds the missing permissions, and how to ask for them.
func (e *Error) Lacks(remedy string, missing ...string) *Error {
	e.Remedy, e.Missing = remedy, append(e.Missing, missing...)
	return e
}

// After sets the time after which the same request may succeed.
func (e *Error) After(d time.Duration) *Error { e.RetryAfter = d; return e }

// Decided sets the policies that decided.
func (e *Error) Decided(policies []string) *Error { e.Policies = policies; return e }

// Error is for logs: it has the message and the cause.
func (e *Error) Error() string {
	s := e.Op + ": " + e.Msg
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is makes errors.Is(err, broker.Denied) true for an Error of that kind.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && k == e.Kind
}

// KindOf returns the kind of err. It is Internal for an error that has none.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Internal
}
