package bolt

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker"
)

// A record is stored as its seal and its value; an entry as its link and its JSON.
const (
	sealSize = 16
	linkSize = sha256.Size
)

// ends reports whether an entry may use up the reserve of disk space: what it records makes
// less authority, never more. A start is one, and the policy bundle that it begins with: without
// them a full disk would keep a broker that was restarted from fencing.
func ends(op broker.Op) bool {
	switch op {
	case broker.OpFence, broker.OpFreeze, broker.OpViolation, broker.OpEvidence,
		broker.OpClosed, broker.OpClosure, broker.OpEnd, broker.OpResume, broker.OpPolicy:
		return true
	}
	return false
}

// head sums up the ledger. It changes in the same transaction as what it sums up.
type head struct {
	revision broker.Revision // of the last entry
	link     [linkSize]byte  // of the last entry: SHA-256(link before || JSON), zeros before the first
	records  uint64          // how many there are
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

func readHead(tx *bbolt.Tx) (head, error) { return decodeHead(tx.Bucket(bucketMeta).Get(keyHead)) }

// add and remove count a stored record in and out.
func (h *head) add(stored []byte)    { h.records++; h.xor(stored) }
func (h *head) remove(stored []byte) { h.records--; h.xor(stored) }

func (h *head) xor(stored []byte) {
	for i := range h.sum {
		h.sum[i] ^= stored[i]
	}
}

// chain gives e the next revision and returns it as it is stored.
func (h *head) chain(e *broker.Entry) ([]byte, error) {
	e.Revision, e.At = h.revision+1, e.At.UTC()
	text, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encoding an audit entry: %w", err)
	}
	h.follow(text)
	return append(h.link[:linkSize:linkSize], text...), nil
}

// follow goes on to the next entry.
func (h *head) follow(text []byte) {
	sum := sha256.New()
	sum.Write(h.link[:])
	sum.Write(text)
	sum.Sum(h.link[:0])
	h.revision++
}

// verify goes on to the entry stored under key and says what is wrong with it.
func (h *head) verify(key, stored []byte) error {
	at := h.revision + 1
	if len(key) != 8 || broker.Revision(binary.BigEndian.Uint64(key)) != at || len(stored) < linkSize {
		return fmt.Errorf("%w: audit entry %d is missing", ErrDamaged, at)
	}
	h.follow(stored[linkSize:])
	if h.link != [linkSize]byte(stored[:linkSize]) {
		return fmt.Errorf("%w: audit entry %d does not follow from the one before", ErrDamaged, at)
	}
	return nil
}

// match says in what a recount differs from the head that was stored.
func (h head) match(stored head) error {
	switch {
	case h.revision != stored.revision || h.link != stored.link:
		return fmt.Errorf("%w: the audit log ends at revision %d, the head says %d", ErrDamaged, h.revision, stored.revision)
	case h.records != stored.records:
		return fmt.Errorf("%w: there are %d records, the head says %d", ErrDamaged, h.records, stored.records)
	case h.sum != stored.sum:
		return fmt.Errorf("%w: the records are not those the head sums up", ErrDamaged)
	}
	return nil
}

// count goes on to a record, unless it is not what was put.
func (h *head) count(key, stored []byte) error {
	if err := checkRecord(key, stored); err != nil {
		return err
	}
	h.add(stored)
	return nil
}

func logKey(r broker.Revision) []byte { return binary.BigEndian.AppendUint64(nil, uint64(r)) }

// seal gives a record as it is stored.
func seal(key string, value []byte) []byte {
	stored := make([]byte, sealSize, sealSize+len(value))
	s := sealOf([]byte(key), value)
	copy(stored, s[:])
	return append(stored, value...)
}

func sealOf(key, value []byte) (s [sealSize]byte) {
	h := sha256.New()
	var n [4]byte
	binary.BigEndian.PutUint32(n[:], uint32(len(key)))
	h.Write(n[:])
	h.Write(key)
	h.Write(value)
	copy(s[:], h.Sum(nil))
	return s
}

// value is what was put, without checking; nil stays nil.
func value(stored []byte) []byte {
	if stored == nil {
		return nil
	}
	return stored[sealSize:]
}

// open gives a record's value, or refuses it.
func open(key string, stored []byte) ([]byte, error) {
	if err := checkRecord([]byte(key), stored); err != nil {
		return nil, err
	}
	return stored[sealSize:], nil
}

func checkRecord(key, stored []byte) error {
	if len(stored) < sealSize || [sealSize]byte(stored[:sealSize]) != sealOf(key, stored[sealSize:]) {
		return fmt.Errorf("%w: record %q does not carry its own seal", ErrDamaged, key)
	}
	return nil
}

// Entries gives up to limit entries of the audit log with a revision greater than after.
func (l *Ledger) Entries(ctx context.Context, after broker.Revision, limit int) (list []broker.Entry, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	err = l.db.View(func(btx *bbolt.Tx) error {
		c := btx.Bucket(bucketLog).Cursor()
		for k, v := c.Seek(logKey(after + 1)); k != nil && len(list) < limit; k, v = c.Next() {
			var e broker.Entry
			if len(v) < linkSize {
				return fmt.Errorf("%w: audit entry %x is cut", ErrDamaged, k)
			}
			if err := json.Unmarshal(v[linkSize:], &e); err != nil {
				return fmt.Errorf("reading audit entry %x: %w", k, err)
			}
			list = append(list, e)
		}
		return nil
	})
	return list, err
}

// Verify walks the audit log and every record and compares them with the head. The error wraps
// ErrDamaged and names the first revision or record that is wrong. It reads the whole ledger,
// on a snapshot: updates go on meanwhile.
func (l *Ledger) Verify(ctx context.Context) error {
	return l.db.View(func(btx *bbolt.Tx) error {
		stored, err := readHead(btx)
		if err != nil {
			return err
		}
		var h head
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
}
