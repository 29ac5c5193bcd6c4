package records

import (
	"cmp"
	"strconv"

	"github.com/pawlsec/pawl/broker"
)

// Canary reads the canary of a value.
func (t *Tx) Canary(value broker.ValueDigest) (broker.Canary, bool, error) {
	return load[broker.Canary](t, keyCanary(value))
}

// PutCanary writes the canary of a value.
func (t *Tx) PutCanary(value broker.ValueDigest, c broker.Canary) error {
	return save(t, keyCanary(value), c)
}

// DropCanary deletes the canary of a value.
func (t *Tx) DropCanary(value broker.ValueDigest) error { return t.drop(keyCanary(value)) }

// EachCanary calls f with each canary and its value's digest.
func (t *Tx) EachCanary(f func(broker.ValueDigest, broker.Canary)) (err error) {
	scanErr := t.tx.Scan(prefixCanary, "", func(key string, raw []byte) bool {
		var c broker.Canary
		if err = decode(key, raw, &c); err == nil {
			f(broker.ValueDigest(key[len(prefixCanary):]), c)
		}
		return err == nil
	})
	return cmp.Or(err, scanErr)
}

// Bundle reads the last policy bundle in force; ok is false when there was none.
func (t *Tx) Bundle() (b Bundle, ok bool, err error) { return load[Bundle](t, keyBundle) }

// PutBundle records the policy bundle in force.
func (t *Tx) PutBundle(b Bundle) error { return save(t, keyBundle, b) }

// Cursor reads a subscriber's delivery cursor; ok is false for a new subscriber.
func (t *Tx) Cursor(subscriber string) (at broker.Revision, ok bool, err error) {
	c, ok, err := load[cursor](t, keyCursor(subscriber))
	return c.Revision, ok, err
}

// PutCursor writes a subscriber's delivery cursor.
func (t *Tx) PutCursor(subscriber string, at broker.Revision) error {
	return save(t, keyCursor(subscriber), cursor{at})
}

// ChainRevisions returns the revisions of at most limit listed entries of a chain after a revision, oldest first.
func (t *Tx) ChainRevisions(id broker.ChainID, after broker.Revision, limit int) (list []broker.Revision, err error) {
	prefix := keyEvent(id, 0)[:len("e/")+broker.IDLength+1]
	scanErr := t.tx.Scan(prefix, keyEvent(id, after), func(key string, _ []byte) bool {
		var n uint64
		n, err = strconv.ParseUint(key[len(prefix):], 16, 64)
		list = append(list, broker.Revision(n))
		return err == nil && len(list) < limit
	})
	return list, cmp.Or(err, scanErr)
}
