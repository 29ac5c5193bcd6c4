package api

// Code identifies one reason precisely and is stable across releases. The list is closed within a version: new codes
// come with new versions. A client that does not know a code uses the problem's kind.
type Code string

// The codes that come from HTTP itself, or from a client that received no answer. The others are the broker's, in
// [Reasons].
const (
	CodeTooLarge       Code = "too_large"
	CodeMediaType      Code = "media_type"
	CodeMethod         Code = "method_not_allowed"
	CodeNoEndpoint     Code = "no_such_endpoint"
	CodeTooFast        Code = "too_fast"
	CodeTooManyStreams Code = "too_many_streams"
	CodeCallerLimit    Code = "caller_limit"
	CodeManyChains     Code = "too_many_chains"
	CodeNoAnswer       Code = "no_answer"
	CodeRepeated       Code = "repeated"
	CodeNoSigningKey   Code = "no_signing_key"

	CodeTooManyRequests Code = "too_many_requests"
	CodeTooManyBodies   Code = "too_many_bodies"
	CodeTooSlow         Code = "body_too_slow"
)

// Reason is the fixed description of a code.
type Reason struct {
	Code      Code
	Kind      Kind   // the kind of its problems
	Title     string // in a few words
	Retryable bool   // the same request may succeed later, without a change by the client
	Do        string // the action that an agent should take
}

// ReasonFor returns the description of a code.
func ReasonFor(code Code) (Reason, bool) {
	for _, r := range Reasons() {
		if r.Code == code {
			return r, true
		}
	}
	return Reason{}, false
}

// Reasons lists every code. The codes of whole kinds come first.
func Reasons() []Reason {
	return []Reason{
		{"malformed", KindMalformed, "The request is malformed", false, "Correct the request; the detail describes the error."},
		{CodeTooLarge, KindMalformed, "The body is too large", false, "Send at most 64 KiB."},
		{CodeMediaType, KindMalformed, "The body is not declared as JSON", false, "Send the header Content-Type: application/json."},
		{CodeMethod, KindMalformed, "The endpoint does not support the method", false, "Use a method from the Allow header."},
		{CodeNoEndpoint, KindNotFound, "There is no such endpoint", false, "Look it up in /v1/openapi.json; operators' endpoints are on another listener."},
		{CodeTooSlow, KindMalformed, "The body arrived too slowly", true, "Send the whole body at once, within 10 seconds."},

		{"unauthenticated", KindUnauthenticated, "No acceptable identity", false, "Present a valid SVID of an allowed trust domain; fetch it again if it was rotated."},
		{"denied", KindDenied, "Not allowed", false, "Give up this call, or ask the person who assigned the task."},
		{"not_found", KindNotFound, "It does not exist, or is not yours", false, "Check the id. The two cases are never distinguished."},
		{"revoked", KindRevoked, "It was revoked", false, "Stop the work under this delegation now."},
		{"expired", KindExpired, "It has expired", false, "Open or ask for a new delegation; with kind unauthenticated, fetch a new SVID."},
		{"conflict", KindConflict, "The state has changed", false, "Read the state again and decide anew."},
		{"unavailable", KindUnavailable, "A required component is unavailable", true, "Retry later; nothing was handed out."},
		{"internal", KindInternal, "The broker failed", false, "Report the request id to the platform team."},
		{"over_limit", KindOverLimit, "Too much at a time by this caller", true, "Wait as long as Retry-After says, then retry. Nothing was done."},

		{CodeTooManyRequests, KindOverLimit, "The caller sends requests faster than it may", true, "Wait as long as Retry-After says, then retry. Nothing was done."},
		{CodeTooManyStreams, KindOverLimit, "Too many event streams of the caller are open", true, "Close a stream, or wait."},
		{CodeTooManyBodies, KindOverLimit, "Too many bodies of the caller's requests are arriving", true, "Send each body at once with its header. Nothing was done."},
		{"too_many_connections", KindOverLimit, "Too many connections of the caller are open", true, "Close connections that you do not use, or send several requests over one. This connection is closed."},
		{"too_many_mints", KindOverLimit, "Too many steps of the caller wait for their secrets", true, "Wait for the steps under way, then retry. Nothing was minted."},
		{"too_many_reports", KindOverLimit, "The caller has reported too many violations in a minute", true, "Wait as long as Retry-After says. A report that revokes or freezes something is taken at any time."},
		{"ledger_share", KindOverLimit, "The caller has used its share of the ledger", true, "Wait as long as Retry-After says. Closing steps and revoking still work."},

		{"tool_unknown", KindDenied, "No such tool", false, "Use a tool that the policy bundle declares."},
		{"tool_not_delegated", KindDenied, "The delegation does not permit use of the tool", false, "Ask the holder of the parent delegation for the missing rights."},
		{"argument_outside", KindDenied, "An argument is outside the allowed values", false, "Change the arguments named in missing, or ask for a wider delegation."},
		{"policy_denied", KindDenied, "Policy does not permit it", false, "Give up this call; the remedy says how to ask."},
		{"violation", KindDenied, "Policy forbids it, with a consequence", false, "Stop. The chain may have been revoked; do not retry in another way."},
		{"approval_needed", KindDenied, "It needs an approval first", false, "Ask for the approval that the remedy names, then retry."},
		{"narrowing_too_weak", KindDenied, "The tool's secret is broader than policy accepts", false, "Use a tool with a stronger label."},
		{"budget_exhausted", KindDenied, "A limit of the chain is exhausted", false, "Finish with the secrets you have. If the limit is on live secrets, close finished steps."},
		{CodeTooFast, KindDenied, "A limit per minute is exhausted", true, "Wait as long as Retry-After says, then retry."},
		{CodeCallerLimit, KindDenied, "A limit on your steps in all chains is reached", true, "Wait as long as Retry-After says, then retry. Another chain does not help."},
		{CodeManyChains, KindDenied, "You have too many open chains", true, "Use a chain that you have, or wait as long as Retry-After says: then the next one ends."},
		{"delegation_unknown", KindNotFound, "You hold no such delegation", false, "Check the id. A delegation belongs to exactly one SPIFFE ID."},
		{"already_collected", KindConflict, "The sealed secret was already collected", false, "It was handed out, and it may have been revoked because of this second attempt. Take another step. Inform the platform team if you did not collect it the first time."},
		{"delivery_lost", KindExpired, "The sealed secret is no longer kept", false, "It is being ended. Take another step."},
		{"deliveries_full", KindUnavailable, "Too many sealed secrets are waiting to be collected", true, "Collect or close the waiting ones, then retry."},
		{"key_other_seal", KindConflict, "The idempotency key was used for a step with another seal", false, "Use another key for another step."},
		{"chain_over_cap", KindDenied, "It asks for more than policy lets a chain have", false, "Ask for what the remedy names. Leave a field out to get the most that is allowed."},
		{"envelope_refused", KindDenied, "The signed envelope is refused", false, "Ask its issuer for another one; the detail says why this one is refused."},
		{"delegation_wider", KindDenied, "It asks for more than the parent may delegate", false, "Leave out the items in missing."},
		{"delegation_depth", KindDenied, "It may not be delegated any further", false, "Do the step yourself, or ask for a deeper delegation."},
		{"foreign_trust_domain", KindDenied, "The receiver is in another trust domain", false, "Delegate inside the trust domain, or ask for a policy that names both."},
		{"grant_unknown", KindNotFound, "You have no such grant", false, "Check the id."},
		{"key_other_tool", KindConflict, "The idempotency key was used with another tool", false, "Use another key for another step."},
		{"key_other_arguments", KindConflict, "The idempotency key was used with other arguments", false, "Use another key for another step."},
		{"fenced", KindRevoked, "It is revoked", false, "Stop the work under this delegation now; it is final."},
		{"frozen", KindRevoked, "No new secrets for now", true, "Pause; an operator may lift the freeze."},
		{"ledger_unavailable", KindUnavailable, "The ledger cannot commit", true, "Retry later; nothing was handed out."},
		{"archive_damaged", KindUnavailable, "A part of the archive is missing or damaged", false, "Ask an operator to restore the named segment from a backup. Steps, revoking and freezing work."},
		{"ledger_checking", KindUnavailable, "The broker has just started and checks its ledger", true, "Wait as long as Retry-After says, then retry; nothing was handed out. Revoking and freezing work."},
		{"stopping", KindUnavailable, "The broker is stopping", true, "Wait as long as Retry-After says, then retry; another process may answer. Revoking and freezing work."},
		{"vault_unavailable", KindUnavailable, "Vault cannot mint", true, "Retry later; nothing is left behind."},
		{"vault_refused", KindUnavailable, "Vault refuses the tool", false, "Tell the platform team: a policy, role or mount in Vault is missing or too narrow. Nothing is left behind."},
		{"vault_busy", KindUnavailable, "Vault limits requests", true, "Wait as long as Retry-After says, then retry; nothing is left behind."},
		{"clock_skew", KindUnavailable, "The clocks of the broker and Vault differ", true, "Tell the platform team, and use other tools meanwhile: only secrets that end by Vault's clock are refused."},
		{"leases_left", KindUnavailable, "Vault does not remove leases", true, "Nothing to do for agents: the secrets are dead at their target. The platform team finds the cause in Vault's log, such as a database that Vault cannot reach."},
		{"vault_policy", KindUnavailable, "The tool is not set up in Vault", false, "Do other work; a retry changes nothing. Inform the platform team: the detail names the policy."},
		{"vault_identity_policy", KindUnavailable, "Vault gives the broker's tokens a right too many", false, "Do other work; a retry changes nothing. Inform the platform team: the detail names the policy."},
		{"outcome_unknown", KindUnavailable, "A secret may have been minted and is being revoked", true, "Retry with a new idempotency key."},
		{"backend_unavailable", KindUnavailable, "The tool's target cannot be prepared", true, "Retry later, or do other work first."},
		{"issuing_stopped", KindUnavailable, "The broker has stopped issuing", true, "Retry later; its health endpoint shows operators why."},
		{"revocation_unknown", KindNotFound, "No such revocation", false, "Check the id in the list of revocations."},
		{"selector_matches_nothing", KindNotFound, "The selector matches nothing", false, "Check its spelling; nothing was revoked."},
		{"canary_value", KindNotFound, "The value is a canary's", false, "No grant handed it out. A plan changes nothing. Revoking records it as touched and applies the policy's consequence for a canary, if there is one."},
		{"canary_unknown", KindNotFound, "There is no such canary", false, "pawl canary list shows the planted ones."},
		{"plan_stale", KindConflict, "The set has grown since the plan", false, "Make a new plan, or include the new members."},
		{"plan_unknown", KindNotFound, "No such plan", false, "Make a new plan."},
		{"second_person_needed", KindDenied, "It takes two people", false, "Ask another operator to make the same request."},
		{"policy_older", KindConflict, "The policy bundle is not newer than the one in force", false, "Give it a higher version, or ask an operator to roll back to it."},
		{CodeNoSigningKey, KindUnavailable, "The broker has no signing key", false, "Set signing_key in the broker's configuration."},
		{CodeNoAnswer, KindUnavailable, "The broker's answer did not arrive", true, "Made by clients, never sent. Retry with the same idempotency key; without one, the request may have been executed."},
		{CodeRepeated, KindConflict, "The step was taken before, and its secret is returned only once", false, "Made by clients, never sent. Close the grant of the key and take the step again with another key."},
	}
}
