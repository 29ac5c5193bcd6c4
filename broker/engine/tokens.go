package engine

import (
	"context"
	"slices"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/selector"
)

// ensureToken creates the missing Vault tokens of a delegation and its ancestors: the delegation tree is the Vault
// token tree. It records each token's accessor, under a lineage that is not fenced, before the token is used.
func (e *Engine) ensureToken(ctx context.Context, op string, id broker.DelegationID, policy broker.Policy) error {
	if e.cfg.Vault.HasToken(id) {
		return nil
	}
	unlock, err := e.tokenLocks.Lock(ctx, id)
	if err != nil {
		return broker.Errorf(broker.Unavailable, op, "the request ended while it waited for the delegation's token").
			Because(err)
	}
	defer unlock()
	if e.cfg.Vault.HasToken(id) {
		return nil
	}
	var d broker.Delegation
	if err := e.view(ctx, op, func(tx *records.Tx) error {
		l, err := tx.Lineage(op, id)
		if err == nil {
			d = l.Leaf()
		}
		return err
	}); err != nil {
		return err
	}
	if d.Parent != "" {
		if err := e.ensureToken(ctx, op, d.Parent, policy); err != nil {
			return err
		}
	}
	token, err := e.cfg.Vault.CreateDelegationToken(ctx, d, vaultPolicies(d.Scope, policy))
	if err != nil {
		return asUnavailable(err, broker.CodeVaultDown, "Vault did not create the delegation's token; nothing was minted")
	}
	if err := e.recordToken(ctx, op, id, token); err != nil {
		e.kill(ctx, token)
		return err
	}
	e.cfg.Vault.Activate(id, token)
	e.ahead.DropUnder(id) // they ended with the former token
	return nil
}

func (e *Engine) recordToken(ctx context.Context, op string, id broker.DelegationID, token broker.Handle) error {
	return e.update(ctx, op, func(tx *records.Tx) error {
		l, err := tx.Lineage(op, id)
		if err != nil {
			return err
		}
		now := e.cfg.Now()
		if err := tx.CheckUsable(op, l, selector.Subject{}, now); err != nil {
			return err
		}
		d := l.Leaf()
		d.Tokens = append(slices.Clip(d.Tokens), token)
		if err := tx.PutDelegation(d); err != nil {
			return err
		}
		_, err = tx.Enter(broker.Entry{At: now, Actor: "pawl", Op: broker.OpToken, Chain: d.Chain, Delegation: id})
		return err
	})
}

// vaultPolicies lists the Vault policies of a scope's tools. Vault holds the delegation's token to them.
func vaultPolicies(scope broker.Scope, policy broker.Policy) (names []string) {
	for _, r := range scope {
		if t, ok := policy.Tool(r.Tool); ok && t.Policy != "" {
			names = append(names, t.Policy)
		}
	}
	return unique(names)
}
