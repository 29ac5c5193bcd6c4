// Package records reads and writes the ledger in the product's terms. It has the keys, the encoding of records, the
// scans, the lineage of a delegation, and the fences over it.
package records

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// Cache keeps decoded records with their bytes. Every read goes to the ledger, but a record with unchanged bytes is not
// decoded again. The zero Cache is empty. It is safe for concurrent use.
type Cache struct {
	delegations decoded[broker.Delegation]
	chains      decoded[broker.Chain]
	usages      decoded[Usage]
	rules       ruleCache

	indexed atomic.Uint64 // one more than the revision from which on the index lists all that it must; 0: it does not yet
}

// Tx is one transaction of the ledger. The records that it returns may be shared and must not be changed in place. One
// goroutine uses it, and not after the transaction has ended.
type Tx struct {
	tx    broker.Tx
	cache *Cache

	// The lineages and rules that this transaction has read. A thousand grants of one delegation share one lineage.
	lineages  map[broker.DelegationID]Lineage
	rules     []Rule
	rulesRead bool // rules were read
}

// In returns tx as a Tx that uses the cache.
func (c *Cache) In(tx broker.Tx) *Tx { return &Tx{tx: tx, cache: c} }

// Head returns the revision of the last entry that the transaction sees.
func (t *Tx) Head() (broker.Revision, error) { return t.tx.Head() }

// Enter appends an entry to the audit log and lists its revision by chain, for reports. It does not list the intent and
// the handle of an issue, nor a token that was made ahead for it, since later entries of the issue tell more.
func (t *Tx) Enter(e broker.Entry) (broker.Revision, error) {
	rev, err := t.tx.Append(e)
	if err != nil || e.Chain == "" || e.Op == broker.OpIntent || e.Op == broker.OpHandle ||
		e.Op == broker.OpToken && e.Grant != "" {
		return rev, err
	}
	return rev, t.mark(keyEvent(e.Chain, rev))
}

// mark writes a record without content. Its key is the fact.
func (t *Tx) mark(key string) error { return t.tx.Put(key, []byte{}) }

func (t *Tx) drop(key string) error { return t.tx.Put(key, nil) }

func (t *Tx) has(key string) (bool, error) {
	raw, err := t.tx.Get(key)
	return raw != nil, err
}

// ids collects the last id of each key that has the prefix and is greater than after. It ends its scan before the
// caller uses the ids: during a scan the transaction must not read or write other records.
func ids[T ~string](t *Tx, prefix, after string) (list []T, err error) {
	err = t.tx.Scan(prefix, after, func(key string, _ []byte) bool {
		list = append(list, T(key[len(key)-broker.IDLength:]))
		return true
	})
	return list, err
}

// each calls f with each id, until f fails.
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

// ruleCache keeps parsed rules. Every transaction reads the list of rules from the ledger.
type ruleCache struct {
	mu     sync.Mutex // guards parsed
	parsed map[string]Rule
}

// maxParsed bounds the parsed rules. At the bound all of them are dropped.
const maxParsed = 1024

func (c *ruleCache) read(t *Tx) (rules []Rule, err error) {
	scanErr := t.tx.Scan(prefixRule, "", func(key string, raw []byte) bool {
		var r Rule
		if r, err = c.parse(key, raw); err == nil {
			rules = append(rules, r)
		}
		return err == nil
	})
	if err == nil {
		err = scanErr
	}
	return rules, err
}

func (c *ruleCache) parse(key string, raw []byte) (r Rule, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r, ok := c.parsed[string(raw)]; ok {
		return r, nil
	}
	if err := decode(key, raw, &r); err != nil {
		return Rule{}, err
	}
	if r.parsed, err = selector.ParseRecorded(r.Selector); err != nil {
		return Rule{}, fmt.Errorf("rule %q: %w", key, err)
	}
	if len(c.parsed) > maxParsed || c.parsed == nil {
		c.parsed = map[string]Rule{}
	}
	c.parsed[string(raw)] = r
	return r, nil
}

// EnterAll is Enter for several entries.
func (t *Tx) EnterAll(entries []broker.Entry) error {
	for _, e := range entries {
		if _, err := t.Enter(e); err != nil {
			return err
		}
	}
	return nil
}
