package bolt

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"strings"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/store/bolt/internal/journal"
)

var (
	errReadOnly = errors.New("a view cannot change the ledger")
	errTrim     = errors.New("the log is only trimmed in an Update, of a ledger that was checked")
	errKey      = fmt.Errorf("a key must have 1 to %d bytes", bbolt.MaxKeySize)
)

// tx implements broker.Tx on a bbolt transaction. The changes of the running function stay in puts until the function
// has succeeded.
type tx struct {
	records, log *bbolt.Bucket
	meta         *bbolt.Bucket // nil: entries cannot be removed
	readOnly     bool
	view         *bbolt.Tx // set only if readOnly

	// pending has the updates below this transaction that are not in the file, until the file was checked. A
	// transaction that is not readOnly owns it, and apply adds to it.
	pending *pending
	changed map[string][]byte // by apply, of pending

	head    head              // includes every function applied so far
	next    head              // also includes the entries of the running function
	puts    map[string][]byte // in stored form; nil: deleted
	entries [][]byte          // in stored form, from head.revision+1 on
	trimmed broker.Revision   // the running function removes the entries up to it; 0: none
	reserve bool              // one of the entries may use the reserve
}

// reset discards the changes of a function that failed.
func (t *tx) reset() {
	clear(t.puts)
	t.next, t.entries, t.trimmed, t.reserve = t.head, t.entries[:0], 0, false
}

// Get implements broker.Tx.
func (t *tx) Get(key string) ([]byte, error) {
	if stored, ok := t.put(key); ok {
		return value(stored), nil
	}
	var val []byte
	return val, t.pending.guard(func() (err error) {
		if stored := t.records.Get([]byte(key)); stored != nil {
			val, err = open(key, stored)
		}
		return err
	})
}

// put returns the value that this transaction, or a pending one, has put under key.
func (t *tx) put(key string) (stored []byte, ok bool) {
	if stored, ok = t.puts[key]; !ok && t.pending != nil {
		stored, ok = t.pending.puts[key]
	}
	return stored, ok
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
	c := t.cursor()
	if err := c.move(func() ([]byte, []byte) { return c.Seek([]byte(from)) }); err != nil {
		return err
	}
	for {
		if !bytes.HasPrefix(c.k, []byte(prefix)) {
			c.k = nil
		}
		if c.k == nil && len(put) == 0 {
			return nil
		}
		if len(put) > 0 && (c.k == nil || put[0] <= string(c.k)) {
			key := put[0]
			put = put[1:]
			if key == string(c.k) {
				if err := c.move(c.Next); err != nil {
					return err
				}
			}
			if stored, _ := t.put(key); stored != nil && !f(key, value(stored)) {
				return nil
			}
			continue
		}
		if done, err := c.visit(f); done || err != nil {
			return err
		}
		if err := c.move(c.Next); err != nil {
			return err
		}
	}
}

// cursor is a cursor over the records of the file, which may not have been checked.
type cursor struct {
	*bbolt.Cursor
	pending *pending
	k, v    []byte // nil: there is no record
}

func (t *tx) cursor() *cursor { return &cursor{Cursor: t.records.Cursor(), pending: t.pending} }

// move goes to the record that next finds.
func (c *cursor) move(next func() (k, v []byte)) error {
	return c.pending.guard(func() error {
		if c.k, c.v = next(); len(c.k) > bbolt.MaxKeySize {
			return fmt.Errorf("%w: a key has %d bytes", ErrDamaged, len(c.k))
		}
		if !c.pending.isOrdered() {
			c.k = bytes.Clone(c.k) // a key that is outside the file fails here
		}
		return nil
	})
}

// visit calls f with the record at the cursor. done: f wants no more.
func (c *cursor) visit(f func(key string, value []byte) bool) (done bool, err error) {
	key := string(c.k)
	var val []byte
	if err := c.pending.guard(func() (err error) {
		val, err = open(key, c.v)
		return err
	}); err != nil {
		return false, err
	}
	return !f(key, val), nil
}

// ScanBack implements broker.Tx. It visits the records as they were when it began.
func (t *tx) ScanBack(prefix, before string, f func(key string, value []byte) bool) error {
	put := t.putKeys(prefix, prefix)
	if before != "" {
		n, _ := slices.BinarySearch(put, before)
		put = put[:n]
	}
	c := t.cursor()
	if err := c.move(func() ([]byte, []byte) { return seekBefore(c.Cursor, prefix, before) }); err != nil {
		return err
	}
	for {
		if !bytes.HasPrefix(c.k, []byte(prefix)) {
			c.k = nil
		}
		if c.k == nil && len(put) == 0 {
			return nil
		}
		if last := len(put) - 1; last >= 0 && (c.k == nil || put[last] >= string(c.k)) {
			key := put[last]
			put = put[:last]
			if key == string(c.k) {
				if err := c.move(c.Prev); err != nil {
					return err
				}
			}
			if stored, _ := t.put(key); stored != nil && !f(key, value(stored)) {
				return nil
			}
			continue
		}
		if done, err := c.visit(f); done || err != nil {
			return err
		}
		if err := c.move(c.Prev); err != nil {
			return err
		}
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

// putKeys returns the keys that the running function, or a pending update, has put, in order.
func (t *tx) putKeys(prefix, from string) []string {
	var keys []string
	add := func(puts map[string][]byte) {
		for key := range puts {
			if key >= from && strings.HasPrefix(key, prefix) {
				keys = append(keys, key)
			}
		}
	}
	add(t.puts)
	if t.pending != nil {
		add(t.pending.puts)
	}
	slices.Sort(keys)
	return slices.Compact(keys)
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

// Trim implements broker.Tx.
func (t *tx) Trim(through broker.Revision) error {
	switch {
	case t.readOnly:
		return errReadOnly
	case t.meta == nil:
		return errTrim
	case through > t.head.revision:
		return fmt.Errorf("trimming the log: it has no entry %d", through)
	}
	t.trimmed = max(t.trimmed, through)
	return nil
}

// Head implements broker.Tx.
func (t *tx) Head() (broker.Revision, error) {
	if !t.readOnly {
		return t.next.revision, nil
	}
	if t.pending != nil {
		return t.pending.head.revision, nil
	}
	h, err := readHead(t.view)
	return h.revision, err
}

// apply writes the changes of the running function to the bbolt transaction, or to the pending updates.
func (t *tx) apply() error {
	for key, stored := range t.puts {
		old, err := t.old(key)
		if err != nil {
			return err
		}
		if old != nil {
			t.next.remove(old)
		}
		if stored != nil {
			t.next.add(stored)
		}
		switch {
		case t.pending != nil:
			t.pending.puts[key], t.changed[key] = stored, stored
		case stored == nil:
			err = t.records.Delete([]byte(key))
		default:
			err = t.records.Put([]byte(key), stored)
		}
		if err != nil {
			return err
		}
	}
	for i, stored := range t.entries {
		if t.pending != nil {
			t.pending.entries = append(t.pending.entries, stored)
			continue
		}
		if err := t.log.Put(logKey(t.head.revision+broker.Revision(i)+1), stored); err != nil {
			return err
		}
	}
	t.head = t.next
	if t.trimmed > 0 {
		return trim(t.log, t.meta, t.trimmed)
	}
	return nil
}

// old returns a record in stored form as it was before the running function.
func (t *tx) old(key string) (stored []byte, err error) {
	if t.pending == nil {
		return t.records.Get([]byte(key)), nil
	}
	if stored, ok := t.pending.puts[key]; ok {
		return stored, nil
	}
	return stored, t.pending.guard(func() error {
		stored = bytes.Clone(t.records.Get([]byte(key)))
		return nil
	})
}

// pending has the updates that are not in the ledger's file. There are two kinds, never at the same time.
//
// Those of the time in which the file is checked: one that may be damaged is only read, so they are kept in a file of
// their own, and written to the ledger when the check has passed. If it fails, they stay there, and the damaged file is
// left as it is.
//
// Those that are ordered and not durable (ordered is set): they are in memory alone until the next commit.
//
// A pending is immutable. Each commit makes another one, so that a View keeps its snapshot.
type pending struct {
	ordered bool
	from    head              // of the ledger's file
	head    head              // with these updates
	puts    map[string][]byte // in stored form; nil: deleted
	entries [][]byte          // in stored form, from from.revision+1 on
}

// clone returns a copy that can be changed.
func (p *pending) clone() *pending {
	return &pending{ordered: p.ordered, from: p.from, head: p.head, puts: maps.Clone(p.puts),
		entries: p.entries[:len(p.entries):len(p.entries)]}
}

// isOrdered reports whether the file was checked: all that is pending, if anything, is ordered.
func (p *pending) isOrdered() bool { return p == nil || p.ordered }

// guard runs f, which reads a file that was not checked. A page that leads bbolt out of the file is an error, not the end
// of the process.
func (p *pending) guard(f func() error) (err error) {
	if p.isOrdered() {
		return f()
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%w: it cannot be read: %v", ErrDamaged, v)
		}
	}()
	return f()
}

// frame is one commit in the file of pending updates.
type frame struct {
	From    []byte   `json:"from"` // the head before it
	Head    []byte   `json:"head"` // the head after it
	Puts    []put    `json:"puts"`
	Entries [][]byte `json:"entries"`
}

type put struct {
	Key    []byte `json:"key"`
	Stored []byte `json:"stored"` // nil: deleted
}

// readPending returns the updates of an earlier process that never reached the ledger, whose file has the head from.
func readPending(path string, from head) (*journal.File, *pending, error) {
	p := &pending{from: from, head: from, puts: map[string][]byte{}}
	j, records, err := journal.Open(path)
	if errors.Is(err, journal.ErrDamaged) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		return nil, nil, err
	}
	list := make([]frame, len(records))
	for i, record := range records {
		err = errors.Join(err, json.Unmarshal(record, &list[i]))
	}
	if n := len(list); n > 0 && bytes.Equal(list[n-1].Head, from.encode()) {
		list = nil // they were written to the ledger, and the process ended before it removed them
		j.Reset()
	}
	for i := 0; err == nil && i < len(list); i++ {
		err = p.replay(list[i])
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("%s: %w", path, err), j.Close())
	}
	return j, p, nil
}

// replay adds a frame that was read.
func (p *pending) replay(one frame) error {
	next, err := decodeHead(one.Head)
	switch {
	case err != nil:
		return err
	case !bytes.Equal(one.From, p.head.encode()):
		return fmt.Errorf("%w: the updates beside it, such as fences, follow revision %d of another copy; "+
			"this one has revision %d", ErrDamaged, revisionOf(one.From), p.head.revision)
	}
	for _, c := range one.Puts {
		p.puts[string(c.Key)] = c.Stored
	}
	p.entries, p.head = append(p.entries, one.Entries...), next
	return nil
}

func revisionOf(encoded []byte) broker.Revision {
	h, _ := decodeHead(encoded) // zero for one that is damaged
	return h.revision
}

// fold writes the pending updates to the ledger in one transaction.
func (p *pending) fold(db *bbolt.DB) error {
	if p.head == p.from {
		return nil
	}
	return db.Update(func(btx *bbolt.Tx) error {
		if err := p.foldInto(btx); err != nil {
			return err
		}
		return btx.Bucket(bucketMeta).Put(keyHead, p.head.encode())
	})
}

// foldInto puts the pending updates into a transaction, but for the head.
func (p *pending) foldInto(btx *bbolt.Tx) error {
	if p == nil {
		return nil
	}
	records, log := btx.Bucket(bucketRecords), btx.Bucket(bucketLog)
	for key, stored := range p.puts {
		var err error
		if stored == nil {
			err = records.Delete([]byte(key))
		} else {
			err = records.Put([]byte(key), stored)
		}
		if err != nil {
			return err
		}
	}
	for i, stored := range p.entries {
		if err := log.Put(logKey(p.from.revision+broker.Revision(i)+1), stored); err != nil {
			return err
		}
	}
	return nil
}
