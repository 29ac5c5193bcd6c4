package api

// Code names one reason precisely and stays the same over releases. The list is closed within
// a version: new codes come with new versions, and a client that does not know one goes by the
// problem's kind.
type Code string

// The codes that HTTP itself, or a client in the absence of an answer, gives rise to. The
// others are the broker's, in [Reasons].
const (
	CodeTooLarge       Code = "too_large"
	CodeMediaType      Code = "media_type"
	CodeMethod         Code = "method_not_allowed"
	CodeNoEndpoint     Code = "no_such_endpoint"
	CodeTooFast        Code = "too_fast"
	CodeTooManyStreams Code = "too_many_streams"
	CodeNoAnswer       Code = "no_answer"
	CodeRepeated       Code = "repeated"
	CodeNoSigningKey   Code = "no_signing_key"
)

// Reason is what is known of a code once and for all.
type Reason struct {
	Code      Code
	Kind      Kind   // the kind it comes with
	Title     string // in a few words
	Retryable bool   // the same request may succeed later, with nothing changed by the client
	Do        string // what an agent should do
}

// Status is the HTTP status that the code comes with.
func (r Reason) Status() int { return Status(r.Kind, r.Code) }

// ReasonFor gives what is known of a code.
func ReasonFor(code Code) (Reason, bool) {
	for _, r := range Reasons() {
		if r.Code == code {
			return r, true
		}
	}
	return Reason{}, false
}

// Reasons lists every code, those of a kind without a code of its own first.
func Reasons() []Reason {
	return []Reason{
		{"malformed", KindMalformed, "The request cannot mean anything", false, "Correct the request; the detail says what is wrong."},
		{CodeTooLarge, KindMalformed, "The body is too large", false, "Send at most 64 KiB."},
		{CodeMediaType, KindMalformed, "The body is not declared as JSON", false, "Send the header Content-Type: application/json."},
		{CodeMethod, KindMalformed, "The endpoint has no such method", false, "Use a method of the Allow header."},
		{CodeNoEndpoint, KindNotFound, "There is no such endpoint", false, "Look it up in /v1/openapi.json; operators' endpoints are on another listener."},
		{CodeTooManyStreams, KindDenied, "Too many event streams are open", true, "Close a stream, or wait."},

		{"unauthenticated", KindUnauthenticated, "No acceptable identity", false, "Present a valid SVID of an allowed trust domain; fetch it again if it was rotated."},
		{"denied", KindDenied, "Not allowed", false, "Give up this call, or ask whoever gave the task."},
		{"not_found", KindNotFound, "It does not exist, or is not yours", false, "Check the id. The two cases are never told apart."},
		{"revoked", KindRevoked, "It was revoked", false, "Stop the work under this delegation now."},
		{"expired", KindExpired, "Its time is over", false, "Open or ask for a new delegation; with kind unauthenticated, fetch a new SVID."},
		{"conflict", KindConflict, "The state has moved", false, "Look again and decide anew."},
		{"unavailable", KindUnavailable, "A part that is needed cannot answer", true, "Ask again later; nothing was handed out."},
		{"internal", KindInternal, "The broker failed", false, "Tell the platform team the request id."},

		{"tool_unknown", KindDenied, "No such tool", false, "Use a tool that the policy bundle declares."},
		{"tool_not_delegated", KindDenied, "The delegation does not hold the tool for use", false, "Ask the holder of the parent delegation for what is missing."},
		{"argument_outside", KindDenied, "An argument is outside what is allowed", false, "Change the arguments named in missing, or ask for a wider delegation."},
		{"policy_denied", KindDenied, "Policy does not permit it", false, "Give up this call; the remedy says whom to ask."},
		{"violation", KindDenied, "Policy forbids it, and something follows", false, "Stop. The chain may have been revoked; do not try again in another way."},
		{"approval_needed", KindDenied, "Somebody must approve it first", false, "Ask for the approval that the remedy names, then ask again."},
		{"narrowing_too_weak", KindDenied, "The tool's secret would be wider than policy accepts", false, "Use a tool with a stronger label."},
		{"budget_exhausted", KindDenied, "A limit of the chain is used up", false, "Finish with what you have; close steps that are done if the limit is on live secrets."},
		{CodeTooFast, KindDenied, "A limit per minute is used up", true, "Wait as long as Retry-After says, then ask again."},
		{"delegation_unknown", KindNotFound, "No such delegation is held by you", false, "Check the id. A delegation belongs to one SPIFFE ID and nobody else."},
		{"already_collected", KindConflict, "The sealed secret was collected before", false, "Somebody has it, and it may have been revoked for that. Take another step; tell the platform team if the first was not you."},
		{"delivery_lost", KindExpired, "The sealed secret is not kept any more", false, "It is being ended. Take another step."},
		{"deliveries_full", KindUnavailable, "Too many sealed secrets wait to be collected", true, "Have those collected or closed that wait; then ask again."},
		{"key_other_seal", KindConflict, "The idempotency key was used for a step sealed otherwise", false, "Use another key for another step."},
		{"delegation_wider", KindDenied, "It asks for more than the parent may pass on", false, "Leave out what missing names."},
		{"delegation_depth", KindDenied, "It may not be passed on any further", false, "Do the step yourself, or ask for a deeper delegation."},
		{"foreign_trust_domain", KindDenied, "The receiver is in another trust domain", false, "Delegate inside the trust domain, or have policy name both."},
		{"grant_unknown", KindNotFound, "No such grant is yours", false, "Check the id."},
		{"key_other_tool", KindConflict, "The idempotency key was used with another tool", false, "Use another key for another step."},
		{"key_other_arguments", KindConflict, "The idempotency key was used with other arguments", false, "Use another key for another step."},
		{"fenced", KindRevoked, "It is revoked", false, "Stop the work under this delegation now; it will not be lifted."},
		{"frozen", KindRevoked, "No new secrets for now", true, "Pause; an operator may lift it."},
		{"ledger_unavailable", KindUnavailable, "The ledger cannot commit", true, "Ask again later; nothing was handed out."},
		{"vault_unavailable", KindUnavailable, "Vault cannot mint", true, "Ask again later; nothing is left behind."},
		{"outcome_unknown", KindUnavailable, "A secret may have been made and is being hunted down", true, "Ask again, with a new idempotency key."},
		{"backend_unavailable", KindUnavailable, "The tool's target cannot be prepared", true, "Ask again later, or do other work first."},
		{"issuing_stopped", KindUnavailable, "The broker does not trust itself at the moment", true, "Ask again later; operators have been told by its health."},
		{"revocation_unknown", KindNotFound, "No such revocation", false, "Check the id in the list of revocations."},
		{"selector_matches_nothing", KindNotFound, "The selector matches nothing", false, "Check its spelling; nothing was revoked."},
		{"canary_value", KindNotFound, "The value is a canary's", false, "No grant handed it out. A plan changes nothing; revoking has it recorded as touched, and what policy says of a canary follows, if anything."},
		{"canary_unknown", KindNotFound, "There is no such canary", false, "pawl canary list shows those that are planted."},
		{"plan_stale", KindConflict, "The set has grown since the plan", false, "Look at a new plan, or include what is new."},
		{"plan_unknown", KindNotFound, "No such plan", false, "Make a new plan."},
		{"second_person_needed", KindDenied, "It takes two people", false, "Have another operator ask for the same."},
		{"policy_older", KindConflict, "The policy bundle is not newer than the one in force", false, "Give it a higher version, or have an operator roll back to it."},
		{CodeNoSigningKey, KindUnavailable, "The broker has no key to sign with", false, "Have signing_key set in the broker's configuration."},
		{CodeNoAnswer, KindUnavailable, "The broker's answer did not arrive", true, "Made by clients, never sent. Ask again with the same idempotency key; without one, the request may have been carried out."},
		{CodeRepeated, KindConflict, "The step was taken before, and its secret is given once", false, "Made by clients, never sent. Close the grant that the key names and take the step again with another key."},
	}
}
