package api

import (
	"cmp"
	"net/http"
	"time"
)

// ProblemType is the media type of a [Problem] (RFC 9457).
const ProblemType = "application/problem+json"

// Problems is where each code is explained; a problem's type is this and the code as fragment.
const Problems = "https://github.com/pawlsec/pawl/blob/main/broker/api/problems.md#"

// Problem is the one form of every refusal and failure, an RFC 9457 problem. It is an error;
// errors.Is(err, KindRevoked) asks for its kind.
type Problem struct {
	Type         string   `json:"type"`                    // where the code is explained
	Title        string   `json:"title"`                   // the code in a few words, always the same
	Status       int      `json:"status"`                  // of the answer
	Detail       string   `json:"detail,omitzero"`         // this occurrence, for people
	Code         Code     `json:"code"`                    // what to act on
	Kind         Kind     `json:"kind"`                    // what sort of refusal, for whoever does not know the code
	Policies     []string `json:"policies,omitzero"`       // ids of the policies that decided
	Missing      []string `json:"missing,omitzero"`        // what was lacking, as in "tool:deploy:use", "argument:tables"
	Remedy       string   `json:"remedy,omitzero"`         // how to ask for it
	Retryable    bool     `json:"retryable"`               // the same request may succeed later
	RetryAfterMS int64    `json:"retry_after_ms,omitzero"` // and not before that many milliseconds
	Revocation   string   `json:"revocation,omitzero"`     // id of what the request set off
	Request      string   `json:"request,omitzero"`        // id of the request, and of its decision, in the broker's log

	cause error
}

// NewProblem makes the problem for a code. An unknown code is kept, with what its kind says.
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

// Because sets the cause, which never travels.
func (p *Problem) Because(err error) *Problem { p.cause = err; return p }

// After says when the same request may succeed.
func (p *Problem) After(d time.Duration) *Problem {
	if d > 0 {
		p.Retryable, p.RetryAfterMS = true, max(1, d.Milliseconds())
	}
	return p
}

// RetryAfter is how long to wait before asking again; zero when the broker named no time.
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

// Unwrap gives the cause.
func (p *Problem) Unwrap() error { return p.cause }

// Kind says what sort of refusal or failure a problem is. The list is closed. A Kind is an
// error, as a target of errors.Is.
type Kind string

// The kinds.
const (
	KindMalformed       Kind = "malformed"       // the request cannot mean anything
	KindUnauthenticated Kind = "unauthenticated" // no acceptable identity
	KindDenied          Kind = "denied"          // policy, scope or budget says no
	KindNotFound        Kind = "not_found"       // does not exist, or is not yours
	KindRevoked         Kind = "revoked"         // fenced
	KindExpired         Kind = "expired"         // its time is over
	KindConflict        Kind = "conflict"        // the state moved, or the key was used for something else
	KindUnavailable     Kind = "unavailable"     // a part that is needed cannot answer
	KindInternal        Kind = "internal"        // the broker's own fault
)

// Error makes a Kind usable as the target of errors.Is.
func (k Kind) Error() string { return string(k) }

// Status is the HTTP status of a kind and code. The kind decides, save where HTTP itself has
// a status for the code.
func Status(kind Kind, code Code) int {
	switch code {
	case CodeTooFast, CodeTooManyStreams:
		return http.StatusTooManyRequests
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
	}
	return http.StatusInternalServerError
}
