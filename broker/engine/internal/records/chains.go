package records

import (
	"cmp"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Chain reads a chain.
func (t *Tx) Chain(id broker.ChainID) (broker.Chain, bool, error) {
	return t.cache.chains.load(t, keyChain(id))
}

// AddChain writes a new chain.
func (t *Tx) AddChain(c broker.Chain) error { return save(t, keyChain(c.ID), c) }

// Delegation reads a delegation.
func (t *Tx) Delegation(id broker.DelegationID) (broker.Delegation, bool, error) {
	return t.cache.delegations.load(t, keyDelegation(id))
}

// PutDelegation writes a delegation.
func (t *Tx) PutDelegation(d broker.Delegation) error {
	clear(t.lineages)
	return save(t, keyDelegation(d.ID), d)
}

// AddDelegation writes a new delegation and its entry.
func (t *Tx) AddDelegation(d broker.Delegation, e broker.Entry) error {
	e.Chain, e.Delegation = d.Chain, d.ID
	if err := t.PutDelegation(d); err != nil {
		return err
	}
	if err := t.mark(keyMember(d.Chain, d.ID)); err != nil {
		return err
	}
	if err := t.indexHolder(d); err != nil {
		return err
	}
	if d.Heartbeat > 0 {
		if err := t.mark(keyHeartbeat(d.ID)); err != nil {
			return err
		}
	}
	_, err := t.Enter(e)
	return err
}

// EachChain calls f with each chain.
func (t *Tx) EachChain(f func(broker.Chain) error) error {
	list, err := ids[broker.ChainID](t, prefixChain, "")
	return each(list, err, func(id broker.ChainID) error {
		c, _, err := t.Chain(id)
		if err != nil {
			return err
		}
		return f(c)
	})
}

// EachMember calls f with each delegation of the chain.
func (t *Tx) EachMember(chain broker.ChainID, f func(broker.DelegationID) error) error {
	list, err := ids[broker.DelegationID](t, inChain(prefixMember, chain), "")
	return each(list, err, f)
}

// EachRecent calls f with each delegation of the chains. Of all chains it leaves out most of the expired delegations: a
// chain lives at most MaxChainTTL and its id begins with its time, so the scan skips the older ones.
func (t *Tx) EachRecent(chains []broker.ChainID, now time.Time, f func(broker.DelegationID) error) error {
	return each(chains, nil, func(chain broker.ChainID) error {
		after := ""
		if chain == "" {
			after = prefixMember + "ch" + broker.IDTime(now.Add(-broker.MaxChainTTL))
		}
		list, err := ids[broker.DelegationID](t, inChain(prefixMember, chain), after)
		return each(list, err, f)
	})
}

// RootFirst orders delegations so that each comes after its parent, siblings by age.
func RootFirst(nodes []broker.Delegation) {
	slices.SortFunc(nodes, func(a, b broker.Delegation) int {
		return cmp.Or(cmp.Compare(b.Depth, a.Depth), a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
}

// EachHeartbeat calls f with each delegation on the list of those with a heartbeat.
func (t *Tx) EachHeartbeat(f func(broker.DelegationID) error) error {
	list, err := ids[broker.DelegationID](t, prefixHeartbeat, "")
	return each(list, err, f)
}

// DropHeartbeat takes a delegation off that list.
func (t *Tx) DropHeartbeat(id broker.DelegationID) error { return t.drop(keyHeartbeat(id)) }
