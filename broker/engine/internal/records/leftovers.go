package records

import "github.com/pawlsec/pawl/broker"

// MarkLeftover lists a closed grant of which Vault has still to remove the lease.
func (t *Tx) MarkLeftover(g broker.Grant) error { return t.mark(keyLeftover(g.Chain, g.ID)) }

// DropLeftover takes a grant off the list of leases that Vault has still to remove. was is false if it is not listed.
func (t *Tx) DropLeftover(c broker.ChainID, id broker.GrantID) (was bool, err error) {
	if was, err = t.HasLeftover(c, id); err != nil || !was {
		return false, err
	}
	return true, t.drop(keyLeftover(c, id))
}

// HasLeftover reports whether Vault has still to remove the lease of a closed grant.
func (t *Tx) HasLeftover(c broker.ChainID, id broker.GrantID) (bool, error) {
	return t.has(keyLeftover(c, id))
}

// EachLeftover calls f with each closed grant of the chains of which Vault has still to remove the lease. An empty chain
// stands for all chains.
func (t *Tx) EachLeftover(chains []broker.ChainID, f func(broker.Grant) error) error {
	return eachGrant(t, prefixLeftover, chains, f)
}

// LeftoversUnder lists the closed grants that a revocation covers and of which Vault has still to remove the lease.
func (t *Tx) LeftoversUnder(rv broker.Revocation) (list []broker.Grant, err error) {
	covers, err := Covering(rv)
	if err != nil {
		return nil, err
	}
	places, err := t.Places(rv, rv.Fenced, nil)
	if err != nil {
		return nil, err
	}
	err = t.EachLeftover(places, t.ifCovered(covers, func(g broker.Grant) { list = append(list, g) }))
	return list, err
}
