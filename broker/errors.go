package broker

import (
	"errors"
	"fmt"
	"time"
)

// Kind says what sort of refusal or failure an [Error] is. The list is closed; only
// broker/server maps it to HTTP. A Kind is itself an error, so that
// errors.Is(err, broker.Denied) works on anything this package returns.
type Kind uint8

// The kinds. The zero value is Internal: an error that nobody classified tells nothing.
const (
	Internal        Kind = iota // our own fault; its text stays inside
	Malformed                   // the request cannot mean anything
	Unauthenticated             // no acceptable identity
	Denied                      // policy, scope or budget says no
	NotFound                    // does not exist, or is not yours: the two are not told apart
	Revoked                     // fenced
	Expired                     // its time is over
	Conflict                    // the state moved, or the key was used for something else
	Unavailable                 // a part that is needed cannot answer; nothing was handed out
)

var kindNames = [...]string{"internal", "malformed", "unauthenticated", "denied", "not-found",
	"revoked", "expired", "conflict", "unavailable"}

// String is the kind's name on the wire and in logs.
func (k Kind) String() string {
	if int(k) >= len(kindNames) {
		return "internal"
	}
	return kindNames[k]
}

// Error makes a Kind usable as the target of errors.Is.
func (k Kind) Error() string { return k.String() }

// Code names one reason precisely and stays the same over releases, so that an agent can act
// on it without reading prose. An empty Code means that the kind's name says all there is.
type Code string

// The codes of refusals that an agent or operator can act on.
const (
	CodeToolUnknown       Code = "tool_unknown"         // no such tool in the running policy bundle
	CodeToolNotDelegated  Code = "tool_not_delegated"   // the delegation does not hold the tool for use
	CodeArgumentOutside   Code = "argument_outside"     // an argument is outside the delegation or the tool's declaration
	CodePolicyDenied      Code = "policy_denied"        // no permit, or a forbid
	CodeViolation         Code = "violation"            // forbidden, and policy says that something follows
	CodeApprovalNeeded    Code = "approval_needed"      // allowed once the obligation is met
	CodeNarrowingTooWeak  Code = "narrowing_too_weak"   // policy demands a stronger label than the tool's
	CodeBudgetExhausted   Code = "budget_exhausted"     // a limit of the chain is used up
	CodeTooFast           Code = "too_fast"             // a limit per minute is used up; retry later
	CodeDelegationUnknown Code = "delegation_unknown"   // no such delegation, or not held by the caller
	CodeDelegationWider   Code = "delegation_wider"     // asks for more than the parent may pass on
	CodeDelegationDepth   Code = "delegation_depth"     // may not be passed on any further
	CodeForeignDomain     Code = "foreign_trust_domain" // receiver in another trust domain without a policy that names both
	CodeGrantUnknown      Code = "grant_unknown"        // no such grant, or not the caller's
	CodeKeyOtherSeal      Code = "key_other_seal"       // the idempotency key was used for a step sealed otherwise
	CodeAlreadyCollected  Code = "already_collected"    // the sealed secret was collected before
	CodeDeliveryLost      Code = "delivery_lost"        // the sealed secret is not kept any more; the grant is ended
	CodeDeliveriesFull    Code = "deliveries_full"      // too many sealed secrets wait to be collected
	CodeKeyOtherTool      Code = "key_other_tool"       // the idempotency key was used for a step with another tool
	CodeKeyOtherArguments Code = "key_other_arguments"  // the idempotency key was used for a step with other arguments
	CodeFenced            Code = "fenced"               // the chain, node, grant or a rule over it is revoked
	CodeFrozen            Code = "frozen"               // no new secrets for now; may be lifted
	CodeExpired           Code = "expired"              // the delegation, grant or identity is past its time
	CodeLedgerDown        Code = "ledger_unavailable"   // the ledger cannot commit
	CodeVaultDown         Code = "vault_unavailable"    // Vault cannot mint; nothing is left behind
	CodeOutcomeUnknown    Code = "outcome_unknown"      // a mint may have happened; it is being hunted down. Ask again with a new key
	CodeBackendDown       Code = "backend_unavailable"  // the tool's target cannot be prepared
	CodeIssuingStopped    Code = "issuing_stopped"      // the broker itself is in doubt (clock, restore, identity)
	CodeRevocationUnknown Code = "revocation_unknown"   // no such revocation
	CodeSelectorEmpty     Code = "selector_matches_nothing"
	CodeCanaryUnknown     Code = "canary_unknown"       // no such canary
	CodeCanaryValue       Code = "canary_value"         // the leaked value is a canary's: no grant handed it out
	CodePlanStale         Code = "plan_stale"           // the set has grown since the plan
	CodePlanUnknown       Code = "plan_unknown"         // the token is not one of ours, or too old
	CodeSecondPerson      Code = "second_person_needed" // unfreezing takes two people
	CodePolicyOlder       Code = "policy_older"         // a policy bundle that is not newer than the one in force
)

// Error is the one type that leaves this package as an error.
type Error struct {
	Kind Kind
	Op   string // the procedure: "open", "delegate", "issue", …
	Msg  string // for people; no secret, no policy text, no other caller's data
	Code Code   // empty: the kind's name
	Err  error  // cause, for logs; never shown outside

	// What an agent needs in order to act; each empty when it does not apply.
	Policies   []string      // ids of the policies that decided
	Missing    []string      // what was lacking, in the words of the request: "tool:deploy:use", "argument:tables"
	Remedy     string        // how to ask for it
	RetryAfter time.Duration // zero: asking again changes nothing
	Revocation RevocationID  // what the violation set off
}

// Errorf makes an Error. A %w verb sets its cause, whose text is not part of Msg only when the
// caller leaves it out of format; prefer [Error.Because] for causes from adapters.
func Errorf(kind Kind, op, format string, args ...any) *Error {
	return &Error{Kind: kind, Op: op, Msg: fmt.Sprintf(format, args...)}
}

// With sets the code.
func (e *Error) With(c Code) *Error { e.Code = c; return e }

// Because sets the cause, which stays inside.
func (e *Error) Because(err error) *Error { e.Err = err; return e }

// Lacks adds what was missing and how to ask for it.
func (e *Error) Lacks(remedy string, missing ...string) *Error {
	e.Remedy, e.Missing = remedy, append(e.Missing, missing...)
	return e
}

// After says that the same request may succeed later.
func (e *Error) After(d time.Duration) *Error { e.RetryAfter = d; return e }

// Decided records which policies decided.
func (e *Error) Decided(policies []string) *Error { e.Policies = policies; return e }

func (e *Error) Error() string {
	s := e.Op + ": " + e.Msg
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is makes errors.Is(err, broker.Denied) true for an Error of that kind.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && k == e.Kind
}

// KindOf is the kind of err, Internal for an error without one.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Internal
}
