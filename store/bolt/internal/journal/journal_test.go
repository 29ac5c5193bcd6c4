package journal_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/pawlsec/pawl/store/bolt/internal/journal"
)

// write makes a journal of records, and returns its file's content.
func write(t *testing.T, path string, records ...string) []byte {
	t.Helper()
	j, _, err := journal.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if err := j.Append([]byte(r)); err != nil {
			t.Fatalf("Append(%q) = %v, want nil", r, err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// TestTornRecord cuts the power while the last record is written. Whichever part of it has reached the disk, the records
// before it are there, and the next one follows them.
func TestTornRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	before := len(write(t, path, "first", "second"))
	whole := write(t, path, "the third record, of which a part is lost")
	reopen := func(what string, raw []byte) *journal.File {
		t.Helper()
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		j, records, err := journal.Open(path)
		if err != nil || len(records) != 2 || string(records[1]) != "second" {
			t.Fatalf("Open %s = %q, %v; want the two before", what, records, err)
		}
		return j
	}
	for from := before; from < len(whole); from += 5 {
		for to := from + 1; to <= len(whole); to += 20 {
			torn := bytes.Clone(whole)
			if clear(torn[from:to]); bytes.Equal(torn, whole) {
				continue
			}
			if err := reopen(fmt.Sprintf("without bytes %d to %d", from, to), torn).Close(); err != nil {
				t.Fatal(err)
			}
		}
		j := reopen(fmt.Sprintf("cut at byte %d", from), whole[:from])
		if err := errors.Join(j.Append([]byte("next")), j.Close()); err != nil {
			t.Fatal(err)
		}
		j, records, err := journal.Open(path)
		if err != nil || len(records) != 3 || string(records[2]) != "next" {
			t.Fatalf("Open after the next one = %q, %v; want three", records, err)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDamagedRecord changes one byte of a record that a good one follows. It was acknowledged, so it is not dropped.
func TestDamagedRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	first := len(write(t, path, "first"))
	whole := write(t, path, "second")
	for at := 0; at < first; at += 4 {
		raw := bytes.Clone(whole)
		raw[at] ^= 1
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, records, err := journal.Open(path); !errors.Is(err, journal.ErrDamaged) {
			t.Fatalf("Open with another byte %d = %q, %v; want ErrDamaged", at, records, err)
		}
	}
}
