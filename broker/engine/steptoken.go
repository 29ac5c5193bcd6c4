package engine

import (
	"context"
	"errors"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// stepToken is step 3 of an issue, running concurrently with step 2. The issue then waits for the ledger's disk and for
// Vault at the same time, which saves a sixth of a step's time. The order of the commits stays: no mint uses the token
// before step 4 has recorded it. When step 2 refuses, the token is in the state that a crash after step 3 leaves, and
// is revoked at once. A nil stepToken was not started.
type stepToken struct {
	done  chan struct{} // closed when the fields below are set
	mint  broker.Mint
	token broker.Handle
	err   error
}

// prefetchToken starts step 3 when step 2 will probably succeed: the delegation has a token, and no budget is spent. So
// a step that will be refused costs Vault no request.
func (s *issue) prefetchToken(ctx context.Context, l records.Lineage) *stepToken {
	if !s.e.cfg.Vault.HasToken(s.grant.Delegation) || s.budgetSpent(ctx, l) {
		return nil
	}
	t, tool, g := &stepToken{done: make(chan struct{})}, s.tool, s.grant
	s.e.background(func() {
		defer close(t.done)
		// The call outlives the request: the accessor of a created token must become known.
		ctx, cancel := detached(ctx, s.e.cfg.MintTimeout)
		defer cancel()
		var name string
		if t.mint, name, t.err = s.e.prepare(ctx, tool, g); t.err == nil {
			t.token, t.err = s.e.cfg.Vault.CreateStepToken(ctx, g, name, tool.Policy)
		}
	})
	return t
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

// wait waits for the token.
func (t *stepToken) wait() (broker.Mint, broker.Handle, error) {
	<-t.done
	return t.mint, t.token, t.err
}

// drop kills the token of a refused step as soon as it exists.
func (t *stepToken) drop(ctx context.Context, e *Engine) {
	if t == nil {
		return
	}
	e.background(func() {
		if _, token, err := t.wait(); err == nil {
			e.kill(ctx, token)
		}
	})
}

// prepare narrows the mint to the step's arguments. Some backends create an object at the target for it.
func (e *Engine) prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	m, name, err := e.cfg.Backends[g.Backend].Prepare(ctx, t, g)
	if err != nil {
		err = asUnavailable(err, broker.CodeBackendDown, "the tool's target cannot be prepared; nothing was made")
	}
	return m, name, err
}

// obtainToken is step 3: it returns the prefetched token, or creates one. When the delegation's token is missing or has
// ended, it creates that again, once. A retry is safe here, since Vault has minted nothing yet.
func (s *issue) obtainToken(ctx context.Context, prefetched *stepToken,
) (m broker.Mint, token broker.Handle, err error) {
	wasPrefetched := prefetched != nil
	if wasPrefetched {
		m, token, err = prefetched.wait()
	}
	if !wasPrefetched || errors.Is(err, broker.ErrNoParent) {
		m, token, err = s.createToken(ctx)
	}
	if err != nil {
		err = asUnavailable(err, broker.CodeVaultDown, "Vault did not create the step's token; nothing was minted")
	}
	return m, token, err
}

func (s *issue) createToken(ctx context.Context) (m broker.Mint, token broker.Handle, err error) {
	m, name, err := s.e.prepare(ctx, s.tool, s.grant)
	if err != nil {
		return m, token, err
	}
	for range 2 {
		if err := s.e.ensureToken(ctx, opIssue, s.grant.Delegation, s.policy); err != nil {
			return m, token, err
		}
		token, err = s.e.cfg.Vault.CreateStepToken(ctx, s.grant, name, s.tool.Policy)
		if !errors.Is(err, broker.ErrNoParent) {
			break
		}
	}
	return m, token, err
}
