package engine

import (
	"context"
	"errors"
	"slices"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/selector"
)

// branch sees to it that Vault holds a usable token for a delegation and each of its ancestors:
// the delegation tree is the Vault token tree. A token's accessor is recorded, on a records.Lineage that is
// not fenced, before the token is used for anything.
func (b *Engine) branch(ctx context.Context, op string, id broker.DelegationID, policy broker.Policy) error {
	if b.cfg.Vault.HasToken(id) {
		return nil
	}
	unlock, err := b.branching.Lock(ctx, id)
	if err != nil {
		return broker.Errorf(broker.Unavailable, op, "gave up waiting").Because(err)
	}
	defer unlock()
	if b.cfg.Vault.HasToken(id) {
		return nil
	}
	var d broker.Delegation
	if err := b.view(ctx, op, func(tx *records.Tx) error {
		p, err := tx.Lineage(op, id)
		if err == nil {
			d = p.Leaf()
		}
		return err
	}); err != nil {
		return err
	}
	if d.Parent != "" {
		if err := b.branch(ctx, op, d.Parent, policy); err != nil {
			return err
		}
	}
	token, err := b.cfg.Vault.CreateDelegationToken(ctx, d, vaultPolicies(d.Scope, policy))
	if errors.Is(err, broker.ErrNoParent) {
		return broker.Errorf(broker.Unavailable, op, "the parent delegation's token has just ended").With(broker.CodeVaultDown).Because(err)
	}
	if err != nil {
		return asUnavailable(err, broker.CodeVaultDown, "Vault makes no token for the delegation; nothing was minted")
	}
	if err := b.recordToken(ctx, op, id, token); err != nil {
		b.kill(ctx, token)
		return err
	}
	b.cfg.Vault.Activate(id, token)
	return nil
}

func (b *Engine) recordToken(ctx context.Context, op string, id broker.DelegationID, token broker.Handle) error {
	return b.update(ctx, op, func(tx *records.Tx) error {
		p, err := tx.Lineage(op, id)
		if err != nil {
			return err
		}
		now := b.cfg.Now()
		if err := tx.CheckUsable(op, p, selector.Subject{}, now); err != nil {
			return err
		}
		d := p.Leaf()
		d.Tokens = append(slices.Clip(d.Tokens), token)
		if err := tx.PutDelegation(d); err != nil {
			return err
		}
		_, err = tx.Enter(broker.Entry{At: now, Actor: "pawl", Op: broker.OpToken, Chain: d.Chain, Delegation: id})
		return err
	})
}

// vaultPolicies are the Vault policies of a scope's tools: what Vault itself holds the
// delegation to.
func vaultPolicies(s broker.Scope, policy broker.Policy) (names []string) {
	for _, r := range s {
		if t, ok := policy.Tool(r.Tool); ok && t.Policy != "" {
			names = append(names, t.Policy)
		}
	}
	return unique(names)
}
