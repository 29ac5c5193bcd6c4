package records

import (
	"cmp"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// Revocation reads a revocation.
func (t *Tx) Revocation(id broker.RevocationID) (broker.Revocation, bool, error) {
	return load[broker.Revocation](t, keyRevocation(id))
}

// PutRevocation writes a revocation.
func (t *Tx) PutRevocation(rv broker.Revocation) error { return save(t, keyRevocation(rv.ID), rv) }

// EachRevocation calls f with each revocation and freeze.
func (t *Tx) EachRevocation(f func(broker.Revocation) error) error {
	list, err := ids[broker.RevocationID](t, prefixRevocation, "")
	return each(list, err, func(id broker.RevocationID) error {
		rv, ok, err := t.Revocation(id)
		if err != nil || !ok {
			return err
		}
		return f(rv)
	})
}

// Covers reports whether a revocation covers a delegation, or the subject if that has a grant.
type Covers func(Lineage, selector.Subject) bool

// Covering returns the revocation's test. See [selector.Covering].
func Covering(rv broker.Revocation) (Covers, error) {
	covers, err := selector.Covering(rv)
	return func(l Lineage, s selector.Subject) bool { return covers(l.place(s)) }, err
}

// Under lists the grants that a revocation covers and that are not closed, and the covered delegations with Vault
// tokens, ancestors before their descendants.
func (t *Tx) Under(rv broker.Revocation) (grants []broker.Grant, nodes []broker.Delegation, err error) {
	covers, err := Covering(rv)
	if err != nil {
		return nil, nil, err
	}
	places, err := t.Places(rv, rv.Fenced, nil)
	if err != nil {
		return nil, nil, err
	}
	err = t.EachLive(places, t.ifCovered(covers, func(g broker.Grant) { grants = append(grants, g) }))
	if err != nil || rv.Grant != "" {
		return grants, nil, err
	}
	err = t.EachRecent(places, rv.Fenced, func(id broker.DelegationID) error {
		l, err := t.Lineage("revoke", id)
		if err == nil && len(l.Leaf().Tokens) > 0 && covers(l, noGrant) {
			nodes = append(nodes, l.Leaf())
		}
		return err
	})
	RootFirst(nodes)
	return grants, nodes, err
}

// StaticUnder lists the closed grants that a revocation covers and that have a static secret that still works.
func (t *Tx) StaticUnder(rv broker.Revocation) (list []broker.GrantID, err error) {
	covers, err := Covering(rv)
	if err != nil {
		return nil, err
	}
	places, err := t.Places(rv, rv.Fenced, nil)
	if err != nil {
		return nil, err
	}
	err = t.EachStatic(places, t.ifCovered(covers, func(g broker.Grant) { list = append(list, g.ID) }))
	return list, err
}

// ifCovered returns a function that calls f with a grant if the grant is covered.
func (t *Tx) ifCovered(covers Covers, f func(broker.Grant)) func(broker.Grant) error {
	return func(g broker.Grant) error {
		l, err := t.Lineage("revoke", g.Delegation)
		if err == nil && covers(l, l.Subject(g)) {
			f(g)
		}
		return err
	}
}

// ExpectedHolders lists the holders that must acknowledge a revocation. They hold the delegations that it covers, that
// were open at the fence, and that no earlier final fence covers. It runs after the fence, so that the fence's
// transaction costs the same for a tree of any size.
func (t *Tx) ExpectedHolders(rv broker.Revocation, now time.Time) (holders []broker.Acknowledgement, err error) {
	if rv.Freeze || rv.Grant != "" {
		return nil, nil
	}
	covers, err := Covering(rv)
	if err != nil {
		return nil, err
	}
	places := []broker.ChainID{rv.Chain}
	if now.Sub(rv.Fenced) < keepEnded { // the index has the chains that were open at the fence
		if places, err = t.Places(rv, rv.Fenced, nil); err != nil {
			return nil, err
		}
	}
	var open []broker.Delegation
	later := broker.DelegationID("dl" + broker.IDTime(rv.Fenced.Add(time.Minute))) // an id is drawn at Created, or just after
	err = t.EachRecent(places, rv.Fenced, func(id broker.DelegationID) error {
		if id > later {
			return nil
		}
		l, err := t.Lineage("revocation", id)
		if err != nil || l.Leaf().Created.After(rv.Fenced) || !covers(l, noGrant) || l.Expired(rv.Fenced) {
			return err
		}
		before, err := t.FinalFences(l)
		if err == nil && !slices.ContainsFunc(before, func(f broker.Fence) bool { return f.Generation < rv.Revision }) {
			open = append(open, l.Leaf())
		}
		return err
	})
	RootFirst(open)
	for _, d := range open {
		holders = append(holders, broker.Acknowledgement{Chain: d.Chain, Delegation: d.ID, Holder: d.Holder})
	}
	return holders, err
}

// Acknowledge records that a delegation's holder has acknowledged a revocation. first is false when the ledger had the
// acknowledgement already.
func (t *Tx) Acknowledge(rv broker.RevocationID, d broker.DelegationID, now time.Time) (first bool, err error) {
	key := keyAcknowledged(rv, d)
	if known, err := t.has(key); err != nil || known {
		return false, err
	}
	return true, save(t, key, acknowledged{At: now})
}

// Acknowledgements returns the times at which the holders of delegations acknowledged a revocation.
func (t *Tx) Acknowledgements(rv broker.RevocationID) (map[broker.DelegationID]time.Time, error) {
	at := map[broker.DelegationID]time.Time{}
	var err error
	scanErr := t.tx.Scan(keyAcknowledged(rv, ""), "", func(key string, raw []byte) bool {
		var a acknowledged
		err = decode(key, raw, &a)
		at[broker.DelegationID(key[len(key)-broker.IDLength:])] = a.At
		return err == nil
	})
	return at, cmp.Or(err, scanErr)
}
