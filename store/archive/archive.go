package archive

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/audit"
)

// Config configures an [Archive].
type Config struct {
	Ledger broker.Ledger // required
	// Dir is the directory of the segments. Required. It is made, with mode 0700, with the first segment; each has mode
	// 0600.
	Dir string
	// Sign signs the description of a segment. Nil: segments are not signed.
	Sign func(name string, manifest []byte) ([]byte, error)
	Now  func() time.Time // nil: time.Now

	fault func(stage) error // set by tests
}

const unlistedSuffix = ".unlisted"

// maxEntries and maxEntryBytes bound the entries of one segment.
const (
	maxEntries    = 200_000
	maxEntryBytes = 64 << 20
)

// Archive is a ledger with its archive. It implements broker.Archive, and broker.Ledger: Entries returns what was
// archived too. Everything else of the ledger is as without it. Safe for concurrent use.
type Archive struct {
	broker.Ledger
	cfg Config

	adding sync.Mutex    // held by Add
	last   atomic.Uint64 // no entry after this revision is archived

	mu     sync.Mutex // guards parsed
	parsed map[uint64]*file
}

var _ broker.Archive = (*Archive)(nil)

// New returns the archive of a ledger. It does not look at the segments: see [Archive.Missing].
func New(c Config) (*Archive, error) {
	if c.Ledger == nil || c.Dir == "" {
		return nil, errors.New("archive: Ledger and Dir are required")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.fault == nil {
		c.fault = func(stage) error { return nil }
	}
	a := &Archive{Ledger: c.Ledger, cfg: c, parsed: map[uint64]*file{}}
	list, err := a.List(context.Background())
	switch n := len(list); {
	case err != nil: // the broker starts nevertheless, and whoever reads entries is refused
		a.last.Store(math.MaxUint64)
	case n > 0:
		a.last.Store(uint64(list[n-1].Tree.Size()))
	}
	return a, nil
}

const family = "s/"

func keyOf(number uint64) string { return fmt.Sprintf("%s%016x", family, number) }

// List returns the segments that the ledger lists, the oldest first.
func (a *Archive) List(ctx context.Context) (list []Segment, err error) {
	err = a.View(ctx, func(tx broker.Tx) error {
		list, err = read(tx)
		return err
	})
	return list, err
}

func read(tx broker.Tx) (list []Segment, err error) {
	scanErr := tx.Scan(family, "", func(key string, value []byte) bool {
		var s Segment
		if err = json.Unmarshal(value, &s); err == nil && keyOf(s.Number) != key {
			err = errors.New("it has another number")
		}
		if err != nil {
			err = fmt.Errorf("reading record %q: %w", key, err)
		}
		list = append(list, s)
		return err == nil
	})
	return list, errors.Join(err, scanErr)
}

// open opens the file of a segment and compares it with the ledger's record.
func (a *Archive) open(s Segment) (*file, *os.File, error) {
	in, err := os.Open(filepath.Join(a.cfg.Dir, nameOf(s.Number)))
	if err != nil {
		return nil, nil, s.fault(err)
	}
	a.mu.Lock()
	known := a.parsed[s.Number]
	a.mu.Unlock()
	if known != nil && hex.EncodeToString(known.digest) == s.Digest {
		again := *known
		again.ReaderAt = in
		return &again, in, nil
	}
	info, err := in.Stat()
	var f *file
	if err == nil && info.Size() != s.Size {
		err = damaged("it has %d bytes, not %d", info.Size(), s.Size)
	}
	if err == nil {
		f, err = parse(in, info.Size())
	}
	if err == nil && hex.EncodeToString(f.digest) != s.Digest {
		err = damaged("it has another digest")
	}
	if err != nil {
		return nil, nil, errors.Join(s.fault(err), in.Close())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.parsed[s.Number] = f
	return f, in, nil
}

// History runs f on a snapshot of the ledger with all that was archived. A record of the ledger comes before an
// archived one with its key. Errors that wrap a *broker.Error with CodeArchiveDamaged name a segment that is missing or
// damaged; f does not meet them when it reads nothing of that segment.
func (a *Archive) History(ctx context.Context, f func(broker.Tx) error) error {
	return a.View(ctx, func(tx broker.Tx) error {
		list, err := read(tx)
		if err != nil {
			return err
		}
		m := newMerged(a.open, tx, list)
		defer m.close()
		return f(m)
	})
}

// Entries implements broker.Ledger, with the archived entries.
func (a *Archive) Entries(ctx context.Context, after broker.Revision, limit int) (list []broker.Entry, err error) {
	for range maxAgain {
		for uint64(after) < a.last.Load() && len(list) < limit {
			s, err := a.with(ctx, after+1)
			if err != nil {
				return nil, err
			}
			if s.Number == 0 {
				break // it is being listed, and the ledger has it
			}
			part, err := a.entries(s, after, limit-len(list))
			if err != nil {
				return nil, err
			}
			list, after = append(list, part...), after+broker.Revision(len(part))
		}
		if len(list) >= limit {
			return list, nil
		}
		rest, err := a.Ledger.Entries(ctx, after, limit-len(list))
		if err != nil {
			return nil, err
		}
		if len(rest) > 0 && rest[0].Revision == after+1 || len(rest) == 0 && uint64(after) >= a.last.Load() {
			return append(list, rest...), nil
		}
		// A move took the next entries out of the ledger since the segments were read: they are there now.
	}
	return nil, fmt.Errorf("reading the audit log: entry %d is neither in the ledger nor in the archive", after+1)
}

// maxAgain bounds how often Entries begins again while entries are moved.
const maxAgain = 10

// with returns the segment that has an entry; its number is zero if none has.
func (a *Archive) with(ctx context.Context, r broker.Revision) (Segment, error) {
	list, err := a.List(ctx)
	for _, s := range list {
		if s.First <= r && r <= broker.Revision(s.Tree.Size()) {
			return s, err
		}
	}
	return Segment{}, err
}

// entries reads at most limit entries of one segment after a revision.
func (a *Archive) entries(s Segment, after broker.Revision, limit int) (list []broker.Entry, err error) {
	f, in, err := a.open(s)
	if err != nil {
		return nil, err
	}
	defer in.Close() //nolint:errcheck // only read
	for i := max(f.Entries.find(revisionKey(after+1)), 0); i < len(f.Entries.Blocks); i++ {
		items, err := f.read(&f.Entries, i)
		if err != nil {
			return nil, s.fault(err)
		}
		for _, it := range items {
			if it.key <= revisionKey(after) {
				continue
			}
			if len(list) == limit {
				return list, nil
			}
			e, err := entryOf(it)
			if err != nil {
				return nil, s.fault(err)
			}
			list = append(list, e)
		}
	}
	return list, nil
}

// Add implements broker.Archive.
//
// Step 1 writes the segment under a temporary name: a crash leaves a file that the next Add replaces. Step 2 makes it
// durable under its own name: a crash leaves a file that the ledger does not list, which the next Add puts aside. Step
// 3 lists it in the ledger. From then on it counts, and its records can be removed from the ledger.
func (a *Archive) Add(ctx context.Context, records []broker.Archived, before time.Time) (broker.Segment, error) {
	a.adding.Lock()
	defer a.adding.Unlock()
	list, err := a.List(ctx)
	if err != nil {
		return broker.Segment{}, err
	}
	c := content{number: 1, records: records, sign: a.cfg.Sign}
	var foot footer
	if n := len(list); n > 0 {
		last := list[n-1]
		if !last.Removed {
			return last.public(), fmt.Errorf("segment %s was not finished", nameOf(last.Number))
		}
		c.number, foot.Before = last.Number+1, last.Tree.Clone()
		if c.previous, err = hex.DecodeString(last.Digest); err != nil {
			return broker.Segment{}, err
		}
	}
	c.entries = a.oldEntries(ctx, broker.Revision(foot.Before.Size()), before)
	s := Segment{Number: c.number, Records: uint64(len(records)), First: broker.Revision(foot.Before.Size() + 1),
		Ranges: rangesOf(records)}
	if len(records) == 0 {
		one, err := a.Ledger.Entries(ctx, s.First-1, 1)
		if err != nil || len(one) == 0 || !one[0].At.Before(before) {
			return broker.Segment{}, err
		}
	}
	path, err := a.place(c.number)
	if err != nil {
		return broker.Segment{}, err
	}
	var digest []byte
	if err := create(path, a.cfg.fault, func(out io.Writer) error {
		counted := &counter{Writer: out}
		foot, digest, err = c.writeTo(counted, foot)
		s.Size = counted.n
		return err
	}); err != nil {
		return broker.Segment{}, fmt.Errorf("writing segment %s: %w", nameOf(c.number), err)
	}
	s.Digest, s.Tree = hex.EncodeToString(digest), foot.After
	a.last.Store(uint64(s.Tree.Size())) // before: the outcome of listing it may be unknown
	if err := a.list(ctx, s); err != nil {
		return broker.Segment{}, err
	}
	return s.public(), a.cfg.fault(listed)
}

type counter struct {
	io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.Writer.Write(b)
	c.n += int64(n)
	return n, err
}

// place returns the path of a new segment. A file that is there was not listed: it is put aside, since an operator may
// have restored an older copy of the ledger by mistake.
func (a *Archive) place(number uint64) (string, error) {
	if err := os.Mkdir(a.cfg.Dir, 0o700); err == nil {
		if err := syncDir(filepath.Dir(a.cfg.Dir)); err != nil {
			return "", err
		}
	} else if !errors.Is(err, os.ErrExist) {
		return "", err
	}
	path := filepath.Join(a.cfg.Dir, nameOf(number))
	if err := os.Rename(path, path+unlistedSuffix); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	return path, nil
}

// oldEntries returns a function that adds the durable entries after a revision that were made before a time.
func (a *Archive) oldEntries(ctx context.Context, after broker.Revision, before time.Time,
) func(func(broker.Entry) error) error {
	return func(add func(broker.Entry) error) error {
		for n, size := 0, 0; n < maxEntries && size < maxEntryBytes; {
			page, err := a.Ledger.Entries(ctx, after, 1000)
			if err != nil || len(page) == 0 {
				return err
			}
			for _, e := range page {
				if !e.At.Before(before) || n >= maxEntries {
					return nil
				}
				if err := add(e); err != nil {
					return err
				}
				after, n, size = e.Revision, n+1, size+200+len(e.Detail)
			}
		}
		return nil
	}
}

// list has the ledger list a segment.
func (a *Archive) list(ctx context.Context, s Segment) error {
	value, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return a.Update(ctx, func(tx broker.Tx) error {
		if err := tx.Put(keyOf(s.Number), value); err != nil {
			return err
		}
		_, err := tx.Append(broker.Entry{At: a.cfg.Now(), Actor: "pawl", Op: broker.OpArchived,
			Detail: fmt.Sprintf("segment %s: %d records, entries up to %d, sha256:%s", nameOf(s.Number), s.Records,
				s.Tree.Size(), s.Digest)})
		return err
	})
}

// Unfinished implements broker.Archive.
func (a *Archive) Unfinished(ctx context.Context) (s broker.Segment, ok bool, err error) {
	list, err := a.List(ctx)
	if n := len(list); err != nil || n == 0 || list[n-1].Removed {
		return s, false, err
	}
	return list[len(list)-1].public(), true, nil
}

// Records implements broker.Archive. It checks each record that it returns.
func (a *Archive) Records(ctx context.Context, one broker.Segment, f func([]broker.Archived) error) error {
	list, err := a.List(ctx)
	if err != nil {
		return err
	}
	for _, s := range list {
		if s.Number != one.Number {
			continue
		}
		file, in, err := a.open(s)
		if err != nil {
			return err
		}
		defer in.Close() //nolint:errcheck // only read
		for i := range file.Records.Blocks {
			items, err := file.read(&file.Records, i)
			if err != nil {
				return s.fault(err)
			}
			part := make([]broker.Archived, len(items))
			for i, it := range items {
				part[i] = broker.Archived{Key: it.key, Value: it.value}
			}
			if err := errors.Join(ctx.Err(), f(part)); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("the ledger does not list segment %s", one.Name)
}

// Finish implements broker.Archive.
func (a *Archive) Finish(tx broker.Tx, one broker.Segment) error {
	raw, err := tx.Get(keyOf(one.Number))
	if err != nil {
		return err
	}
	var s Segment
	if err := json.Unmarshal(raw, &s); err != nil {
		return fmt.Errorf("reading record %q: %w", keyOf(one.Number), err)
	}
	s.Removed = true
	if raw, err = json.Marshal(s); err != nil {
		return err
	}
	return tx.Put(keyOf(one.Number), raw)
}

// Tree returns the tree of the archived part of the audit log.
func (a *Archive) Tree(ctx context.Context) (t audit.Tree, err error) {
	list, err := a.List(ctx)
	if n := len(list); n > 0 {
		t = list[n-1].Tree.Clone()
	}
	return t, err
}

// Missing returns an error for each listed segment whose file is not there, or has another size. It reads no file.
func (a *Archive) Missing(ctx context.Context) error {
	list, err := a.List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, s := range list {
		info, err := os.Stat(filepath.Join(a.cfg.Dir, nameOf(s.Number)))
		if err == nil && info.Size() != s.Size {
			err = damaged("it has %d bytes, not %d", info.Size(), s.Size)
		}
		errs = append(errs, s.fault(err))
	}
	return errors.Join(errs...)
}

// Verify reads all segments and compares them with the ledger and with each other. The error names those that are
// missing, damaged or in the place of another.
func (a *Archive) Verify(ctx context.Context) error {
	list, err := a.List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	var before audit.Tree
	var previous []byte
	for _, s := range list {
		errs = append(errs, ctx.Err(), s.fault(a.verify(s, before, previous)))
		before = s.Tree
		previous, err = hex.DecodeString(s.Digest)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (a *Archive) verify(s Segment, before audit.Tree, previous []byte) error {
	f, in, err := a.open(s)
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // only read
	if !f.Before.Is(before) || !f.After.Is(s.Tree) || !bytes.Equal(f.Previous, previous) {
		return damaged("it does not follow the segment before it")
	}
	return f.verify()
}
