package engine

import (
	"context"
	"errors"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// stepToken is step 3 of an issue under way beside step 2. The ledger's disk and Vault are waited
// for at once then, which is a sixth of a step's time. Nothing else changes: the token can do nothing
// before step 4 has recorded it, and when step 2 refuses it is what a crash after step 3 leaves, a
// token that nobody has, and is revoked at once. A nil stepToken was not begun.
type stepToken struct {
	done  chan struct{} // closed when the fields below are set
	mint  broker.Mint
	token broker.Handle
	err   error
}

// prefetchToken begins step 3 where step 2 is expected to agree: the delegation's own token is there, and no
// budget was used up a moment ago. So what is refused costs Vault nothing.
func (s *issue) prefetchToken(ctx context.Context, l records.Lineage) *stepToken {
	if !s.e.cfg.Vault.HasToken(s.grant.Delegation) || s.budgetSpent(ctx, l) {
		return nil
	}
	t, tool, g := &stepToken{done: make(chan struct{})}, s.tool, s.grant
	s.e.background(func() {
		defer close(t.done)
		// Not cut off with the request: of a token that was made the accessor must come to be known.
		ctx, cancel := detached(ctx, s.e.cfg.MintTimeout)
		defer cancel()
		var name string
		if t.mint, name, t.err = s.e.prepare(ctx, tool, g); t.err == nil {
			t.token, t.err = s.e.cfg.Vault.CreateStepToken(ctx, g, name, tool.Policy)
		}
	})
	return t
}

// budgetSpent reports whether a budget on the records.Lineage is used up, or whether that cannot be read.
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
		return nil
	}) != nil || spent
}

// wait gives what came of it.
func (t *stepToken) wait() (broker.Mint, broker.Handle, error) {
	<-t.done
	return t.mint, t.token, t.err
}

// drop ends the token of a step that is not taken, once it is there.
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

// prepare narrows the mint of a step to its arguments, at the target where that is needed.
func (e *Engine) prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	m, name, err := e.cfg.Backends[g.Backend].Prepare(ctx, t, g)
	if err != nil {
		err = asUnavailable(err, broker.CodeBackendDown, "the tool's target cannot be prepared; nothing was made")
	}
	return m, name, err
}

// token is step 3: what was begun early, or what is made now. A delegation's token that is not
// there, or has ended meanwhile, is made anew, once: nothing was minted yet.
func (s *issue) obtainToken(ctx context.Context, prefetched *stepToken) (m broker.Mint, token broker.Handle, err error) {
	wasPrefetched := prefetched != nil
	if wasPrefetched {
		m, token, err = prefetched.wait()
	}
	if !wasPrefetched || errors.Is(err, broker.ErrNoParent) {
		m, token, err = s.createToken(ctx)
	}
	if err != nil {
		err = asUnavailable(err, broker.CodeVaultDown, "Vault makes no token for the step; nothing was minted")
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
		if token, err = s.e.cfg.Vault.CreateStepToken(ctx, s.grant, name, s.tool.Policy); !errors.Is(err, broker.ErrNoParent) {
			break
		}
	}
	return m, token, err
}
