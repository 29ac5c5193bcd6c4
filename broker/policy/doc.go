// Package policy compiles a signed Cedar bundle and answers decisions as a pure function.
//
// A bundle contains the tools, the Cedar policies over them, an optional Cedar schema, and the consequence of each
// violation. Authors keep it as a directory ([Build]). Platform keys sign it ([Sign]). A broker verifies the
// signatures with the keys it trusts ([Verify]), compiles the bundle ([Load]) and swaps it in whole ([Running]). A
// [Policy] never changes, reads no clock and keeps no state between decisions.
//
// # Policy input
//
//	principal  Agent::"spiffe://td/a/b", in TrustDomain::"td" and in AgentGroup::"spiffe://td/a",
//	           one group for each directory above it; principal.id is the SPIFFE ID as a string
//	action     Action::"open", "use", "delegate" or "report"
//	resource   Tool::"db.orders.read", in ToolGroup::"db" and ToolGroup::"db.orders"; resource.name,
//	           resource.backend, resource.narrowing. A report that names no tool has Tool::""
//
//	context.args       the step's arguments: strings, longs, booleans, sets of strings
//	context.chain      opener (an Agent), depth, age_seconds
//	context.claimed    task and labels, in the words of the chain's opener. A permit that reads them needs
//	                   @trusts_claims
//	context.task, context.labels, context.on_behalf_of, context.issuer
//	                   the statements of the chain's envelope, which the issuer signed. Without an envelope
//	                   they do not exist; labels exists with any envelope, the others if it has the claim.
//	                   on_behalf_of is a string: a SPIFFE ID, or the issuer's name for a subject
//	context.history    for each tool the chain has used before: count, since_first_seconds,
//	                   since_last_seconds. Test membership first: context.history has "db.read" && …
//	context.caller     history and used of the caller, or of the chain's principal, in all chains, within the
//	                   @window of the policy. For use only
//	context.used       the set of their names
//	context.open       for open only, the request: depth and ttl_seconds; steps, live, per_minute and
//	                   heartbeat_seconds where it names them
//	context.proof      "x509-svid" or "jwt-svid"
//	context.now        hour (0–23), weekday (1 is Monday) and time (a datetime), in UTC
//	context.receiver   an Agent, for delegate only
//	context.violation  the code, for report only
//
// # Effects and annotations
//
// The default is deny. A request needs a matching permit, and a forbid overrides every permit. A policy that fails to
// evaluate denies, whether it is a forbid or a permit. Annotations carry the rest:
//
//	@id("…")                     the policy's id in decisions; else the file name, "#" and its number in the file
//	@violation("revoke-chain")   on a forbid: the consequence. Of several that match, the most severe counts
//	@approval("2 of oncall")     on a permit to use: the approval needed first
//	@ttl("30s")                  on a permit to use: the longest lifetime of the secret
//	@narrowing("native")         on a permit to use: the weakest label accepted
//	@domains("a.example b.example")  on a permit to delegate: it allows delegation across these trust domains
//	@max_steps("50"), @max_depth("2"), @max_ttl("15m")
//	                             on a permit to open: the most that the chain may ask for
//	@labels("team env")          on a permit to open: the only labels that the request may name
//	@requires_labels("team")     on a permit to open: labels that the request or its envelope must have
//	@limit("10 per hour")        on a permit to use: the most steps of a caller under it, in all chains
//	@per("caller label:team")    beside @limit: count apart by a label of the envelope; "caller" when absent
//	@window("24h")               on a policy for use that reads context.caller: over which time
//	@trusts_claims               on a permit: it depends on the agent's own word
//	@any("principal tool")       on a permit: the scope parts deliberately left open
//	@remedy("…")                 how to ask, shown with a denial or while an approval is pending. Taken from the
//	                             forbids that match, the permits with unmet conditions, or the permits that need
//	                             the approval; at most 256 bytes each, and 512 together
//	@description("…")            for the reader
//
// A policy that is legal Cedar but wrong is refused when a bundle is built, signed, verified or loaded: a condition that
// always fails, such as "in" on a string; one that can never hold; a scope that nothing can match; a group, a tool or a
// member that does not exist. A condition that fails only sometimes, such as on an argument that may be absent, is not.
//
// When several permits match, all their limits apply: the shortest lifetime, the strongest label, every approval, the
// least of each cap. The same holds for the permits of all tools of a chain. An additional permit can therefore tighten
// a conditional grant, but never loosen it.
//
// # Policy test files
//
// A policy test file is YAML with one list:
//
//	tests:
//	  - name: reads the ticket it works on        # the behaviour shown
//	    caller: spiffe://acme.example/support/it  # required
//	    action: use                               # open, use (when absent), delegate, report
//	    tool: tickets.read                        # may be absent in a report
//	    args: {ticket: T-1, fields: [title]}      # strings, integers, booleans, lists of strings
//	    receiver: spiffe://acme.example/sub       # for delegate
//	    violation: canary                         # for report
//	    proof: jwt-svid                           # x509-svid when absent
//	    at: 2026-03-02T10:00:00Z                  # that Monday's ten o'clock when absent
//	    chain: {task: nightly, opener: spiffe://…, labels: {env: prod}, age: 10m, depth: 1}  # its claims
//	      # in chain: envelope: {issuer: https://…, task: nightly, labels: {env: prod}, on_behalf_of: ana}
//	    open: {steps: 50, live: 2, per_minute: 9, depth: 1, ttl: 10m, heartbeat: 5s}  # for open: the request
//	    history: {db.read: {count: 2, first: 5m, last: 30s}}  # how long ago
//	    caller_history: {db.read: {count: 2, last: 30m}}      # the same, in all chains
//	    expect: allow                             # required: allow or deny
//	    consequence: revoke-chain                 # of the expected deny; deny when absent
//	    approval: 2 of oncall                     # of the expected allow; none when absent
//	    failed: true                              # the deny is for a policy that failed; false when absent
//	    ttl: 30s                                  # not compared when absent; the same for the next two
//	    narrowing: native
//	    caps: "max_steps: 50, labels: env team"   # of the expected allow to open
//	    policies: [ticket-reader]                 # every policy that decided
//
// The broker refuses four kinds of allow, so a row with one counts as a deny. One is a delegation into another trust
// domain that no permit names. The next is a tool with weaker narrowing than the permits require. Another is a request
// to open that goes beyond the caps. The last is a step whose limit the steps of caller_history have reached.
package policy
