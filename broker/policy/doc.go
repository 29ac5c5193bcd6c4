// Package policy reads a signed Cedar bundle and answers decisions as a pure function.
//
// A bundle is the platform team's whole word: the tools, the Cedar policies over them, an
// optional Cedar schema, and what follows each violation. Authors keep it as a directory
// ([Build]), platform keys sign it ([Sign]), a broker accepts it from enough of the keys it
// trusts ([Verify]), compiles it ([Load]) and swaps it in whole ([Running]). A [Policy] never
// changes, reads no clock and keeps nothing between decisions.
//
// # What a policy sees
//
//	principal  Agent::"spiffe://td/a/b", in TrustDomain::"td" and in AgentGroup::"spiffe://td/a",
//	           one group for each directory above it; principal.id is the SPIFFE ID as a string
//	action     Action::"open", "use", "delegate" or "report"
//	resource   Tool::"db.orders.read", in ToolGroup::"db" and ToolGroup::"db.orders"; resource.name,
//	           resource.backend, resource.narrowing. A report that names no tool has Tool::""
//
//	context.args       the step's arguments: strings, longs, booleans, sets of strings
//	context.chain      task, opener (an Agent), labels, depth, age_seconds
//	context.history    for each tool the chain has used before: count, since_first_seconds,
//	                   since_last_seconds. Ask first: context.history has "db.read" && …
//	context.used       the set of their names
//	context.proof      "x509-svid" or "jwt-svid"
//	context.now        hour (0–23), weekday (1 is Monday) and time (a datetime), in UTC
//	context.receiver   an Agent, for delegate only
//	context.violation  the code, for report only
//
// # What follows
//
// Nothing is allowed unless a permit says so, and a forbid beats every permit. A policy that
// fails to evaluate denies, be it a forbid or a permit. Annotations say the rest:
//
//	@id("…")                     the name in decisions; else the file's name, "#" and its number there
//	@violation("revoke-chain")   on a forbid: what follows. The harshest of those that match counts
//	@approval("2 of oncall")     on a permit to use: who must approve first
//	@ttl("30s")                  on a permit to use: the longest life of the secret
//	@narrowing("native")         on a permit to use: the weakest label accepted
//	@domains("a.example b.example")  on a permit to delegate: it reaches across these trust domains
//	@any("principal tool")       on a permit: the parts that it deliberately leaves open
//	@remedy("…")                 how to ask, shown to whoever is denied or must wait for an approval: of the
//	                             forbids that hold, or of the permits whose conditions do not, or which
//	                             want the approval; at most 256 bytes, and 512 together
//	@description("…")            for the reader
//
// When several permits match, all their limits hold together: the shortest life, the strongest
// label, every approval. A permit more can therefore tighten, but never loosen, what another
// grants under conditions.
//
// # Policy test files
//
// A policy test file is YAML with one list:
//
//	tests:
//	  - name: reads the ticket it works on        # what the row shows
//	    caller: spiffe://acme.example/support/it  # required
//	    action: use                               # open, use (when absent), delegate, report
//	    tool: tickets.read                        # may be absent in a report
//	    args: {ticket: T-1, fields: [title]}      # strings, integers, booleans, lists of strings
//	    receiver: spiffe://acme.example/sub       # for delegate
//	    violation: canary                         # for report
//	    proof: jwt-svid                           # x509-svid when absent
//	    at: 2026-03-02T10:00:00Z                  # that Monday's ten o'clock when absent
//	    chain: {task: nightly, opener: spiffe://…, labels: {env: prod}, age: 10m, depth: 1}
//	    history: {db.read: {count: 2, first: 5m, last: 30s}}  # how long ago
//	    expect: allow                             # required: allow or deny
//	    consequence: revoke-chain                 # of the expected deny; deny when absent
//	    approval: 2 of oncall                     # of the expected allow; nobody's when absent
//	    failed: true                              # the deny is for a policy that failed; false when absent
//	    ttl: 30s                                  # not looked at when absent, and so the next two
//	    narrowing: native
//	    policies: [ticket-reader]                 # all that decided
//
// An allow to delegate into another trust domain that no permit names counts as a deny, and so
// does one with a weaker tool than the permits demand: the broker refuses both.
package policy
