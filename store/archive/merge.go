package archive

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"sort"
	"strings"

	"github.com/pawlsec/pawl/broker"
)

var errReadOnly = errors.New("archived records cannot be changed")

// merged is a view of the ledger with all that was archived. A record of the ledger comes before an archived one with
// its key.
type merged struct {
	broker.Tx
	list []*reader // the newest first
}

// reader reads one segment, for one view.
type reader struct {
	opened func(Segment) (*file, *os.File, error)
	listed Segment

	open  *os.File // nil: not yet
	file  *file
	block int // the block in items
	items []item
}

// load opens the segment, once.
func (r *reader) load() (err error) {
	if r.file != nil {
		return nil
	}
	r.file, r.open, err = r.opened(r.listed)
	r.block = -1
	return err
}

func (r *reader) close() {
	if r.open != nil {
		_ = r.open.Close() // it was only read
	}
}

// at returns the items of a block of the records.
func (r *reader) at(block int) ([]item, error) {
	if r.block == block {
		return r.items, nil
	}
	items, err := r.file.read(&r.file.Records, block)
	if err != nil {
		return nil, r.listed.fault(err)
	}
	r.block, r.items = block, items
	return items, nil
}

func (r *reader) get(key string) ([]byte, error) {
	if !r.listed.mayHave(key, key) {
		return nil, nil
	}
	if err := r.load(); err != nil {
		return nil, err
	}
	i := r.file.Records.find(key)
	if i < 0 {
		return nil, nil
	}
	items, err := r.at(i)
	if err != nil {
		return nil, err
	}
	n := sort.Search(len(items), func(i int) bool { return items[i].key >= key })
	if n == len(items) || items[n].key != key {
		return nil, nil
	}
	return items[n].value, nil
}

// Get implements broker.Tx.
func (m *merged) Get(key string) ([]byte, error) {
	value, err := m.Tx.Get(key)
	for i := 0; err == nil && value == nil && i < len(m.list); i++ {
		value, err = m.list[i].get(key)
	}
	return value, err
}

// Put implements broker.Tx.
func (m *merged) Put(string, []byte) error { return errReadOnly }

// Append implements broker.Tx.
func (m *merged) Append(broker.Entry) (broker.Revision, error) { return 0, errReadOnly }

// Trim implements broker.Tx.
func (m *merged) Trim(broker.Revision) error { return errReadOnly }

// Scan implements broker.Tx.
func (m *merged) Scan(prefix, after string, f func(key string, value []byte) bool) error {
	from := prefix
	if after >= prefix {
		from = after + "\x00"
	}
	return m.scan(prefix, from, 1, f, func(g func(string, []byte) bool) error { return m.Tx.Scan(prefix, after, g) })
}

// ScanBack implements broker.Tx.
func (m *merged) ScanBack(prefix, before string, f func(key string, value []byte) bool) error {
	from := before
	if before == "" || before > prefix && !strings.HasPrefix(before, prefix) {
		from = afterAll(prefix)
	}
	return m.scan(prefix, from, -1, f, func(g func(string, []byte) bool) error { return m.Tx.ScanBack(prefix, before, g) })
}

// afterAll returns a key after all keys with a prefix, or empty if there is none.
func afterAll(prefix string) string {
	end := []byte(prefix)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i] < 0xff {
			end[i]++
			return string(end[:i+1])
		}
	}
	return ""
}

// scan merges the cursors over the segments with a scan of the ledger. way is 1, or -1 for the opposite order.
func (m *merged) scan(prefix, from string, way int, f func(string, []byte) bool,
	live func(func(string, []byte) bool) error) error {
	var cursors []*cursor
	for _, r := range m.list {
		if !r.listed.mayHave(prefix, afterAll(prefix)) {
			continue
		}
		if err := r.load(); err != nil {
			return err
		}
		c := &cursor{r: r, prefix: prefix, way: way}
		if err := c.seek(from); err != nil {
			return err
		}
		if !c.done {
			cursors = append(cursors, c)
		}
	}
	var failed error
	more := true
	// until visits the archived records before a key, or all that are left.
	until := func(key string, all bool) {
		for more && failed == nil {
			c := nearest(cursors, way)
			if c == nil || !all && strings.Compare(c.key, key)*way >= 0 {
				return
			}
			at, value := c.key, c.value
			if failed = skip(cursors, at); failed == nil {
				more = f(at, value)
			}
		}
	}
	err := live(func(key string, value []byte) bool {
		if until(key, false); !more || failed != nil {
			return false
		}
		if failed = skip(cursors, key); failed != nil {
			return false
		}
		more = f(key, value)
		return more
	})
	if err == nil && failed == nil && more {
		until("", true)
	}
	return errors.Join(err, failed)
}

// nearest returns the cursor at the next key, of several the first; nil: all are done.
func nearest(list []*cursor, way int) (best *cursor) {
	for _, c := range list {
		if !c.done && (best == nil || strings.Compare(c.key, best.key)*way < 0) {
			best = c
		}
	}
	return best
}

// skip moves the cursors that are at a key.
func skip(list []*cursor, key string) error {
	for _, c := range list {
		if !c.done && c.key == key {
			if err := c.move(); err != nil {
				return err
			}
		}
	}
	return nil
}

// cursor is a position among the records of a segment.
type cursor struct {
	r      *reader
	prefix string
	way    int
	items  []item
	block  int
	i      int

	done  bool
	key   string
	value []byte
}

// seek moves to the first record at a key or after it; backward, to the last before it. An empty key is after all.
func (c *cursor) seek(key string) (err error) {
	t := &c.r.file.Records
	if c.block = t.find(key); key == "" && c.way < 0 {
		c.block = len(t.Blocks) - 1
	}
	if c.block < 0 && c.way > 0 {
		c.block = 0
	}
	if c.block < 0 || len(t.Blocks) == 0 {
		c.done = true
		return nil
	}
	if c.items, err = c.r.at(c.block); err != nil {
		return err
	}
	c.i = sort.Search(len(c.items), func(i int) bool { return c.items[i].key >= key })
	if key == "" && c.way < 0 {
		c.i = len(c.items)
	}
	if c.way < 0 {
		c.i--
	}
	return c.settle()
}

func (c *cursor) move() error {
	c.i += c.way
	return c.settle()
}

// settle goes on to the next block when this one ends, and reads the record.
func (c *cursor) settle() (err error) {
	for c.i < 0 || c.i >= len(c.items) {
		c.block += c.way
		if c.block < 0 || c.block >= len(c.r.file.Records.Blocks) || !c.reaches(c.block) {
			c.done = true
			return nil
		}
		if c.items, err = c.r.at(c.block); err != nil {
			return err
		}
		if c.i = 0; c.way < 0 {
			c.i = len(c.items) - 1
		}
	}
	c.key, c.value = c.items[c.i].key, c.items[c.i].value
	c.done = !strings.HasPrefix(c.key, c.prefix)
	return nil
}

// reaches reports whether a block may have keys with the prefix, so that it is not read in vain.
func (c *cursor) reaches(block int) bool {
	first := c.r.file.Records.Blocks[block].First
	return c.way < 0 || bytes.HasPrefix(first, []byte(c.prefix))
}

// newMerged makes a view of segments, which are listed from the oldest.
func newMerged(open func(Segment) (*file, *os.File, error), tx broker.Tx, list []Segment) *merged {
	m := &merged{Tx: tx}
	for _, s := range slices.Backward(list) {
		m.list = append(m.list, &reader{opened: open, listed: s, block: -1})
	}
	return m
}

func (m *merged) close() {
	for _, r := range m.list {
		r.close()
	}
}
