package api

import (
	"cmp"
	"net/http"
	"time"
)

// ProblemType is the media type of a [Problem] (RFC 9457).
const ProblemType = "application/problem+json"

// Problems is the page that explains each code. A problem's type is this URL with the code as its fragment.
const Problems = "https://github.com/pawlsec/pawl/blob/main/broker/api/problems.md#"

// Problem is the one form of every refusal and failure, an RFC 9457 problem. It is an error; errors.Is(err,
// KindRevoked) tests its kind.
type Problem struct {
	Type         string   `json:"type"`                    // the URL that explains the code
	Title        string   `json:"title"`                   // a short text for the code, always the same
	Status       int      `json:"status"`                  // the HTTP status
	Detail       string   `json:"detail,omitzero"`         // describes this occurrence, for people
	Code         Code     `json:"code"`                    // the reason to act on
	Kind         Kind     `json:"kind"`                    // the kind of refusal, for clients that do not know the code
	Policies     []string `json:"policies,omitzero"`       // ids of the deciding policies
	Missing      []string `json:"missing,omitzero"`        // the missing rights or conditions, such as "tool:deploy:use", "argument:tables"
	Remedy       string   `json:"remedy,omitzero"`         // how to ask for it
	Retryable    bool     `json:"retryable"`               // the same request may succeed later
	RetryAfterMS int64    `json:"retry_after_ms,omitzero"` // but not before this many milliseconds
	Revocation   string   `json:"revocation,omitzero"`     // id of the revocation that the request caused
	Request      string   `json:"request,omitzero"`        // id of the request, and of its decision, in the broker's log

	Conditions []Condition `json:"conditions,omitzero"` // of a health endpoint: the faults

	cause error
}

// Condition is something that is wrong with the broker.
type Condition struct {
	Part   string `json:"part"`            // "identity", "vault", or "tool " and a name
	Code   Code   `json:"code"`            // a fixed word, as in the metric pawl_condition
	Detail string `json:"detail,omitzero"` // for operators only
	Blocks bool   `json:"blocks"`          // nothing is issued
}

// NewProblem returns the problem for a code. An unknown code is kept, with the defaults of its kind.
func NewProblem(kind Kind, code Code, detail string) *Problem {
	code = cmp.Or(code, Code(kind))
	p := &Problem{
		Type: Problems + string(code), Title: string(code), Status: Status(kind, code),
		Detail: detail, Code: code, Kind: kind, Retryable: kind == KindUnavailable,
	}
	if r, ok := ReasonFor(code); ok {
		p.Title, p.Retryable = r.Title, r.Retryable
	}
	return p
}

// Because sets the cause, which is never sent.
func (p *Problem) Because(err error) *Problem { p.cause = err; return p }

// After sets the time after which the same request may succeed.
func (p *Problem) After(d time.Duration) *Problem {
	if d > 0 {
		p.Retryable, p.RetryAfterMS = true, max(1, d.Milliseconds())
	}
	return p
}

// RetryAfter is how long to wait before a retry. It is zero when the broker gave no time.
func (p *Problem) RetryAfter() time.Duration {
	return time.Duration(p.RetryAfterMS) * time.Millisecond
}

func (p *Problem) Error() string {
	if p.Detail == "" {
		return string(p.Code) + ": " + p.Title
	}
	return string(p.Code) + ": " + p.Detail
}

// Is makes errors.Is(err, KindDenied) true for a problem of that kind.
func (p *Problem) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && k == p.Kind
}

// Unwrap returns the cause.
func (p *Problem) Unwrap() error { return p.cause }

// Kind is the kind of a refusal or failure. The list is closed. A Kind is an error, so that it can be a target of
// errors.Is.
type Kind string

// The kinds.
const (
	KindMalformed       Kind = "malformed"       // the request is malformed
	KindUnauthenticated Kind = "unauthenticated" // no acceptable identity
	KindDenied          Kind = "denied"          // policy, scope or budget refuses
	KindNotFound        Kind = "not_found"       // does not exist, or is not yours
	KindRevoked         Kind = "revoked"         // fenced
	KindExpired         Kind = "expired"         // it has expired
	KindConflict        Kind = "conflict"        // the state changed, or the key was used for another request
	KindUnavailable     Kind = "unavailable"     // a required component is unavailable
	KindInternal        Kind = "internal"        // the broker failed
	KindOverLimit       Kind = "over_limit"      // too much by this caller at a time; nothing was done
)

// Error makes a Kind usable as the target of errors.Is.
func (k Kind) Error() string { return string(k) }

// Status returns the HTTP status of a kind and code. The kind decides, unless HTTP has a status for the code itself.
func Status(kind Kind, code Code) int {
	switch code {
	case CodeTooFast, CodeCallerLimit, CodeManyChains:
		return http.StatusTooManyRequests
	case CodeTooSlow:
		return http.StatusRequestTimeout
	case CodeTooLarge:
		return http.StatusRequestEntityTooLarge
	case CodeMediaType:
		return http.StatusUnsupportedMediaType
	case CodeMethod:
		return http.StatusMethodNotAllowed
	}
	switch kind {
	case KindMalformed:
		return http.StatusBadRequest
	case KindUnauthenticated:
		return http.StatusUnauthorized
	case KindDenied:
		return http.StatusForbidden
	case KindNotFound:
		return http.StatusNotFound
	case KindRevoked, KindConflict:
		return http.StatusConflict
	case KindExpired:
		return http.StatusGone
	case KindUnavailable:
		return http.StatusServiceUnavailable
	case KindOverLimit:
		return http.StatusTooManyRequests
	}
	return http.StatusInternalServerError
}
