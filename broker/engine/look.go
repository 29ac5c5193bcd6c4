package engine

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"strconv"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Chains lists chains, newest first: those that may still do something, or all.
func (b *Engine) Chains(ctx context.Context, all bool) (list []broker.ChainSummary, err error) {
	now := b.cfg.Now()
	err = b.view(ctx, "chains", func(tx broker.Tx) error {
		list = nil
		var ids []broker.ChainID
		if err := tx.Scan("c/", "", func(key string, _ []byte) bool {
			ids = append(ids, broker.ChainID(key[2:]))
			return true
		}); err != nil {
			return err
		}
		for _, id := range ids {
			s, err := summary(tx, id)
			if err != nil {
				return err
			}
			root, _, err := load[broker.Delegation](tx, keyDelegation(s.Chain.Root))
			if err != nil {
				return err
			}
			if s.Fence = root.Fence; all || s.Live > 0 || s.Fence == nil && now.Before(root.Expires) {
				list = append(list, s)
			}
		}
		return nil
	})
	slices.SortFunc(list, func(a, b broker.ChainSummary) int { return b.Chain.Opened.Compare(a.Chain.Opened) })
	return list, err
}

func summary(tx broker.Tx, id broker.ChainID) (s broker.ChainSummary, err error) {
	if s.Chain, _, err = load[broker.Chain](tx, keyChain(id)); err != nil {
		return s, err
	}
	u, _, err := load[Usage](tx, keyUsage(s.Chain.Root))
	s.Live, s.Steps = u.Live, u.Steps
	if err != nil {
		return s, err
	}
	return s, eachMember(tx, id, func(broker.DelegationID) error { s.Delegations++; return nil })
}

// Chain gives one chain whole.
//
// Errors: NotFound, Unavailable.
func (b *Engine) Chain(ctx context.Context, id broker.ChainID) (v broker.ChainView, err error) {
	err = b.view(ctx, "chain", func(tx broker.Tx) error {
		v = broker.ChainView{}
		var ok bool
		if v.Chain, ok, err = load[broker.Chain](tx, keyChain(id)); err != nil {
			return err
		}
		if !ok {
			return broker.Errorf(broker.NotFound, "chain", "there is no chain %s", id)
		}
		if err := eachMember(tx, id, func(d broker.DelegationID) error {
			node, _, err := load[broker.Delegation](tx, keyDelegation(d))
			v.Delegations = append(v.Delegations, node)
			return err
		}); err != nil {
			return err
		}
		add := func(g broker.Grant) error { v.Grants = append(v.Grants, g); return nil }
		if err := eachLive(tx, id, add); err != nil {
			return err
		}
		return eachPast(tx, id, add)
	})
	rootFirst(v.Delegations)
	slices.SortFunc(v.Grants, func(a, b broker.Grant) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
	return v, err
}

// Recent gives the grants of a backend that were made after a time, to some milliseconds, those that
// are over too.
//
// Errors: Unavailable.
func (b *Engine) Recent(ctx context.Context, backend string, after time.Time) (list []broker.Grant, err error) {
	err = b.view(ctx, "recent", func(tx broker.Tx) error {
		list = nil
		var bad error
		err := tx.Scan("g/", keyGrant(broker.GrantID("gr"+broker.IDTime(after))), func(_ string, raw []byte) bool {
			var g broker.Grant
			if bad = json.Unmarshal(raw, &g); bad == nil && g.Backend == backend {
				list = append(list, g)
			}
			return bad == nil
		})
		return cmp.Or(bad, err)
	})
	return list, err
}

// rootFirst orders delegations so that each comes after its parent, siblings by age.
func rootFirst(nodes []broker.Delegation) {
	slices.SortFunc(nodes, func(a, b broker.Delegation) int {
		return cmp.Or(cmp.Compare(b.Depth, a.Depth), a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
}

func eachPast(tx broker.Tx, chain broker.ChainID, f func(broker.Grant) error) error {
	prefix := "p/" + string(chain) + "/"
	var ids []broker.GrantID
	if err := tx.Scan(prefix, "", func(key string, _ []byte) bool {
		ids = append(ids, broker.GrantID(key[len(prefix):]))
		return true
	}); err != nil {
		return err
	}
	for _, id := range ids {
		g, _, err := load[broker.Grant](tx, keyGrant(id))
		if err != nil {
			return err
		}
		if err := f(g); err != nil {
			return err
		}
	}
	return nil
}

// Revocation gives one revocation with its counts as last recorded.
//
// Errors: NotFound with CodeRevocationUnknown, Unavailable.
func (b *Engine) Revocation(ctx context.Context, id broker.RevocationID) (rv broker.Revocation, err error) {
	err = b.view(ctx, "revocation", func(tx broker.Tx) error {
		var ok bool
		if rv, ok, err = load[broker.Revocation](tx, keyRevocation(id)); err != nil || !ok {
			return orUnknownRevocation("revocation", err)
		}
		if rv.Grants >= 0 || rv.Freeze {
			rv.Grants = max(rv.Grants, 0)
			return nil
		}
		left, _, err := b.under(tx, rv) // fenced just now, and not counted yet
		if err != nil {
			return err
		}
		static, err := b.worksOn(tx, rv)
		recount(&rv, found{left: left, static: len(static), total: len(left) + len(static)})
		return err
	})
	return rv, err
}

// Revocations lists all revocations and freezes, newest first.
func (b *Engine) Revocations(ctx context.Context) (list []broker.Revocation, err error) {
	err = b.view(ctx, "revocations", func(tx broker.Tx) error {
		list = nil
		return eachRevocation(tx, func(rv broker.Revocation) error {
			rv.Grants = max(rv.Grants, 0)
			list = append(list, rv)
			return nil
		})
	})
	slices.SortFunc(list, func(a, b broker.Revocation) int { return b.Fenced.Compare(a.Fenced) })
	return list, err
}

// Entries gives at most limit entries of the audit log after a revision, oldest first.
//
// Errors: Unavailable.
func (b *Engine) Entries(ctx context.Context, after broker.Revision, limit int) ([]broker.Entry, error) {
	list, err := b.cfg.Ledger.Entries(ctx, after, limit)
	if err != nil {
		return nil, broker.Errorf(broker.Unavailable, "audit", "the ledger cannot be read now").With(broker.CodeLedgerDown).Because(err)
	}
	return list, nil
}

// ChainEntries is [Broker.Entries] for one chain, without the inner steps of its issues: intent and
// handle.
func (b *Engine) ChainEntries(ctx context.Context, id broker.ChainID, after broker.Revision, limit int) (list []broker.Entry, err error) {
	var revisions []broker.Revision
	prefix := keyEvent(id, 0)[:len("e/")+broker.IDLength+1]
	err = b.view(ctx, "audit", func(tx broker.Tx) error {
		revisions = nil
		var bad error
		scanErr := tx.Scan(prefix, keyEvent(id, after), func(key string, _ []byte) bool {
			var n uint64
			n, bad = strconv.ParseUint(key[len(prefix):], 16, 64)
			revisions = append(revisions, broker.Revision(n))
			return bad == nil && len(revisions) < limit
		})
		return cmp.Or(bad, scanErr)
	})
	for _, r := range revisions {
		one, err := b.Entries(ctx, r-1, 1)
		if err != nil {
			return nil, err
		}
		list = append(list, one...)
	}
	return list, err
}
