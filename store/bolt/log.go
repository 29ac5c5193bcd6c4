package bolt

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker"
)

// A record is stored as its seal followed by its value, an entry as its link followed by its JSON.
const (
	sealSize = 16
	linkSize = sha256.Size
)

// mayUseReserve reports whether an entry may use the reserve of disk space. Its operation must reduce authority, never
// extend it. A start of the broker and its policy bundle are included: otherwise a broker that restarts on a full disk
// could not fence.
func mayUseReserve(op broker.Op) bool {
	switch op {
	case broker.OpFence, broker.OpFreeze, broker.OpViolation, broker.OpEvidence,
		broker.OpClosed, broker.OpClosure, broker.OpEnd, broker.OpResume, broker.OpPolicy:
		return true
	}
	return false
}

// head is the summary of the ledger. It changes in the same transaction as the records and entries.
type head struct {
	revision broker.Revision // of the last entry
	link     [linkSize]byte  // of the last entry: SHA-256(previous link || JSON); zeros before the first
	records  uint64          // the number of records
	sum      [sealSize]byte  // the seals of all records, xored
}

const headSize = 8 + linkSize + 8 + sealSize

func (h head) encode() []byte {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, headSize), uint64(h.revision))
	b = append(b, h.link[:]...)
	b = binary.BigEndian.AppendUint64(b, h.records)
	return append(b, h.sum[:]...)
}

func decodeHead(b []byte) (h head, err error) {
	if len(b) != headSize {
		return h, fmt.Errorf("%w: its head has %d bytes, not %d", ErrDamaged, len(b), headSize)
	}
	h.revision = broker.Revision(binary.BigEndian.Uint64(b))
	copy(h.link[:], b[8:])
	h.records = binary.BigEndian.Uint64(b[8+linkSize:])
	copy(h.sum[:], b[16+linkSize:])
	return h, nil
}

// decodeBase returns the head with which the check of the log begins: that of its first entry's predecessor.
func decodeBase(b []byte) (h head, err error) {
	if b == nil {
		return head{}, nil
	}
	if h, err = decodeHead(b); err == nil && (h.records != 0 || h.sum != [sealSize]byte{}) {
		err = fmt.Errorf("%w: the beginning of its log counts records", ErrDamaged)
	}
	return h, err
}

// trim removes the entries up to a revision from the log.
func trim(log, meta *bbolt.Bucket, through broker.Revision) error {
	base, err := decodeBase(meta.Get(keyBase))
	if err != nil || through <= base.revision {
		return err
	}
	last := log.Get(logKey(through))
	if len(last) < linkSize {
		return fmt.Errorf("trimming the log: it has no entry %d", through)
	}
	base.revision = through
	copy(base.link[:], last)
	c := log.Cursor()
	for k, _ := c.First(); k != nil && bytes.Compare(k, logKey(through)) <= 0; k, _ = c.First() {
		if err := log.Delete(k); err != nil {
			return err
		}
	}
	if err := meta.Put(keySchema, fmt.Append(nil, schema)); err != nil {
		return err
	}
	return meta.Put(keyBase, base.encode())
}

func readHead(tx *bbolt.Tx) (head, error) { return decodeHead(tx.Bucket(bucketMeta).Get(keyHead)) }

// add and remove update the summary for one stored record.
func (h *head) add(stored []byte)    { h.records++; h.xor(stored) }
func (h *head) remove(stored []byte) { h.records--; h.xor(stored) }

func (h *head) xor(stored []byte) {
	for i := range h.sum {
		h.sum[i] ^= stored[i]
	}
}

// chain assigns the next revision to e and returns e in stored form.
func (h *head) chain(e *broker.Entry) ([]byte, error) {
	e.Revision, e.At = h.revision+1, e.At.UTC()
	text, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encoding an audit entry: %w", err)
	}
	h.extend(text)
	return append(h.link[:linkSize:linkSize], text...), nil
}

// extend advances the head by one entry.
func (h *head) extend(text []byte) {
	var room [onStack]byte
	h.link = sha256.Sum256(append(append(room[:0], h.link[:]...), text...))
	h.revision++
}

// onStack is the size of a buffer for the digest of one record or entry. A longer one is on the heap.
const onStack = 2048

// verify advances the head by the entry stored under key, or returns an error if the entry is not the next one.
func (h *head) verify(key, stored []byte) error {
	at := h.revision + 1
	if len(key) != 8 || broker.Revision(binary.BigEndian.Uint64(key)) != at || len(stored) < linkSize {
		return fmt.Errorf("%w: audit entry %d is missing", ErrDamaged, at)
	}
	h.extend(stored[linkSize:])
	if h.link != [linkSize]byte(stored[:linkSize]) {
		return fmt.Errorf("%w: audit entry %d does not follow from the previous one", ErrDamaged, at)
	}
	return nil
}

// match returns an error if a recomputed head differs from the stored one.
func (h head) match(stored head) error {
	switch {
	case h.revision != stored.revision || h.link != stored.link:
		return fmt.Errorf("%w: the audit log ends at revision %d, but the head has revision %d or another link",
			ErrDamaged, h.revision, stored.revision)
	case h.records != stored.records:
		return fmt.Errorf("%w: there are %d records, but the head counts %d", ErrDamaged, h.records, stored.records)
	case h.sum != stored.sum:
		return fmt.Errorf("%w: the records do not match the head's checksum", ErrDamaged)
	}
	return nil
}

// count adds a record, or returns an error if its seal is wrong.
func (h *head) count(key, stored []byte) error {
	if err := checkRecord(key, stored); err != nil {
		return err
	}
	h.add(stored)
	return nil
}

func logKey(r broker.Revision) []byte { return binary.BigEndian.AppendUint64(nil, uint64(r)) }

// seal returns a record in stored form.
func seal(key string, value []byte) []byte {
	stored := make([]byte, sealSize, sealSize+len(value))
	s := sealOf(key, value)
	copy(stored, s[:])
	return append(stored, value...)
}

func sealOf[T string | []byte](key T, value []byte) (s [sealSize]byte) {
	var room [onStack]byte
	text := append(binary.BigEndian.AppendUint32(room[:0], uint32(len(key))), key...)
	sum := sha256.Sum256(append(text, value...))
	copy(s[:], sum[:])
	return s
}

// value returns a stored record's value without a check; nil stays nil.
func value(stored []byte) []byte {
	if stored == nil {
		return nil
	}
	return stored[sealSize:]
}

// open checks a stored record and returns its value.
func open(key string, stored []byte) ([]byte, error) {
	if err := checkRecord(key, stored); err != nil {
		return nil, err
	}
	return stored[sealSize:], nil
}

func checkRecord[T string | []byte](key T, stored []byte) error {
	if len(stored) < sealSize || [sealSize]byte(stored[:sealSize]) != sealOf(key, stored[sealSize:]) {
		return fmt.Errorf("%w: record %q has a wrong seal", ErrDamaged, key)
	}
	return nil
}

// Entries returns up to limit durable entries of the audit log with a revision greater than after.
func (l *Ledger) Entries(ctx context.Context, after broker.Revision, limit int) (list []broker.Entry, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	add := func(r broker.Revision, stored []byte) error {
		var e broker.Entry
		if len(stored) < linkSize {
			return fmt.Errorf("%w: audit entry %d is truncated", ErrDamaged, r)
		}
		if err := json.Unmarshal(stored[linkSize:], &e); err != nil {
			return fmt.Errorf("reading audit entry %d: %w", r, err)
		}
		list = append(list, e)
		return nil
	}
	// A reader of bbolt sees a commit that is written and not synced.
	synced := broker.Revision(l.synced.Load())
	err = l.view(func(btx *bbolt.Tx, p *pending) error {
		err := p.guard(func() error {
			c := btx.Bucket(bucketLog).Cursor()
			for k, v := c.Seek(logKey(after + 1)); k != nil && len(list) < limit; k, v = c.Next() {
				if len(k) != 8 {
					return fmt.Errorf("%w: audit entry %x has a wrong key", ErrDamaged, k)
				}
				if broker.Revision(binary.BigEndian.Uint64(k)) > synced {
					return nil
				}
				if err := add(broker.Revision(binary.BigEndian.Uint64(k)), v); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil || p.isOrdered() { // ordered changes are not durable
			return err
		}
		for i, stored := range p.entries {
			r := p.from.revision + broker.Revision(i) + 1
			if r <= after || r > synced || len(list) >= limit {
				continue
			}
			if err := add(r, stored); err != nil {
				return err
			}
		}
		return nil
	})
	return list, err
}

// Verify checks the audit log and every record, and compares them with the head. The error wraps ErrDamaged and names
// the first wrong revision or record. Verify reads the whole ledger, on a snapshot: it does not block updates. Updates
// that the ledger took before it was checked are not in it yet.
func (l *Ledger) Verify(ctx context.Context) error {
	return l.view(func(btx *bbolt.Tx, p *pending) error {
		return p.guard(func() error {
			stored, err := readHead(btx)
			if err != nil {
				return err
			}
			h, err := decodeBase(btx.Bucket(bucketMeta).Get(keyBase))
			if err != nil {
				return err
			}
			err = btx.Bucket(bucketLog).ForEach(func(k, v []byte) error {
				return errors.Join(ctx.Err(), h.verify(k, v))
			})
			if err != nil {
				return err
			}
			err = btx.Bucket(bucketRecords).ForEach(func(k, v []byte) error {
				return errors.Join(ctx.Err(), h.count(k, v))
			})
			if err != nil {
				return err
			}
			return h.match(stored)
		})
	})
}
