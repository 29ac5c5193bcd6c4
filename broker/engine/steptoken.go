package engine

import (
	"context"
	"errors"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/ahead"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// stepToken is the outcome of step 3 of an issue. Where it comes before step 2, that records INTENT and HANDLE as one, and
// the issue waits for one commit. The order stays: no mint uses the token before it is recorded. When step 2 refuses,
// the token is in the state that a crash after step 3 leaves, and is revoked at once. A nil stepToken was not asked for.
type stepToken struct {
	mint  broker.Mint
	token broker.Handle
	ahead *ahead.Token // nil: it was made for this step
	err   error
}

// prefetchToken is step 3 when step 2 will probably succeed: the delegation has a token, and no budget is spent. So a
// step that will be refused costs Vault no request.
func (s *issue) prefetchToken(ctx context.Context, l records.Lineage) *stepToken {
	if !s.e.cfg.Vault.HasToken(s.grant.Delegation) || s.budgetSpent(ctx, l) {
		return nil
	}
	// The call outlives the request: the accessor of a created token must become known.
	ctx, cancel := detached(ctx, s.e.cfg.MintTimeout)
	defer cancel()
	t := s.takeAhead(ctx)
	if t == nil {
		t = &stepToken{}
		if t.mint, s.name, t.err = s.e.prepare(ctx, s.tool, s.grant); t.err == nil {
			t.token, t.err = s.tokenFor(ctx, t.mint, s.name)
		}
	}
	s.now = s.e.cfg.Now() // of step 2: Vault may have taken seconds
	return t
}

// takeAhead takes the token that was made ahead for the step, and goes on with the grant's id that was drawn with it. Nil:
// there is none that fits.
func (s *issue) takeAhead(ctx context.Context) *stepToken {
	if s.request.Seal != nil { // the id of its grant is known to the deliveries
		return nil
	}
	a := s.e.ahead.Take(ctx, s.grant)
	if a == nil {
		return nil
	}
	g := s.grant
	g.ID = a.Grant.ID
	m, name, err := s.e.prepare(ctx, s.tool, g)
	if err != nil || !a.Named(name) || !ahead.Fits(m, g) {
		s.e.ahead.Drop(a)
		return nil
	}
	m.Expires = g.Expires
	s.grant, s.name = g, name
	return &stepToken{mint: m, token: a.Grant.Token, ahead: a}
}

// budgetSpent reports whether a budget of the lineage is spent, or cannot be read.
func (s *issue) budgetSpent(ctx context.Context, l records.Lineage) (spent bool) {
	return s.e.view(ctx, opIssue, func(tx *records.Tx) error {
		for _, d := range l.Nodes {
			if !d.Budget.Limited() {
				continue
			}
			u, err := tx.Usage(d.ID)
			if err != nil {
				return err
			}
			spent = spent || u.Exceeded(d.Budget, s.tool.Name, s.now) != ""
		}
		return tx.OverLimit(opIssue, s.use, s.now)
	}) != nil || spent
}

// made reports whether there is a token.
func (t *stepToken) made() bool { return t != nil && t.err == nil }

// drop kills the token of a refused step, beside the answer, unless the step shares it.
func (t *stepToken) drop(ctx context.Context, e *Engine) {
	switch {
	case t != nil && t.ahead != nil:
		e.ahead.Drop(t.ahead)
	case t.made() && t.mint.Shared == nil:
		e.background(func() { e.kill(ctx, t.token) })
	}
}

// tokenFor gives the token that mints: one of the step's own, or that of its delegation.
func (s *issue) tokenFor(ctx context.Context, m broker.Mint, name string) (broker.Handle, error) {
	if m.Shared != nil {
		return s.e.cfg.Vault.DelegationToken(s.grant, s.tool.Policy)
	}
	return s.e.cfg.Vault.CreateStepToken(ctx, s.grant, name, s.tool.Policy)
}

// prepare narrows the mint to the step's arguments. Some backends create an object at the target for it. A secret without
// a lease is minted with the delegation's token, unless its tool asks for a token of each step's own.
func (e *Engine) prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	m, name, err := e.cfg.Backends[g.Backend].Prepare(ctx, t, g)
	if err != nil {
		err = asUnavailable(err, broker.CodeBackendDown, "the tool's target cannot be prepared; nothing was made")
	}
	if m.NoLease && !t.StepToken {
		m.Shared = &broker.SharedToken{Grant: g.ID, Tool: t.Name, Policy: t.Policy, Expires: g.Expires}
	}
	return m, name, err
}

// obtainToken is step 3 after step 2: it creates the token, unless Vault has just refused it. When the delegation's token
// is missing or has ended, it creates that again, once. A retry is safe here, since Vault has minted nothing yet.
func (s *issue) obtainToken(ctx context.Context, prefetched *stepToken,
) (m broker.Mint, token broker.Handle, err error) {
	if prefetched == nil || errors.Is(prefetched.err, broker.ErrNoParent) {
		m, token, err = s.createToken(ctx)
	} else {
		err = prefetched.err
	}
	if err != nil {
		err = asUnavailable(err, broker.CodeVaultDown, "Vault did not create the step's token; nothing was minted")
	}
	return m, token, err
}

func (s *issue) createToken(ctx context.Context) (m broker.Mint, token broker.Handle, err error) {
	if m, s.name, err = s.e.prepare(ctx, s.tool, s.grant); err != nil {
		return m, token, err
	}
	for range 2 {
		if err := s.e.ensureToken(ctx, opIssue, s.grant.Delegation, s.policy); err != nil {
			return m, token, err
		}
		token, err = s.tokenFor(ctx, m, s.name)
		if !errors.Is(err, broker.ErrNoParent) {
			break
		}
	}
	return m, token, err
}
