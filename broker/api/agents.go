package api

import (
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// IdempotencyKey is the header that makes repeating a step safe: the same key for the same step
// answers with the same grant, and never with a second secret. At most 128 bytes.
const IdempotencyKey = "Idempotency-Key"

// SecurityEventType is the media type of a security event token (RFC 8417), which transmitters push.
const SecurityEventType = "application/secevent+jwt"

// MaxSecurityEvent is the largest security event token in bytes.
const MaxSecurityEvent = 16 << 10

// Constraint limits one argument. Its JSON form is the broker's, for example {"one_of":["orders"]}.
type Constraint = jsontext.Value

// Right is what a delegation may do with one tool.
type Right struct {
	Tool     string                `json:"tool"`
	Use      bool                  `json:"use,omitzero"`      // may take steps with the tool
	Delegate bool                  `json:"delegate,omitzero"` // may pass the tool on
	Args     map[string]Constraint `json:"args,omitzero"`     // each named argument must be given and inside; others are free
}

// Budget limits what may happen under a delegation, its descendants included. A limit that is
// left out is none of its own; an ancestor's still counts.
type Budget struct {
	Steps     int            `json:"steps,omitzero"`      // steps in all
	Live      int            `json:"live,omitzero"`       // secrets alive at once
	PerMinute int            `json:"per_minute,omitzero"` // steps begun in any one minute of the clock
	Tools     map[string]int `json:"tools,omitzero"`      // steps in all with one tool
}

// OpenRequest asks for a new chain, whose root the caller holds.
type OpenRequest struct {
	Task       string            `json:"task"`                 // what it is for; 1 to 256 bytes
	Rights     []Right           `json:"rights"`               // what may happen under it
	Budget     Budget            `json:"budget,omitzero"`      // over the whole chain
	Depth      int               `json:"depth,omitzero"`       // how many times it may be passed on, 0 to 8
	TTLSeconds int64             `json:"ttl_seconds,omitzero"` // its life; left out: one hour
	Labels     map[string]string `json:"labels,omitzero"`      // for policies and selectors

	HeartbeatSeconds int64 `json:"heartbeat_seconds,omitzero"` // how often the caller promises to be heard; left out: no promise
}

// DelegateRequest asks to pass on less than the caller's own delegation.
type DelegateRequest struct {
	To         string  `json:"to"`                   // the receiver's SPIFFE ID
	Rights     []Right `json:"rights"`               // inside what the caller may pass on
	Budget     Budget  `json:"budget,omitzero"`      // limits that are left out take the parent's
	Depth      int     `json:"depth,omitzero"`       // how many times the receiver may pass it on; less than the parent's
	TTLSeconds int64   `json:"ttl_seconds,omitzero"` // its life; left out: as long as the parent. More than the parent's whole life is refused; what reaches past its end ends with it

	HeartbeatSeconds int64 `json:"heartbeat_seconds,omitzero"` // how often the receiver must be heard, not less often than the caller; left out: as often
}

// StepRequest asks for one secret for one step. Its idempotency key is a header.
type StepRequest struct {
	Tool       string         `json:"tool"`
	Args       jsontext.Value `json:"args,omitzero"`        // an object of strings, integers, booleans and lists of strings
	Purpose    string         `json:"purpose,omitzero"`     // for the audit; at most 256 bytes
	TTLSeconds int64          `json:"ttl_seconds,omitzero"` // the secret's life; left out: as long as is allowed
	Seal       *Seal          `json:"seal,omitzero"`        // left out: the secret is in the answer
}

// Seal asks that the secret is not in the answer, but kept, encrypted to a key, for one POST to
// /v1/grants/{id}/collect.
type Seal struct {
	Key       jsontext.Value `json:"key"`                // a public JWK: kty "EC", crv "P-256", x, y, and alg "ECDH-ES", use "enc" and kid where given; nothing else
	Collector string         `json:"collector,omitzero"` // the SPIFFE ID that may collect it, in the caller's trust domain; left out: the caller's
}

// SealedType is the typ of a sealed secret's JWE.
const SealedType = "pawl-secret+jwe"

// Collected is a sealed secret.
type Collected struct {
	Grant Grant  `json:"grant"`
	JWE   string `json:"jwe"` // compact (RFC 7516): ECDH-ES and A256GCM, typ "pawl-secret+jwe", kid the key's thumbprint, grant the grant's id; the content is the secret
}

// ReportRequest says that policy was broken under a delegation.
type ReportRequest struct {
	Delegation string `json:"delegation"`
	Grant      string `json:"grant,omitzero"`  // left out: none in particular
	Violation  string `json:"violation"`       // lower-case words joined by underscores, such as "canary"
	Detail     string `json:"detail,omitzero"` // for the audit; at most 256 bytes
}

// HeardRequest says that a delegation's holder is there, and what it has heard of.
type HeardRequest struct {
	Revocation string `json:"revocation,omitzero"` // one over the delegation, for which every step under it was told to stop; left out: a sign of life and no more
}

// Heard is the answer to a HeardRequest.
type Heard struct{}

// Nothing is the body of a request that needs no more words than its path: {}.
type Nothing struct{}

// Delegation is a node of a chain as its holder sees it.
type Delegation struct {
	ID      string    `json:"id"`
	Chain   string    `json:"chain"`
	Parent  string    `json:"parent,omitzero"` // left out: the root
	Holder  string    `json:"holder"`          // a SPIFFE ID
	Rights  []Right   `json:"rights"`
	Budget  Budget    `json:"budget,omitzero"`
	Depth   int       `json:"depth"` // how many more times it may be passed on
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	Fence   *Fence    `json:"fence,omitzero"` // on this node itself

	HeartbeatSeconds int64 `json:"heartbeat_seconds,omitzero"` // the holder must be heard this often, by any request under it; left out: it need not
}

// Fence is the mark after which no secret is handed out under what carries it.
type Fence struct {
	At         time.Time `json:"at"`
	Revocation string    `json:"revocation"`
	Frozen     bool      `json:"frozen,omitzero"` // may be lifted; otherwise final
}

// Standing is how a delegation stands for its holder, and the data of a "standing" event.
type Standing struct {
	Delegation *Delegation `json:"delegation,omitzero"` // not in events
	Fence      *Fence      `json:"fence,omitzero"`      // the nearest fence over it; left out: it may be used
	Ended      []string    `json:"ended"`               // the holder's grants under it whose steps must stop now; under a final fence all must, and none is listed
}

// Grant is the recorded permission for one step as its caller sees it.
type Grant struct {
	ID         string    `json:"id"`
	Chain      string    `json:"chain"`
	Delegation string    `json:"delegation"`
	Tool       string    `json:"tool"`
	Narrowing  string    `json:"narrowing"` // where the secret's narrowing is enforced: "native", "proxy" or "none"
	State      string    `json:"state"`     // "INTENT", "HANDLE", "ISSUED" or "CLOSED"
	Created    time.Time `json:"created"`
	Expires    time.Time `json:"expires"`           // the secret works no longer
	Bundle     string    `json:"bundle"`            // digest of the policy bundle that decided
	Policies   []string  `json:"policies,omitzero"` // ids of the policies that decided
	Ending     string    `json:"ending,omitzero"`   // "closed", "expired", "revoked" or "failed"
	Ended      time.Time `json:"ended,omitzero"`
	Outcome    string    `json:"outcome,omitzero"`     // "dead", "alive" or "static"; left out: not proven either way
	ArgsDigest string    `json:"args_digest,omitzero"` // SHA-256 of the arguments in their canonical form, in hex; left out: recorded before this was
	Sealed     string    `json:"sealed,omitzero"`      // thumbprint (RFC 7638) of the key that the secret is sealed to; left out: it is not
	Collector  string    `json:"collector,omitzero"`   // who may collect it, when it is sealed
	Collected  time.Time `json:"collected,omitzero"`   // left out: it was not
}

// Issued is the answer to a step.
type Issued struct {
	Grant    Grant          `json:"grant"`
	Secret   jsontext.Value `json:"secret,omitzero"`   // an object whose members the tool's documentation lists; left out when repeated or sealed
	Repeated bool           `json:"repeated,omitzero"` // the key was used for the same step before: this is its grant, and no second secret
}

// Reported is what a report led to.
type Reported struct {
	Consequence string `json:"consequence"`         // "deny", "revoke-step", "revoke-subtree", "revoke-chain" or "freeze-caller"
	Revocation  string `json:"revocation,omitzero"` // left out: nothing was revoked
}

// FormType is the media type of an introspection's request (RFC 7662): the one member "token".
const FormType = "application/x-www-form-urlencoded"

// StatusListType is the media type of a status list (draft-ietf-oauth-status-list).
const StatusListType = "application/statuslist+jwt"

// Introspection says whether a token that a step was given is good still (RFC 7662). Of one that
// is not, it says nothing else.
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

// Health is the answer of /healthz.
type Health struct {
	Status string `json:"status"` // "ok"; anything else is a problem
}

// The names of events on streams, each with the type of its data.
const (
	EventStanding   = "standing"   // Standing
	EventRevocation = "revocation" // Revocation
	EventProblem    = "problem"    // Problem: the stream ends, and opening it again gives the same
)
