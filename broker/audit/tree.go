package audit

import (
	"crypto/sha256"
	"fmt"
	"iter"

	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/pawlsec/pawl/broker"
)

// Log is the audit log from its first entry on. An error ends it.
type Log = iter.Seq2[broker.Entry, error]

// leaf is an entry as the tree holds it: one JSON text for what is the same entry.
func leaf(e broker.Entry) ([]byte, error) {
	e.At = e.At.UTC().Round(0)
	return json.Marshal(e, json.Deterministic(true))
}

// Tree is the Merkle tree of the log's first entries. It keeps the roots of its full subtrees
// only, so it grows by one hash at a time and stays small. The zero Tree is that of an empty log.
type Tree struct {
	size int64
	edge []tlog.Hash // roots of the full subtrees, the largest first
}

// Size is how many entries it holds.
func (t *Tree) Size() int64 { return t.size }

// Add puts the next entry in. One that is not next, by its revision, is refused: entries are
// missing, or come twice.
func (t *Tree) Add(e broker.Entry) error {
	if e.Revision != broker.Revision(t.size+1) {
		return fmt.Errorf("%w: after entry %d comes entry %d", ErrChanged, t.size, e.Revision)
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

// Root is the tree's hash, RFC 6962 section 2.1.
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

// Prove gives the proof that an entry is in the log whose first size entries a checkpoint stands
// for. It holds all their hashes in memory, 64 bytes for each.
func Prove(log Log, size int64, r broker.Revision) (tlog.RecordProof, error) {
	var hashes []tlog.Hash
	stored := tlog.HashReaderFunc(func(at []int64) (found []tlog.Hash, err error) {
		for _, i := range at {
			found = append(found, hashes[i])
		}
		return found, nil
	})
	n := int64(0)
	for e, err := range log {
		if n == size {
			break
		}
		if err != nil {
			return nil, err
		}
		text, err := leaf(e)
		if err != nil {
			return nil, err
		}
		added, err := tlog.StoredHashes(n, text, stored)
		if err != nil {
			return nil, err
		}
		hashes = append(hashes, added...)
		n++
	}
	if n < size || r < 1 || int64(r) > size {
		return nil, fmt.Errorf("there is no entry %d among the first %d of %d", r, size, n)
	}
	return tlog.ProveRecord(size, int64(r)-1, stored)
}
