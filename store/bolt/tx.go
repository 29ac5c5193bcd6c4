package bolt

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker"
)

var (
	errReadOnly = errors.New("a view changes nothing")
	errKey      = fmt.Errorf("a key has 1 to %d bytes", bbolt.MaxKeySize)
)

// tx is broker.Tx over a bbolt transaction. What the running function puts stays in puts until
// the function has succeeded.
type tx struct {
	records, log *bbolt.Bucket
	readOnly     bool
	view         *bbolt.Tx // of a read-only one

	head    head              // with everything kept so far
	next    head              // with what the running function appended
	puts    map[string][]byte // as stored; nil: deleted
	entries [][]byte          // as stored, from head.revision+1 on
	ending  bool              // one of entries ends something
}

// begin forgets what the function before put and did not keep.
func (t *tx) begin() {
	clear(t.puts)
	t.next, t.entries, t.ending = t.head, t.entries[:0], false
}

// Get is broker.Tx's.
func (t *tx) Get(key string) ([]byte, error) {
	if stored, ok := t.puts[key]; ok {
		return value(stored), nil
	}
	stored := t.records.Get([]byte(key))
	if stored == nil {
		return nil, nil
	}
	return open(key, stored)
}

// Put is broker.Tx's. It keeps a copy of value.
func (t *tx) Put(key string, value []byte) error {
	switch {
	case t.readOnly:
		return errReadOnly
	case key == "" || len(key) > bbolt.MaxKeySize:
		return errKey
	case t.puts == nil:
		t.puts = map[string][]byte{}
	}
	if value == nil {
		t.puts[key] = nil
		return nil
	}
	t.puts[key] = seal(key, value)
	return nil
}

// Scan is broker.Tx's. It gives what was put before it began.
func (t *tx) Scan(prefix, after string, f func(key string, value []byte) bool) error {
	from := prefix
	if after >= prefix {
		from = after + "\x00"
	}
	put := t.putKeys(prefix, from)
	c := t.records.Cursor()
	k, v := c.Seek([]byte(from))
	for {
		if !bytes.HasPrefix(k, []byte(prefix)) {
			k = nil
		}
		if k == nil && len(put) == 0 {
			return nil
		}
		if len(put) > 0 && (k == nil || put[0] <= string(k)) {
			key := put[0]
			put = put[1:]
			if key == string(k) {
				k, v = c.Next()
			}
			if stored := t.puts[key]; stored != nil && !f(key, value(stored)) {
				return nil
			}
			continue
		}
		key := string(k)
		val, err := open(key, v)
		if err != nil {
			return err
		}
		if !f(key, val) {
			return nil
		}
		k, v = c.Next()
	}
}

// putKeys gives the keys that the running function put, in order.
func (t *tx) putKeys(prefix, from string) []string {
	var keys []string
	for key := range t.puts {
		if key >= from && strings.HasPrefix(key, prefix) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// Append is broker.Tx's.
func (t *tx) Append(e broker.Entry) (broker.Revision, error) {
	if t.readOnly {
		return 0, errReadOnly
	}
	stored, err := t.next.chain(&e)
	if err != nil {
		return 0, err
	}
	t.entries = append(t.entries, stored)
	t.ending = t.ending || ends(e.Op)
	return e.Revision, nil
}

// Head is broker.Tx's.
func (t *tx) Head() (broker.Revision, error) {
	if !t.readOnly {
		return t.next.revision, nil
	}
	h, err := readHead(t.view)
	return h.revision, err
}

// keep moves what the running function did into the bbolt transaction.
func (t *tx) keep() error {
	for key, stored := range t.puts {
		k := []byte(key)
		if old := t.records.Get(k); old != nil {
			t.next.remove(old)
		}
		if stored == nil {
			if err := t.records.Delete(k); err != nil {
				return err
			}
			continue
		}
		if err := t.records.Put(k, stored); err != nil {
			return err
		}
		t.next.add(stored)
	}
	for i, stored := range t.entries {
		if err := t.log.Put(logKey(t.head.revision+broker.Revision(i)+1), stored); err != nil {
			return err
		}
	}
	t.head = t.next
	return nil
}
