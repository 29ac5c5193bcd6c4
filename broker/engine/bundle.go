package engine

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Adopt records that a policy bundle comes into force. The caller puts the bundle into force only after that: no entry,
// no change. The ledger keeps the last bundle in force, so that a version only goes up, over restarts too. Adopting the
// same bundle again writes no entry.
//
// Errors: Conflict with CodePolicyOlder, Unavailable.
func (e *Engine) Adopt(ctx context.Context, a broker.Adoption) error {
	const op = "policy"
	now, by := e.cfg.Now(), cmp.Or(a.By, "pawl")
	return e.update(ctx, op, func(tx *records.Tx) error {
		previous, known, err := tx.Bundle()
		if err != nil || known && previous.Digest == a.Digest {
			return err
		}
		detail := fmt.Sprintf("%s version %d", a.Name, a.Version)
		if known {
			if err := checkSuccessor(op, a, previous); err != nil {
				return err
			}
			detail += fmt.Sprintf(" follows %s version %d", previous.Name, previous.Version)
			if a.Name != previous.Name || a.Version < previous.Version {
				detail += ", rolled back"
			}
		}
		if len(a.Signers) > 0 {
			detail += "; signed by " + strings.Join(a.Signers, ", ")
		}
		next := records.Bundle{Name: a.Name, Version: a.Version, Digest: a.Digest, Since: now, By: by}
		if err := tx.PutBundle(next); err != nil {
			return err
		}
		_, err = tx.Enter(broker.Entry{At: now, Actor: by, Op: broker.OpPolicy, Bundle: a.Digest, Detail: detail})
		return err
	})
}

// checkSuccessor refuses a bundle that may not replace the last one in force. Two contents under one version are always
// refused: a record could not show which of them decided.
func checkSuccessor(op string, a broker.Adoption, previous records.Bundle) error {
	allow := fmt.Sprintf("start once with --allow-policy-rollback %d", a.Version)
	switch {
	case a.Name == previous.Name && a.Version == previous.Version:
		return broker.Errorf(broker.Conflict, op, "version %d of policy bundle %q was in force with other content",
			a.Version, a.Name).With(broker.CodePolicyOlder).Lacks("give the bundle a higher version")
	case a.Back || a.Name == previous.Name && a.Version > previous.Version:
		return nil
	case a.Name != previous.Name:
		return broker.Errorf(broker.Conflict, op,
			"policy bundle %q version %d cannot replace %q without an operator's consent", a.Name, a.Version, previous.Name).
			With(broker.CodePolicyOlder).Lacks("to replace it, " + allow)
	}
	return broker.Errorf(broker.Conflict, op,
		"version %d of policy bundle %q is older than version %d, which was in force", a.Version, a.Name, previous.Version).
		With(broker.CodePolicyOlder).Lacks("to roll back, " + allow)
}
