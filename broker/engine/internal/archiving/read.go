package archiving

import (
	"context"
	"errors"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/selector"
)

// History is a view of the ledger with all archived records.
func (m Mover) History(ctx context.Context, op string, f func(*records.Tx) error) error {
	if m.Archive == nil {
		return m.View(ctx, op, f)
	}
	err := m.Archive.History(ctx, func(tx broker.Tx) error { return f(m.Cache.In(tx)) })
	var refusal *broker.Error
	if err == nil || errors.As(err, &refusal) {
		return err
	}
	return broker.Errorf(broker.Unavailable, op, "the archive cannot be read now").With(broker.CodeLedgerDown).Because(err)
}

// Find is a view of the ledger, and one with all archived records if f finds nothing in the first. A chain or a revocation
// that the ledger has is there as a whole. So a damaged archive hides nothing of it.
func (m Mover) Find(ctx context.Context, op string, f func(*records.Tx) error) error {
	err := m.View(ctx, op, f)
	if m.Archive != nil && broker.KindOf(err) == broker.NotFound {
		return m.History(ctx, op, f)
	}
	return err
}

// Since is a view with all chains that were open at a time: with all archived records if they may be there.
func (m Mover) Since(ctx context.Context, op string, at time.Time, f func(*records.Tx) error) error {
	if m.Now().Sub(at) < m.Keep {
		return m.View(ctx, op, f)
	}
	return m.History(ctx, op, f)
}

// NothingMatches adds to the refusal of a leaked value which closed grant handed it out, if one did.
func (m Mover) NothingMatches(ctx context.Context, refusal *broker.Error, s selector.Selector) *broker.Error {
	digest, leaked := s.LeakedValue()
	if !leaked || m.Archive == nil {
		return refusal
	}
	var g broker.Grant
	var found bool
	err := m.History(ctx, refusal.Op, func(tx *records.Tx) (err error) {
		g, found, err = tx.ByDigest(digest)
		return err
	})
	if err == nil && !found { // the ledger has no index of closed grants
		err = m.View(ctx, refusal.Op, func(tx *records.Tx) (err error) {
			g, found, err = tx.ClosedWith(digest)
			return err
		})
	}
	if err != nil {
		var why *broker.Error
		if errors.As(err, &why) {
			refusal.Msg += "; closed grants were not searched: " + why.Msg
		}
		return refusal
	}
	if found {
		refusal.Msg = "the secret with this value is dead: it was handed out for grant " + string(g.ID) + " of chain " +
			string(g.Chain) + ", which ended at " + g.Ended.UTC().Format(time.RFC3339)
	}
	return refusal
}
