package audit

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/pawlsec/pawl/broker"
)

// Log is the audit log from its first entry on. An error ends it.
type Log = iter.Seq2[broker.Entry, error]

// leaf encodes an entry for the tree: one JSON text for the same entry.
func leaf(e broker.Entry) ([]byte, error) {
	e.At = e.At.UTC().Round(0)
	return json.Marshal(e, json.Deterministic(true))
}

// Tree is the Merkle tree of the log's first entries. It keeps only the roots of its full subtrees, so it stays small
// and grows one hash at a time. The zero Tree is that of an empty log.
type Tree struct {
	size int64
	edge []tlog.Hash // roots of the full subtrees, the largest first
}

// Size returns the number of entries.
func (t *Tree) Size() int64 { return t.size }

// Add appends the next entry. It refuses one with any other revision, because entries are missing or repeated.
func (t *Tree) Add(e broker.Entry) error {
	if e.Revision != broker.Revision(t.size+1) {
		return fmt.Errorf("%w: entry %d is followed by entry %d", ErrChanged, t.size, e.Revision)
	}
	text, err := leaf(e)
	if err != nil {
		return fmt.Errorf("encoding entry %d: %w", e.Revision, err)
	}
	h := tlog.RecordHash(text)
	for n := t.size; n&1 == 1; n >>= 1 {
		last := len(t.edge) - 1
		h, t.edge = tlog.NodeHash(t.edge[last], h), t.edge[:last]
	}
	t.edge = append(t.edge, h)
	t.size++
	return nil
}

// Root returns the hash of the tree, RFC 6962 section 2.1.
func (t *Tree) Root() tlog.Hash {
	if t.size == 0 {
		return sha256.Sum256(nil)
	}
	h := t.edge[len(t.edge)-1]
	for i := len(t.edge) - 2; i >= 0; i-- {
		h = tlog.NodeHash(t.edge[i], h)
	}
	return h
}

// Grow adds entries until the log ends or the tree has limit of them; zero means no limit.
func (t *Tree) Grow(log Log, limit int64) error {
	if limit > 0 && t.size >= limit {
		return nil
	}
	for e, err := range log {
		if err == nil {
			err = t.Add(e)
		}
		if err != nil || t.size == limit {
			return err
		}
	}
	return nil
}

// MarshalText returns the size of the tree and the roots of its full subtrees, separated by spaces. A tree that was read
// from it grows as this one does.
func (t Tree) MarshalText() ([]byte, error) {
	text := strconv.FormatInt(t.size, 10)
	for _, h := range t.edge {
		text += " " + h.String()
	}
	return []byte(text), nil
}

// UnmarshalText reads what [Tree.MarshalText] returns, in this one spelling.
func (t *Tree) UnmarshalText(text []byte) error {
	first, rest, _ := strings.Cut(string(text), " ")
	size, err := strconv.ParseInt(first, 10, 64)
	if err != nil || size < 0 || strconv.FormatInt(size, 10) != first {
		return errors.New("the size of a tree is not a number")
	}
	read := Tree{size: size}
	for _, one := range strings.Fields(rest) {
		h, err := tlog.ParseHash(one)
		if err != nil {
			return errors.New("a root of a tree is not a hash")
		}
		read.edge = append(read.edge, h)
	}
	if len(read.edge) != bits.OnesCount64(uint64(size)) {
		return fmt.Errorf("a tree of %d entries has %d roots", size, len(read.edge))
	}
	if again, _ := read.MarshalText(); string(again) != string(text) { // it returns no error
		return errors.New("a tree has another spelling")
	}
	*t = read
	return nil
}

// Clone returns a copy that grows by itself.
func (t *Tree) Clone() Tree { return Tree{t.size, slices.Clone(t.edge)} }

// Is reports whether both trees have the same entries.
func (t *Tree) Is(other Tree) bool { return t.size == other.size && slices.Equal(t.edge, other.edge) }
