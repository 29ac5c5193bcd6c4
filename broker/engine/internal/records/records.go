// Package records is the ledger in the product's terms: its keys, the encoding of its records, its scans, the lineage of a
// delegation, and the fences over it.
package records

import (
	"github.com/pawlsec/pawl/broker"
)

// Cache keeps decoded records beside the bytes they were decoded from. The ledger is read every time; a record that has
// not changed is not decoded again. The zero Cache is empty. It is safe for concurrent use.
type Cache struct {
	delegations decoded[broker.Delegation]
	chains      decoded[broker.Chain]
	usages      decoded[Usage]
	rules       ruleCache
}

// Tx is one transaction of the ledger. What it gives may be shared and must not be changed in place. Like the
// transaction itself it is used by one goroutine, and not after the transaction has ended.
type Tx struct {
	tx    broker.Tx
	cache *Cache

	// Lineages and rules that this transaction has read. A thousand grants of one delegation have one lineage.
	lineages  map[broker.DelegationID]Lineage
	rules     []Rule
	rulesRead bool // rules were read
}

// In gives the transaction tx with the cache's help.
func (c *Cache) In(tx broker.Tx) *Tx { return &Tx{tx: tx, cache: c} }

// Head is the revision of the last entry that the transaction sees.
func (t *Tx) Head() (broker.Revision, error) { return t.tx.Head() }

// Enter appends an entry and lists its revision under its chain, where reports read it. The inner steps of an issue are
// not listed, since its end says more.
func (t *Tx) Enter(e broker.Entry) (broker.Revision, error) {
	rev, err := t.tx.Append(e)
	if err != nil || e.Chain == "" || e.Op == broker.OpIntent || e.Op == broker.OpHandle {
		return rev, err
	}
	return rev, t.mark(keyEvent(e.Chain, rev))
}

// mark puts a record without content: its key says all.
func (t *Tx) mark(key string) error { return t.tx.Put(key, []byte{}) }

func (t *Tx) drop(key string) error { return t.tx.Put(key, nil) }

func (t *Tx) has(key string) (bool, error) {
	raw, err := t.tx.Get(key)
	return raw != nil, err
}

// ids collects the last id in each key that has the prefix and is greater than after. It is complete before it is used,
// because a scan must not run while the transaction reads or writes other records.
func ids[T ~string](t *Tx, prefix, after string) (list []T, err error) {
	err = t.tx.Scan(prefix, after, func(key string, _ []byte) bool {
		list = append(list, T(key[len(key)-broker.IDLength:]))
		return true
	})
	return list, err
}

// each calls f with each of the ids until it fails.
func each[T any](list []T, err error, f func(T) error) error {
	if err != nil {
		return err
	}
	for _, id := range list {
		if err := f(id); err != nil {
			return err
		}
	}
	return nil
}
