package records

import "github.com/pawlsec/pawl/broker"

// A token that is made ahead is recorded as the grant of the step that may take it: a grant without a state, in a family
// of its own. Created is when it was made, and Expires its end.

// PutAhead records a token that was made ahead.
func (t *Tx) PutAhead(g broker.Grant) error { return save(t, keyAhead(g.Chain, g.ID), g) }

// DropAhead drops the record of a token that was made ahead. It need not exist.
func (t *Tx) DropAhead(g broker.Grant) error { return t.drop(keyAhead(g.Chain, g.ID)) }

// EachAhead calls f with each token of the chains that was made ahead and is neither taken nor ended. An empty chain
// stands for all chains.
func (t *Tx) EachAhead(chains []broker.ChainID, f func(broker.Grant) error) error {
	return each(chains, nil, func(chain broker.ChainID) error {
		var keys []string
		err := t.tx.Scan(inChain(prefixAhead, chain), "", func(key string, _ []byte) bool {
			keys = append(keys, key)
			return true
		})
		return each(keys, err, func(key string) error {
			g, ok, err := load[broker.Grant](t, key)
			if err != nil || !ok {
				return err
			}
			return f(g)
		})
	})
}

// AheadUnder lists the tokens that were made ahead and that a revocation covers, as the steps that would take them.
func (t *Tx) AheadUnder(rv broker.Revocation) (list []broker.Grant, err error) {
	covers, err := Covering(rv)
	if err != nil || rv.Grant != "" {
		return nil, err
	}
	places, err := t.Places(rv, rv.Fenced, nil)
	if err != nil {
		return nil, err
	}
	err = t.EachAhead(places, t.ifCovered(covers, func(g broker.Grant) { list = append(list, g) }))
	return list, err
}
