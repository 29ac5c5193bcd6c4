package engine

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Adopt records that a bundle comes into force, before it does: no entry, no change. The ledger
// remembers which one was in force last, so that a version only goes up over restarts, too. The
// same bundle again is adopted without another entry.
//
// Errors: Conflict with CodePolicyOlder, Unavailable.
func (b *Engine) Adopt(ctx context.Context, a broker.Adoption) error {
	const op = "policy"
	now, by := b.cfg.Now(), cmp.Or(a.By, "pawl")
	return b.update(ctx, op, func(tx *records.Tx) error {
		was, known, err := tx.Bundle()
		if err != nil || known && was.Digest == a.Digest {
			return err
		}
		detail := fmt.Sprintf("%s version %d", a.Name, a.Version)
		if known {
			if err := mayFollow(op, a, was); err != nil {
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
		if err := tx.PutBundle(records.Bundle{Name: a.Name, Version: a.Version, Digest: a.Digest, Since: now, By: by}); err != nil {
			return err
		}
		_, err = tx.Enter(broker.Entry{At: now, Actor: by, Op: broker.OpPolicy, Bundle: a.Digest, Detail: detail})
		return err
	})
}

// mayFollow refuses what may not take the place of the bundle that was in force last. Two contents
// under one version are never right: nobody could say which of them decided.
func mayFollow(op string, a broker.Adoption, was records.Bundle) error {
	switch {
	case a.Name == was.Name && a.Version == was.Version:
		return broker.Errorf(broker.Conflict, op, "version %d of policy bundle %q was in force with other content", a.Version, a.Name).
			With(broker.CodePolicyOlder).Lacks("give the bundle a higher version")
	case a.Back || a.Name == was.Name && a.Version > was.Version:
		return nil
	case a.Name != was.Name:
		return broker.Errorf(broker.Conflict, op, "policy bundle %q version %d cannot take the place of %q by itself", a.Name, a.Version, was.Name).
			With(broker.CodePolicyOlder).Lacks(fmt.Sprintf("if that is meant, start once with --allow-policy-rollback %d", a.Version))
	}
	return broker.Errorf(broker.Conflict, op, "version %d of policy bundle %q is older than version %d, which was in force", a.Version, a.Name, was.Version).
		With(broker.CodePolicyOlder).Lacks(fmt.Sprintf("if that is meant, start once with --allow-policy-rollback %d", a.Version))
}
