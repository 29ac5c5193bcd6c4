package policy

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/pawlsec/pawl/broker"
)

// ErrOlder refuses a bundle whose version does not go up.
var ErrOlder = errors.New("bundle is not newer than the running one")

// Replace says whether next may take running's place: it has the same name and a higher version,
// or is the same bundle. Going back to an older version needs rollback, which is an operator's
// deliberate act and belongs in the audit; two contents under one version are never right.
func Replace(running, next *Policy, rollback bool) error {
	was, is := running.bundle, next.bundle
	switch {
	case was.Name() != is.Name():
		return fmt.Errorf("bundle %q cannot take the place of %q", is.Name(), was.Name())
	case running.digest == next.digest || is.Version() > was.Version():
		return nil
	case is.Version() == was.Version():
		return fmt.Errorf("%w: version %d again, with other content", ErrOlder, is.Version())
	case !rollback:
		return fmt.Errorf("%w: version %d, and %d is running", ErrOlder, is.Version(), was.Version())
	}
	return nil
}

// Running holds the bundle in force and swaps it whole: a decision sees the old one or the new
// one. Safe for concurrent use. The zero Running has none; make one with [NewRunning].
type Running struct {
	trust   Trust
	current atomic.Pointer[Policy]

	swap sync.Mutex // serialises Replace, so that versions are compared with what they replace
}

// NewRunning starts with a verified bundle.
func NewRunning(jws []byte, trust Trust) (*Running, error) {
	r := &Running{trust: trust}
	p, err := r.load(jws)
	if err != nil {
		return nil, err
	}
	r.current.Store(p)
	return r, nil
}

func (r *Running) load(jws []byte) (*Policy, error) {
	b, err := Verify(jws, r.trust)
	if err != nil {
		return nil, err
	}
	return Load(b)
}

// Current is the policy in force; a procedure takes it once and decides on that.
func (r *Running) Current() *Policy { return r.current.Load() }

// Policy is [Running.Current] in the form that the engine's configuration wants.
func (r *Running) Policy() broker.Policy { return r.current.Load() }

// Replace puts a verified bundle in force by the rules of [Replace], if agree does too: it is
// asked last, right before, and may record that the bundle comes into force; nil agrees with
// everything. After an error the running one stays.
func (r *Running) Replace(jws []byte, rollback bool, agree func(*Policy) error) (*Policy, error) {
	r.swap.Lock()
	defer r.swap.Unlock()
	b, err := Verify(jws, r.trust)
	if err != nil {
		return nil, err
	}
	next, err := Load(b)
	if err != nil {
		return nil, err
	}
	if err := Replace(r.current.Load(), next, rollback); err != nil {
		return nil, err
	}
	if agree != nil {
		if err := agree(next); err != nil {
			return nil, err
		}
	}
	r.current.Store(next)
	return next, nil
}
