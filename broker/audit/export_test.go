package audit

import (
	"fmt"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/pawlsec/pawl/broker"
)

// OpenCheckpoint verifies a signed checkpoint.
var OpenCheckpoint = openCheckpoint

// Holds reports whether the proof shows that e is in the log of the checkpoint.
func (c Checkpoint) Holds(e broker.Entry, proof tlog.RecordProof) bool {
	text, err := leaf(e)
	return err == nil && e.Revision >= 1 && tlog.CheckRecord(proof, c.Size, c.Root, int64(e.Revision)-1, tlog.RecordHash(text)) == nil
}

// Prove returns the proof that an entry is among the first size entries of the log, as a checkpoint of that size has
// them. It holds all their hashes in memory, 64 bytes for each.
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
		return nil, fmt.Errorf("entry %d is not among the first %d of %d entries", r, size, n)
	}
	return tlog.ProveRecord(size, int64(r)-1, stored)
}
