package policy

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/pawlsec/pawl/broker"
)

// errOlder refuses a bundle with a version that is not higher than the running one's.
var errOlder = errors.New("bundle is not newer than the running one")

// Replace returns an error if next may not replace running. The name must be the same and the version higher, or the
// bundle must be the same. An older version needs rollback, which is a deliberate act of an operator and belongs in
// the audit log. Two contents under one version are always refused.
func Replace(running, next *Policy, rollback bool) error {
	was, is := running.bundle, next.bundle
	switch {
	case was.Name() != is.Name():
		return fmt.Errorf("bundle %q cannot replace %q", is.Name(), was.Name())
	case running.digest == next.digest || is.Version() > was.Version():
		return nil
	case is.Version() == was.Version():
		return fmt.Errorf("%w: version %d again, with other content", errOlder, is.Version())
	case !rollback:
		return fmt.Errorf("%w: version %d, and %d is running", errOlder, is.Version(), was.Version())
	}
	return nil
}

// Running holds the bundle in force and swaps it whole: a decision uses the old one or the new one. It is safe for
// concurrent use. The zero Running holds none; create one with [NewRunning].
type Running struct {
	trust   Trust
	current atomic.Pointer[Policy]

	swap sync.Mutex // serialises Replace: the bundle compared is the bundle replaced
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

// Current returns the policy in force. A procedure reads it once and decides on it.
func (r *Running) Current() *Policy { return r.current.Load() }

// Policy is [Running.Current] with the type that the engine's configuration needs.
func (r *Running) Policy() broker.Policy { return r.current.Load() }

// Replace puts a verified bundle in force by the rules of [Replace], if agree returns nil. It calls agree last, right
// before the swap, so agree may record the change. A nil agree accepts every bundle. After an error the running
// bundle stays in force.
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
