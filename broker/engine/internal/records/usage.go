package records

import (
	"github.com/pawlsec/pawl/broker"
)

// Usage reads the usage of a delegation.
func (t *Tx) Usage(id broker.DelegationID) (Usage, error) {
	u, _, err := t.cache.usages.load(t, keyUsage(id))
	return u, err
}

// PutUsage writes the usage of a delegation.
func (t *Tx) PutUsage(id broker.DelegationID, u Usage) error {
	return t.cache.usages.save(t, keyUsage(id), u)
}

// GiveBack subtracts ended grants from the delegations' counts of live grants.
func (t *Tx) GiveBack(ended map[broker.DelegationID]int) error {
	for id, n := range ended {
		u, err := t.Usage(id)
		if err != nil {
			return err
		}
		u.Live = max(0, u.Live-n)
		if err := t.PutUsage(id, u); err != nil {
			return err
		}
	}
	return nil
}

// CountStep adds n to the steps of a grant in each delegation of its lineage, and of its caller in all chains: -1 when
// nothing was made for it, 1 when that turns out wrong. The limit per minute keeps the step: it bounds attempts, and renews itself.
func (t *Tx) CountStep(g broker.Grant, n int) error {
	l, err := t.Lineage("close", g.Delegation)
	if err != nil {
		return err
	}
	for _, d := range l.Nodes {
		u, err := t.Usage(d.ID)
		if err != nil {
			return err
		}
		u.addSteps(g.Tool, n, g.Created)
		if err := t.PutUsage(d.ID, u); err != nil {
			return err
		}
	}
	return t.changeCaller(g, n)
}

// changeCaller adds n to the records in which a grant's step was counted: -1 when nothing was made for it, 1 when that
// turns out wrong.
func (t *Tx) changeCaller(g broker.Grant, n int) error {
	return each(g.Counted, nil, func(key string) error {
		tally, ok, err := load[Tally](t, key)
		if err != nil || !ok {
			return err
		}
		return save(t, key, tally.Change(g.Created, n))
	})
}
