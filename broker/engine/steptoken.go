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
func (s *issue) prefetchToken(ctx context.Context, p records.Lineage) *stepToken {
	if !s.b.cfg.Vault.HasToken(s.grant.Delegation) || s.budgetSpent(ctx, p) {
		return nil
	}
	t, tool, g := &stepToken{done: make(chan struct{})}, s.tool, s.grant
	s.b.background(func() {
		defer close(t.done)
		// Not cut off with the request: of a token that was made the accessor must come to be known.
		ctx, cancel := after(ctx, s.b.cfg.MintTimeout)
		defer cancel()
		var name string
		if t.mint, name, t.err = s.b.prepare(ctx, tool, g); t.err == nil {
			t.token, t.err = s.b.cfg.Vault.CreateStepToken(ctx, g, name, tool.Policy)
		}
	})
	return t
}

// budgetSpent reports whether a budget on the records.Lineage is used up, or whether that cannot be read.
func (s *issue) budgetSpent(ctx context.Context, p records.Lineage) (spent bool) {
	return s.b.view(ctx, opIssue, func(tx *records.Tx) error {
		for _, d := range p.Nodes {
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
func (t *stepToken) drop(ctx context.Context, b *Engine) {
	if t == nil {
		return
	}
	b.background(func() {
		if _, token, err := t.wait(); err == nil {
			b.kill(ctx, token)
		}
	})
}

// prepare narrows the mint of a step to its arguments, at the target where that is needed.
func (b *Engine) prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	m, name, err := b.cfg.Backends[g.Backend].Prepare(ctx, t, g)
	if err != nil {
		err = asUnavailable(err, broker.CodeBackendDown, "the tool's target cannot be prepared; nothing was made")
	}
	return m, name, err
}

// token is step 3: what was begun early, or what is made now. A delegation's token that is not
// there, or has ended meanwhile, is made anew, once: nothing was minted yet.
func (s *issue) token(ctx context.Context, prefetched *stepToken) (m broker.Mint, token broker.Handle, err error) {
	begun := prefetched != nil
	if begun {
		m, token, err = prefetched.wait()
	}
	if !begun || errors.Is(err, broker.ErrNoParent) {
		m, token, err = s.makeToken(ctx)
	}
	if err != nil {
		err = asUnavailable(err, broker.CodeVaultDown, "Vault makes no token for the step; nothing was minted")
	}
	return m, token, err
}

func (s *issue) makeToken(ctx context.Context) (m broker.Mint, token broker.Handle, err error) {
	m, name, err := s.b.prepare(ctx, s.tool, s.grant)
	if err != nil {
		return m, token, err
	}
	for range 2 {
		if err := s.b.branch(ctx, opIssue, s.grant.Delegation, s.policy); err != nil {
			return m, token, err
		}
		if token, err = s.b.cfg.Vault.CreateStepToken(ctx, s.grant, name, s.tool.Policy); !errors.Is(err, broker.ErrNoParent) {
			break
		}
	}
	return m, token, err
}
