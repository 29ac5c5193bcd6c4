package archive_test

import (
	"fmt"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/store/archive"
)

// some returns records and entries that fill several blocks.
func some(n int) (records []broker.Archived, entries []broker.Entry) {
	for i := range n {
		records = append(records, broker.Archived{Key: fmt.Sprintf("g/%06d", i), Value: fmt.Appendf(nil, "value %d %0300d", i, i*i)})
		entries = append(entries, broker.Entry{Revision: broker.Revision(i + 1), At: brokertest.Epoch, Actor: "test",
			Op: broker.OpOpen, Detail: fmt.Sprint(i)})
	}
	return records, entries
}

// TestEveryByteCounts flips each byte of a segment, and cuts it at each length. Every such file is refused.
func TestEveryByteCounts(t *testing.T) {
	records, entries := some(40)
	raw, err := archive.Make(3, records, entries)
	if err != nil {
		t.Fatal(err)
	}
	if err := archive.Check(raw); err != nil {
		t.Fatalf("Check of a segment as it was written = %v, want nil", err)
	}
	whole := archive.DigestOf(raw)
	for i := range raw {
		changed := append([]byte{}, raw...)
		changed[i] ^= 0x20
		if err := archive.Check(changed); err == nil && archive.DigestOf(changed) == whole {
			t.Fatalf("Check after byte %d of %d was changed = nil, want an error or another digest", i, len(raw))
		}
		if err := archive.Check(raw[:i]); err == nil {
			t.Fatalf("Check of the first %d bytes of %d = nil, want an error", i, len(raw))
		}
	}
}

// FuzzSegment feeds anything to the parser. It neither panics nor allocates more than the file can have, and a file that
// it takes has its entries in order.
func FuzzSegment(f *testing.F) {
	for _, n := range []int{0, 1, 30} {
		raw, err := archive.Make(uint64(n+1), first(some(n)), second(some(n)))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
		f.Add(raw[:len(raw)/2])
	}
	f.Fuzz(func(t *testing.T, raw []byte) { _ = archive.Check(raw) })
}

func first(r []broker.Archived, _ []broker.Entry) []broker.Archived { return r }
func second(_ []broker.Archived, e []broker.Entry) []broker.Entry   { return e }
