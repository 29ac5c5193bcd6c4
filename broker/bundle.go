package broker

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"
)

// Adoption asks to put a policy bundle in force.
type Adoption struct {
	Name    string
	Version int64
	Digest  string
	Signers []string // ids of the platform keys that stand for it
	By      string   // the operator who asks; empty: the broker by itself, from its configuration

	// Back lets an older version, or a bundle of another name, follow the one that was in force
	// last. It is an operator's deliberate act and is recorded as such.
	Back bool
}

// inForce is the policy bundle that was in force last.
type inForce struct {
	Name    string    `json:"name"`
	Version int64     `json:"version"`
	Digest  string    `json:"digest"`
	Since   time.Time `json:"since"`
	By      string    `json:"by"`
}

// keyInForce is the one record of its family.
const keyInForce = "b/policy"

// Adopt records that a bundle comes into force, before it does: no entry, no change. The ledger
// remembers which one was in force last, so that a version only goes up over restarts, too. The
// same bundle again is adopted without another entry.
//
// Errors: Conflict with CodePolicyOlder, Unavailable.
func (b *Broker) Adopt(ctx context.Context, a Adoption) error {
	const op = "policy"
	now, by := b.cfg.Now(), cmp.Or(a.By, "pawl")
	return b.update(ctx, op, func(tx Tx) error {
		was, known, err := load[inForce](tx, keyInForce)
		if err != nil || known && was.Digest == a.Digest {
			return err
		}
		detail := fmt.Sprintf("%s version %d", a.Name, a.Version)
		if known {
			if err := a.follows(op, was); err != nil {
				return err
			}
			detail += fmt.Sprintf(" follows %s version %d", was.Name, was.Version)
			if a.Name != was.Name || a.Version < was.Version {
				detail += ", rolled back"
			}
		}
		if len(a.Signers) > 0 {
			detail += "; signed by " + strings.Join(a.Signers, ", ")
		}
		if err := save(tx, keyInForce, inForce{a.Name, a.Version, a.Digest, now, by}); err != nil {
			return err
		}
		_, err = enter(tx, Entry{At: now, Actor: by, Op: OpPolicy, Bundle: a.Digest, Detail: detail})
		return err
	})
}

// follows refuses what may not take the place of the bundle that was in force last. Two contents
// under one version are never right: nobody could say which of them decided.
func (a Adoption) follows(op string, was inForce) error {
	switch {
	case a.Name == was.Name && a.Version == was.Version:
		return Errorf(Conflict, op, "version %d of policy bundle %q was in force with other content", a.Version, a.Name).
			With(CodePolicyOlder).Lacks("give the bundle a higher version")
	case a.Back || a.Name == was.Name && a.Version > was.Version:
		return nil
	case a.Name != was.Name:
		return Errorf(Conflict, op, "policy bundle %q version %d cannot take the place of %q by itself", a.Name, a.Version, was.Name).
			With(CodePolicyOlder).Lacks(fmt.Sprintf("if that is meant, start once with --allow-policy-rollback %d", a.Version))
	}
	return Errorf(Conflict, op, "version %d of policy bundle %q is older than version %d, which was in force", a.Version, a.Name, was.Version).
		With(CodePolicyOlder).Lacks(fmt.Sprintf("if that is meant, start once with --allow-policy-rollback %d", a.Version))
}
