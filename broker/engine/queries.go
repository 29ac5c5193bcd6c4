package engine

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Chains lists chains, newest first: all, or those that are open or have live grants.
func (e *Engine) Chains(ctx context.Context, all bool) (list []broker.ChainSummary, err error) {
	now := e.cfg.Now()
	err = e.view(ctx, "chains", func(tx *records.Tx) error {
		list = nil
		return tx.EachChain(func(c broker.Chain) error {
			s, err := summary(tx, c)
			if err != nil {
				return err
			}
			root, _, err := tx.Delegation(c.Root)
			if s.Fence = root.Fence; all || s.Live > 0 || s.Fence == nil && now.Before(root.Expires) {
				list = append(list, s)
			}
			return err
		})
	})
	slices.SortFunc(list, func(a, b broker.ChainSummary) int { return b.Chain.Opened.Compare(a.Chain.Opened) })
	return list, err
}

func summary(tx *records.Tx, c broker.Chain) (s broker.ChainSummary, err error) {
	u, err := tx.Usage(c.Root)
	if err != nil {
		return s, err
	}
	s = broker.ChainSummary{Chain: c, Live: u.Live, Steps: u.Steps}
	return s, tx.EachMember(c.ID, func(broker.DelegationID) error { s.Delegations++; return nil })
}

// Chain returns one chain with its delegations and grants.
//
// Errors: NotFound, Unavailable.
func (e *Engine) Chain(ctx context.Context, id broker.ChainID) (v broker.ChainView, err error) {
	err = e.view(ctx, "chain", func(tx *records.Tx) error {
		v = broker.ChainView{}
		var ok bool
		if v.Chain, ok, err = tx.Chain(id); err != nil {
			return err
		}
		if !ok {
			return records.UnknownChain("chain", id)
		}
		if err := tx.EachMember(id, func(d broker.DelegationID) error {
			node, _, err := tx.Delegation(d)
			v.Delegations = append(v.Delegations, node)
			return err
		}); err != nil {
			return err
		}
		add := func(g broker.Grant) error { v.Grants = append(v.Grants, g); return nil }
		if err := tx.EachLive([]broker.ChainID{id}, add); err != nil {
			return err
		}
		return tx.EachPast([]broker.ChainID{id}, add)
	})
	records.RootFirst(v.Delegations)
	slices.SortFunc(v.Grants, func(a, b broker.Grant) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
	return v, err
}

// Recent returns the grants of a backend that were created after a time, closed ones included. The time is exact to
// some milliseconds.
//
// Errors: Unavailable.
func (e *Engine) Recent(ctx context.Context, backend string, after time.Time) (list []broker.Grant, err error) {
	err = e.view(ctx, "recent", func(tx *records.Tx) (err error) {
		list, err = tx.RecentGrants(backend, after)
		return err
	})
	return list, err
}

// Revocation returns one revocation with its last recorded counts.
//
// Errors: NotFound with CodeRevocationUnknown, Unavailable.
func (e *Engine) Revocation(ctx context.Context, id broker.RevocationID) (rv broker.Revocation, err error) {
	err = e.view(ctx, "revocation", func(tx *records.Tx) error {
		var ok bool
		if rv, ok, err = tx.Revocation(id); err != nil || !ok {
			return orNotFound(err, records.UnknownRevocation("revocation"))
		}
		if rv.Grants >= 0 || rv.Freeze {
			rv.Grants = max(rv.Grants, 0)
			return nil
		}
		left, _, err := tx.Under(rv) // step 6 has not recorded counts yet
		if err != nil {
			return err
		}
		static, err := tx.StaticUnder(rv)
		closing.CountsOf(left, len(static)).Apply(&rv)
		return err
	})
	return rv, err
}

// Revocations lists all revocations and freezes, newest first.
func (e *Engine) Revocations(ctx context.Context) (list []broker.Revocation, err error) {
	err = e.view(ctx, "revocations", func(tx *records.Tx) error {
		list = nil
		return tx.EachRevocation(func(rv broker.Revocation) error {
			rv.Grants = max(rv.Grants, 0)
			list = append(list, rv)
			return nil
		})
	})
	slices.SortFunc(list, func(a, b broker.Revocation) int { return b.Fenced.Compare(a.Fenced) })
	return list, err
}

// Entries returns at most limit entries of the audit log after a revision, oldest first.
//
// Errors: Unavailable.
func (e *Engine) Entries(ctx context.Context, after broker.Revision, limit int) ([]broker.Entry, error) {
	list, err := e.cfg.Ledger.Entries(ctx, after, limit)
	if err != nil {
		return nil, broker.Errorf(broker.Unavailable, "audit", "the ledger cannot be read now").
			With(broker.CodeLedgerDown).Because(err)
	}
	return list, nil
}

// ChainEntries is [Engine.Entries] for one chain, without the intents and handles of its issues.
func (e *Engine) ChainEntries(ctx context.Context, id broker.ChainID, after broker.Revision, limit int,
) (list []broker.Entry, err error) {
	var revisions []broker.Revision
	err = e.view(ctx, "audit", func(tx *records.Tx) (err error) {
		revisions, err = tx.ChainRevisions(id, after, limit)
		return err
	})
	for _, r := range revisions {
		one, err := e.Entries(ctx, r-1, 1)
		if err != nil {
			return nil, err
		}
		list = append(list, one...)
	}
	return list, err
}
