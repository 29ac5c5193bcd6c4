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
