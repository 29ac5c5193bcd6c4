package archive

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sort"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/audit"
)

// A segment is: magic, the blocks of both tables, the footer, its signature, the lengths of these two (u32 each,
// big-endian), the end magic. A block is a compressed sequence of items: the length of the key, the key, the length of
// the value, the value. The keys of a table go up. Nothing in a file is trusted before its digest was compared.
const (
	magic    = "pawlseg1"
	magicEnd = "pawlsegE"
	tailSize = 4 + 4 + len(magicEnd)

	version     = 1
	blockSize   = 32 << 10 // of the items of a block, before the last one
	maxValue    = 32 << 20
	maxKey      = 32 << 10
	maxBlock    = maxValue + blockSize + 1<<20
	maxFooter   = 256 << 20
	maxSignedBy = 64 << 10
)

// errDamaged is in every error that the content of a segment causes.
var errDamaged = errors.New("it is damaged")

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errDamaged, fmt.Sprintf(format, args...))
}

// footer describes a segment. Its digest is that of the segment, since it has those of all blocks.
type footer struct {
	Version  int        `json:"version"`
	Number   uint64     `json:"number"`
	Previous []byte     `json:"previous"` // digest of the segment before it; empty: it is the first
	Before   audit.Tree `json:"before"`   // of the audit log before its first entry
	After    audit.Tree `json:"after"`    // of the audit log after its last entry
	Records  table      `json:"records"`
	Entries  table      `json:"entries"` // by revision, as 16 hexadecimal digits
}

// table is a sorted list of items in blocks.
type table struct {
	Items  uint64  `json:"items"`
	Last   []byte  `json:"last"` // the last key; empty: there is none
	Blocks []block `json:"blocks"`
}

type block struct {
	First []byte `json:"first"` // its first key
	At    int64  `json:"at"`    // where it begins in the file
	Size  int64  `json:"size"`
	Sum   []byte `json:"sum"` // SHA-256 of its compressed bytes
}

type item struct {
	key   string
	value []byte
}

// manifest is the text that a signature covers.
type manifest struct {
	Segment  string          `json:"segment"` // the file's name
	Digest   []byte          `json:"digest"`
	Previous []byte          `json:"previous"`
	First    broker.Revision `json:"first"` // the first entry's; over Last: it has none
	Last     broker.Revision `json:"last"`
	Before   string          `json:"before"` // root of the log's tree
	After    string          `json:"after"`
}

func (f *footer) manifest(digest []byte) ([]byte, error) {
	return json.Marshal(manifest{Segment: nameOf(f.Number), Digest: digest, Previous: f.Previous,
		First: broker.Revision(f.Before.Size() + 1), Last: broker.Revision(f.After.Size()),
		Before: f.Before.Root().String(), After: f.After.Root().String()})
}

func nameOf(number uint64) string { return fmt.Sprintf("%08d.segment", number) }

func revisionKey(r broker.Revision) string { return fmt.Sprintf("%016x", uint64(r)) }

// file is an opened segment.
type file struct {
	io.ReaderAt
	footer
	digest    []byte
	signature []byte
}

// parse reads the footer of a segment of so many bytes. The blocks are checked when they are read.
func parse(r io.ReaderAt, size int64) (*file, error) {
	if size < int64(len(magic)+tailSize) {
		return nil, damaged("it has %d bytes", size)
	}
	head, tail := make([]byte, len(magic)), make([]byte, tailSize)
	if _, err := r.ReadAt(head, 0); err != nil {
		return nil, err
	}
	if _, err := r.ReadAt(tail, size-tailSize64); err != nil {
		return nil, err
	}
	if string(head) != magic || string(tail[8:]) != magicEnd {
		return nil, damaged("it is no segment, or it was cut")
	}
	text, sig := int64(binary.BigEndian.Uint32(tail)), int64(binary.BigEndian.Uint32(tail[4:]))
	end := size - tailSize64 - text - sig
	if text > maxFooter || sig > maxSignedBy || end < int64(len(magic)) {
		return nil, damaged("its footer has %d bytes", text)
	}
	raw := make([]byte, text+sig)
	if _, err := r.ReadAt(raw, end); err != nil {
		return nil, err
	}
	f := &file{ReaderAt: r, signature: raw[text:]}
	dec := json.NewDecoder(bytes.NewReader(raw[:text]))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f.footer); err != nil {
		return nil, damaged("its footer: %v", err)
	}
	again, err := json.Marshal(&f.footer)
	if err != nil || !bytes.Equal(again, raw[:text]) {
		return nil, damaged("its footer has another spelling")
	}
	sum := sha256.Sum256(raw[:text])
	f.digest = sum[:]
	return f, f.check(end)
}

const tailSize64 = int64(tailSize)

// check checks the footer of a segment with blocks up to end.
func (f *footer) check(end int64) error {
	if f.Version != version {
		return fmt.Errorf("its format is version %d, and this build reads version %d: run a later build", f.Version, version)
	}
	if n := f.After.Size() - f.Before.Size(); n < 0 || uint64(n) != f.Entries.Items {
		return damaged("it has %d entries, from revision %d to %d", f.Entries.Items, f.Before.Size()+1, f.After.Size())
	}
	at := int64(len(magic))
	for _, t := range []*table{&f.Records, &f.Entries} {
		var err error
		if at, err = t.check(at); err != nil {
			return err
		}
	}
	if at != end {
		return damaged("its blocks end at byte %d of %d", at, end)
	}
	return nil
}

// check returns where a table that begins at a byte ends.
func (t *table) check(at int64) (int64, error) {
	last := []byte(nil)
	for i, b := range t.Blocks {
		switch {
		case b.At != at || b.Size <= 0 || b.Size > maxBlock || len(b.Sum) != sha256.Size:
			return 0, damaged("block %d is not where it belongs", i)
		case len(b.First) == 0 || i > 0 && bytes.Compare(last, b.First) >= 0:
			return 0, damaged("keys out of order")
		}
		at, last = at+b.Size, b.First
	}
	if bytes.Compare(last, t.Last) > 0 || (len(t.Blocks) == 0) != (len(t.Last) == 0) ||
		uint64(len(t.Blocks)) > t.Items || len(t.Blocks) == 0 && t.Items > 0 {
		return 0, damaged("its last key is not the last")
	}
	return at, nil
}

// read reads and checks a block.
func (f *file) read(t *table, i int) ([]item, error) {
	b := t.Blocks[i]
	raw := make([]byte, b.Size)
	if _, err := f.ReadAt(raw, b.At); err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(raw); !bytes.Equal(sum[:], b.Sum) {
		return nil, damaged("the block at byte %d was changed", b.At)
	}
	items, err := unpack(raw)
	if err != nil {
		return nil, err
	}
	next := append(bytes.Clone(t.Last), 0)
	if i+1 < len(t.Blocks) {
		next = t.Blocks[i+1].First
	}
	if len(items) == 0 || items[0].key != string(b.First) || items[len(items)-1].key >= string(next) {
		return nil, damaged("the block at byte %d has other keys", b.At)
	}
	return items, nil
}

// pack compresses items.
func pack(items []item) ([]byte, error) {
	var out bytes.Buffer
	w, err := flate.NewWriter(&out, flate.DefaultCompression)
	if err != nil {
		return nil, err
	}
	var n []byte
	for _, it := range items {
		n = binary.AppendUvarint(n[:0], uint64(len(it.key)))
		n = append(n, it.key...)
		n = binary.AppendUvarint(n, uint64(len(it.value)))
		_, _ = w.Write(n) // Close returns the error
		_, _ = w.Write(it.value)
	}
	err = w.Close()
	return out.Bytes(), err
}

// unpack is the opposite of pack.
func unpack(raw []byte) (items []item, err error) {
	r := flate.NewReader(bytes.NewReader(raw))
	text, err := io.ReadAll(io.LimitReader(r, maxBlock+1))
	if err != nil || len(text) > maxBlock {
		return nil, damaged("a block of %d bytes cannot be read", len(raw))
	}
	for len(text) > 0 {
		var it item
		var key, value []byte
		if key, text, err = take(text, maxKey); err != nil {
			return nil, err
		}
		if value, text, err = take(text, maxValue); err != nil {
			return nil, err
		}
		it.key, it.value = string(key), value
		if len(key) == 0 || len(items) > 0 && items[len(items)-1].key >= it.key {
			return nil, damaged("keys out of order")
		}
		items = append(items, it)
	}
	return items, nil
}

func take(text []byte, most uint64) (one, rest []byte, err error) {
	n, width := binary.Uvarint(text)
	if width <= 0 || n > most || n > uint64(len(text)-width) {
		return nil, nil, damaged("an item extends beyond its block")
	}
	end := width + int(n)
	return text[width:end:end], text[end:], nil
}

// find returns the block that has a key, if one has it: the last that begins at it or before; -1: none does.
func (t *table) find(key string) int {
	return sort.Search(len(t.Blocks), func(i int) bool { return string(t.Blocks[i].First) > key }) - 1
}

// verify reads the whole segment: all keys are in order, and its entries make of one tree the other.
func (f *file) verify() error {
	for _, t := range []*table{&f.Records, &f.Entries} {
		n := uint64(0)
		for i := range t.Blocks {
			items, err := f.read(t, i)
			if err != nil {
				return err
			}
			n += uint64(len(items))
			if i == len(t.Blocks)-1 && items[len(items)-1].key != string(t.Last) {
				return damaged("its last key is not the last")
			}
		}
		if n != t.Items {
			return damaged("it has %d items of %d", n, t.Items)
		}
	}
	tree := f.Before.Clone()
	for i := range f.Entries.Blocks {
		items, err := f.read(&f.Entries, i)
		if err != nil {
			return err
		}
		for _, it := range items {
			e, err := entryOf(it)
			if err == nil {
				err = tree.Add(e)
			}
			if err != nil {
				return damaged("%v", err)
			}
		}
	}
	if !tree.Is(f.After) {
		return damaged("its entries are not those of its tree")
	}
	return nil
}

func entryOf(it item) (e broker.Entry, err error) {
	if err := json.Unmarshal(it.value, &e); err != nil {
		return e, damaged("entry %s: %v", it.key, err)
	}
	if revisionKey(e.Revision) != it.key {
		return e, damaged("entry %s has revision %d", it.key, e.Revision)
	}
	return e, nil
}
