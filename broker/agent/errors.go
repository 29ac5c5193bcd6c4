package agent

import (
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
)

// ErrIdentity means that the Workload API gives this process several SVIDs and none is chosen, or not the
// chosen one. See [Config].
var ErrIdentity = client.ErrIdentity

// The kinds of errors, as targets of errors.Is.
const (
	ErrMalformed       = api.KindMalformed       // the request is not well formed
	ErrUnauthenticated = api.KindUnauthenticated // the broker does not accept the identity
	ErrDenied          = api.KindDenied          // policy, scope or budget does not allow it
	ErrNotFound        = api.KindNotFound        // it does not exist, or is not yours
	ErrRevoked         = api.KindRevoked         // fenced: stop the work
	ErrExpired         = api.KindExpired         // its time has passed
	ErrConflict        = api.KindConflict        // the state has changed, or the idempotency key was used before
	ErrUnavailable     = api.KindUnavailable     // no answer, or a part that the broker needs does not answer
	ErrInternal        = api.KindInternal        // the broker failed
	ErrOverLimit       = api.KindOverLimit       // too much by this agent at a time: nothing was done, and it may be tried again
)

// Error is the type of every refusal by the broker and of every lost answer. See [api.Problem].
type Error = api.Problem

// Budget limits how much may happen under a delegation. See [api.Budget].
type Budget = api.Budget

// Args are the arguments of a step: strings, integers, booleans and lists of strings.
type Args map[string]any
