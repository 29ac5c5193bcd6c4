package engine

import (
	"context"
	"errors"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Chains lists chains, the newest first: all, or those that are open or have live grants. The next page begins after
// next; empty: there is none. A page may have fewer than its limit before the last.
//
// Errors: Unavailable.
func (e *Engine) Chains(ctx context.Context, all bool, p broker.Page,
) (list []broker.ChainSummary, next string, err error) {
	read := e.view // a chain that is open is not archived
	if all && !p.Recent {
		read = e.past.History
	}
	err = read(ctx, "chains", func(tx *records.Tx) (err error) {
		list, next, err = tx.Chains(all, e.cfg.Now(), p)
		return err
	})
	return list, next, err
}

// Chain returns a part of one chain: at most p.Limit of its delegations, and after them of its grants.
//
// Errors: NotFound, Unavailable.
func (e *Engine) Chain(ctx context.Context, id broker.ChainID, p broker.Page) (v broker.ChainView, err error) {
	err = e.past.Find(ctx, "chain", func(tx *records.Tx) (err error) {
		v, err = tx.ChainView(id, p)
		return err
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
	err = e.past.Find(ctx, "revocation", func(tx *records.Tx) error {
		var ok bool
		if rv, ok, err = tx.Revocation(id); err != nil || !ok {
			return orNotFound(err, records.UnknownRevocation("revocation"))
		}
		if !rv.Uncounted || rv.Freeze {
			return nil
		}
		left, _, err := tx.Under(rv) // step 6 has not recorded counts yet
		if err != nil {
			return err
		}
		static, err := tx.StaticUnder(rv)
		if err != nil {
			return err
		}
		leftovers, err := tx.LeftoversUnder(rv)
		closing.CountsOf(left, len(static), len(leftovers)).Apply(&rv)
		return err
	})
	return rv, err
}

// Revocations lists revocations and freezes, the newest first, in pages as [Engine.Chains].
//
// Errors: Unavailable.
func (e *Engine) Revocations(ctx context.Context, p broker.Page,
) (list []broker.Revocation, next string, err error) {
	read := e.past.History
	if p.Recent {
		read = e.view
	}
	err = read(ctx, "revocations", func(tx *records.Tx) (err error) {
		list, next, err = tx.Revocations(p)
		return err
	})
	return list, next, err
}

// Entries returns at most limit entries of the audit log after a revision, oldest first.
//
// Errors: Unavailable.
func (e *Engine) Entries(ctx context.Context, after broker.Revision, limit int) ([]broker.Entry, error) {
	list, err := e.cfg.Ledger.Entries(ctx, after, limit)
	var refusal *broker.Error
	if errors.As(err, &refusal) { // of the archive
		return nil, refusal
	}
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
	err = e.past.Find(ctx, "audit", func(tx *records.Tx) (err error) {
		if _, ok, err := tx.Chain(id); err != nil || !ok {
			return orNotFound(err, records.UnknownChain("audit", id))
		}
		revisions, err = tx.ChainRevisions(id, after, limit)
		return err
	})
	if broker.KindOf(err) == broker.NotFound {
		return nil, nil
	}
	for _, r := range revisions {
		one, err := e.Entries(ctx, r-1, 1)
		if err != nil {
			return nil, err
		}
		list = append(list, one...)
	}
	return list, err
}
