package api

import (
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// IdempotencyKey is the header that makes it safe to repeat a step. The same key for the same step returns the same
// grant, and never a second secret. At most 128 bytes.
const IdempotencyKey = "Idempotency-Key"

// MaxSecurityEvent is the largest security event token in bytes.
const MaxSecurityEvent = 16 << 10

// Constraint limits one argument. Its JSON form is the broker's, for example {"one_of":["orders"]}.
type Constraint = jsontext.Value

// Right lists the permissions of a delegation for one tool.
type Right struct {
	Tool     string                `json:"tool"`
	Use      bool                  `json:"use,omitzero"`      // may take steps with the tool
	Delegate bool                  `json:"delegate,omitzero"` // may delegate the tool
	Args     map[string]Constraint `json:"args,omitzero"`     // each named argument is required and must meet its constraint; others are unrestricted
}

// Budget limits the activity under a delegation and its descendants. An omitted limit sets none here, but the limits
// of ancestors still apply.
type Budget struct {
	Steps     int            `json:"steps,omitzero"`      // steps in total
	Live      int            `json:"live,omitzero"`       // secrets alive at the same time
	PerMinute int            `json:"per_minute,omitzero"` // steps started in any one minute of the clock
	Tools     map[string]int `json:"tools,omitzero"`      // steps in total with one tool
}

// OpenRequest opens a new chain. The caller holds its root delegation.
type OpenRequest struct {
	Task       string            `json:"task"`                 // the purpose of the chain, as the caller claims it; 1 to 256 bytes
	Rights     []Right           `json:"rights"`               // the permissions under it
	Budget     Budget            `json:"budget,omitzero"`      // for the whole chain
	Depth      int               `json:"depth,omitzero"`       // how many times it may be delegated, 0 to 8
	TTLSeconds int64             `json:"ttl_seconds,omitzero"` // its lifetime; omitted: one hour
	Labels     map[string]string `json:"labels,omitzero"`      // for selectors, and for policies as the caller's claim
	Envelope   string            `json:"envelope,omitzero"`    // signed statements about the chain, of an issuer that the policy bundle names: a compact JWS of typ pawl-envelope+jwt; omitted: none

	HeartbeatSeconds int64 `json:"heartbeat_seconds,omitzero"` // the longest interval between requests that the caller promises; omitted: no promise
}

// DelegateRequest delegates a part of the caller's own delegation.
type DelegateRequest struct {
	To         string  `json:"to"`                   // the receiver's SPIFFE ID
	Rights     []Right `json:"rights"`               // within the rights that the caller may delegate
	Budget     Budget  `json:"budget,omitzero"`      // omitted limits are those of the parent
	Depth      int     `json:"depth,omitzero"`       // how many times the receiver may delegate it; less than the parent's
	TTLSeconds int64   `json:"ttl_seconds,omitzero"` // its lifetime; omitted: as long as the parent. More than the parent's whole lifetime is refused. It never outlives the parent

	HeartbeatSeconds int64 `json:"heartbeat_seconds,omitzero"` // the longest interval between requests of the receiver, at most the caller's; omitted: the caller's
}

// StepRequest asks for one secret for one step. Its idempotency key is a header.
type StepRequest struct {
	Tool       string         `json:"tool"`
	Args       jsontext.Value `json:"args,omitzero"`        // an object of strings, integers, booleans and lists of strings
	Purpose    string         `json:"purpose,omitzero"`     // for the audit log; at most 256 bytes
	TTLSeconds int64          `json:"ttl_seconds,omitzero"` // the lifetime of the secret; omitted: the longest allowed
	Seal       *Seal          `json:"seal,omitzero"`        // omitted: the secret is in the answer
	Held       bool           `json:"held,omitzero"`        // the secret ends 1.5 s after the last GET of /v1/grants/{id}/hold has ended
}

// Seal asks the broker to keep the secret, encrypted to a key, instead of returning it. One POST to
// /v1/grants/{id}/collect collects it.
type Seal struct {
	Key       jsontext.Value `json:"key"`                // a public JWK: kty "EC", crv "P-256", x, y, and optionally alg "ECDH-ES", use "enc" and kid; nothing else
	Collector string         `json:"collector,omitzero"` // the SPIFFE ID that may collect it, in the caller's trust domain; omitted: the caller's
}

// SealedType is the typ of a sealed secret's JWE.
const SealedType = "pawl-secret+jwe"

// Collected is a sealed secret.
type Collected struct {
	Grant Grant  `json:"grant"`
	JWE   string `json:"jwe"` // the secret as a compact JWE (RFC 7516): ECDH-ES and A256GCM, typ "pawl-secret+jwe", kid the thumbprint of the key, grant the id of the grant
}

// ReportRequest reports a policy violation under a delegation.
type ReportRequest struct {
	Delegation string `json:"delegation"`
	Grant      string `json:"grant,omitzero"`  // omitted: none in particular
	Violation  string `json:"violation"`       // lower-case words joined by underscores, such as "canary"
	Detail     string `json:"detail,omitzero"` // for the audit log; at most 256 bytes
}

// AcknowledgeRequest acknowledges a revocation that covers the delegation: its holder has ordered every step under it to
// stop.
type AcknowledgeRequest struct {
	Revocation string `json:"revocation"`
}

// Nothing is the body {} of a request that is complete in its path, and of an answer that has nothing to add.
type Nothing struct{}

// Delegation is a node of a chain, as its holder sees it.
type Delegation struct {
	ID      string    `json:"id"`
	Chain   string    `json:"chain"`
	Parent  string    `json:"parent,omitzero"` // omitted: the root
	Holder  string    `json:"holder"`          // a SPIFFE ID
	Rights  []Right   `json:"rights"`
	Budget  Budget    `json:"budget,omitzero"`
	Depth   int       `json:"depth"` // how many more times it may be delegated
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	Fence   *Fence    `json:"fence,omitzero"` // on this node itself

	HeartbeatSeconds int64 `json:"heartbeat_seconds,omitzero"` // the longest interval between requests of the holder under it; omitted: no limit
}

// Fence is the mark after which no secret is handed out under the marked object.
type Fence struct {
	At         time.Time `json:"at"`
	Revocation string    `json:"revocation"`
	Frozen     bool      `json:"frozen,omitzero"` // may be lifted; otherwise final
}

// Standing is the status of a delegation for its holder, and the data of a "standing" event.
type Standing struct {
	Delegation *Delegation `json:"delegation,omitzero"` // not in events
	Fence      *Fence      `json:"fence,omitzero"`      // the nearest fence that covers it; omitted: it may be used
	Ended      []string    `json:"ended"`               // grants of the holder under it with steps that must stop now; under a final fence all steps must stop, and none is listed
}

// Grant is the recorded permission for one step, as its caller sees it.
type Grant struct {
	ID         string    `json:"id"`
	Chain      string    `json:"chain"`
	Delegation string    `json:"delegation"`
	Tool       string    `json:"tool"`
	Narrowing  string    `json:"narrowing"` // where the secret's narrowing is enforced: "native", "proxy" or "none"
	State      string    `json:"state"`     // "INTENT", "HANDLE", "ISSUED" or "CLOSED"
	Created    time.Time `json:"created"`
	Expires    time.Time `json:"expires"`           // the secret does not work after this
	Bundle     string    `json:"bundle"`            // digest of the deciding policy bundle
	Policies   []string  `json:"policies,omitzero"` // ids of the deciding policies
	Ending     string    `json:"ending,omitzero"`   // "closed", "expired", "revoked" or "failed"
	Ended      time.Time `json:"ended,omitzero"`
	Outcome    string    `json:"outcome,omitzero"`     // "dead", "alive" or "static"; omitted: not proven either way
	ArgsDigest string    `json:"args_digest,omitzero"` // SHA-256 of the arguments in their canonical form, in hex; omitted: recorded before this member existed
	Sealed     string    `json:"sealed,omitzero"`      // thumbprint (RFC 7638) of the key that the secret is sealed to; omitted: not sealed
	Collector  string    `json:"collector,omitzero"`   // the SPIFFE ID that may collect it, if sealed
	Collected  time.Time `json:"collected,omitzero"`   // omitted: not collected
}

// Issued is the answer to a step.
type Issued struct {
	Grant    Grant          `json:"grant"`
	Secret   jsontext.Value `json:"secret,omitzero"`   // an object with the members that the tool's documentation lists; omitted when repeated or sealed
	Repeated bool           `json:"repeated,omitzero"` // the key was used for the same step before: this is its grant, without a second secret
}

// Reported is the consequence of a report.
type Reported struct {
	Consequence string `json:"consequence"`         // "deny", "revoke-step", "revoke-subtree", "revoke-chain" or "freeze-caller"
	Revocation  string `json:"revocation,omitzero"` // omitted: nothing was revoked
}

// FormType is the media type of an introspection's request (RFC 7662): the one member "token".
const FormType = "application/x-www-form-urlencoded"

// StatusListType is the media type of a status list (draft-ietf-oauth-status-list).
const StatusListType = "application/statuslist+jwt"

// Introspection reports whether a token from a step is active (RFC 7662). For an inactive token it has no other member.
type Introspection struct {
	Active   bool   `json:"active"`
	Issuer   string `json:"iss,omitzero"`
	Subject  string `json:"sub,omitzero"` // the agent's SPIFFE ID
	Audience string `json:"aud,omitzero"`
	Scope    string `json:"scope,omitzero"`
	Expires  int64  `json:"exp,omitzero"` // seconds since 1970
	Issued   int64  `json:"iat,omitzero"` // seconds since 1970
	ID       string `json:"jti,omitzero"` // the grant's id
}

// Health is the answer of /livez, /readyz and /healthz.
type Health struct {
	Status     string      `json:"status"`              // always "ok"; a failure is a problem
	Conditions []Condition `json:"conditions,omitzero"` // the faults
}

// The names of events on streams, each with the type of its data.
const (
	EventStanding   = "standing"   // Standing
	EventRevocation = "revocation" // Revocation
	EventProblem    = "problem"    // Problem: the stream ends, and a new stream returns the same problem
)
