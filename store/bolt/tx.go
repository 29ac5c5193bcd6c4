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
	errReadOnly = errors.New("a view cannot change the ledger")
	errKey      = fmt.Errorf("a key must have 1 to %d bytes", bbolt.MaxKeySize)
)

// tx implements broker.Tx on a bbolt transaction. The changes of the running function stay in puts until the function
// has succeeded.
type tx struct {
	records, log *bbolt.Bucket
	readOnly     bool
	view         *bbolt.Tx // set only if readOnly

	head    head              // includes every function applied so far
	next    head              // also includes the entries of the running function
	puts    map[string][]byte // in stored form; nil: deleted
	entries [][]byte          // in stored form, from head.revision+1 on
	reserve bool              // one of the entries may use the reserve
}

// reset discards the changes of a function that failed.
func (t *tx) reset() {
	clear(t.puts)
	t.next, t.entries, t.reserve = t.head, t.entries[:0], false
}

// Get implements broker.Tx.
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

// Put implements broker.Tx. It stores a copy of value.
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

// Scan implements broker.Tx. It visits the records as they were when it began.
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

// ScanBack implements broker.Tx. It visits the records as they were when it began.
func (t *tx) ScanBack(prefix, before string, f func(key string, value []byte) bool) error {
	put := t.putKeys(prefix, prefix)
	if before != "" {
		n, _ := slices.BinarySearch(put, before)
		put = put[:n]
	}
	c := t.records.Cursor()
	k, v := seekBefore(c, prefix, before)
	for {
		if !bytes.HasPrefix(k, []byte(prefix)) {
			k = nil
		}
		if k == nil && len(put) == 0 {
			return nil
		}
		if last := len(put) - 1; last >= 0 && (k == nil || put[last] >= string(k)) {
			key := put[last]
			put = put[:last]
			if key == string(k) {
				k, v = c.Prev()
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
		k, v = c.Prev()
	}
}

// seekBefore moves to the last record before a key, or to the last one with the prefix when the key is empty.
func seekBefore(c *bbolt.Cursor, prefix, before string) (k, v []byte) {
	at := []byte(before)
	if before == "" || before > prefix && !strings.HasPrefix(before, prefix) {
		at = afterAll(prefix)
	}
	if at == nil {
		return c.Last()
	}
	if k, _ = c.Seek(at); k == nil {
		return c.Last()
	}
	return c.Prev()
}

// afterAll returns the first key after all keys with a prefix; nil: there is none.
func afterAll(prefix string) []byte {
	end := []byte(prefix)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i] < 0xff {
			end[i]++
			return end[:i+1]
		}
	}
	return nil
}

// putKeys returns the keys that the running function has put, in order.
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

// Append implements broker.Tx.
func (t *tx) Append(e broker.Entry) (broker.Revision, error) {
	if t.readOnly {
		return 0, errReadOnly
	}
	stored, err := t.next.chain(&e)
	if err != nil {
		return 0, err
	}
	t.entries = append(t.entries, stored)
	t.reserve = t.reserve || mayUseReserve(e.Op)
	return e.Revision, nil
}

// Head implements broker.Tx.
func (t *tx) Head() (broker.Revision, error) {
	if !t.readOnly {
		return t.next.revision, nil
	}
	h, err := readHead(t.view)
	return h.revision, err
}

// apply writes the changes of the running function to the bbolt transaction.
func (t *tx) apply() error {
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
