package wire_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/wire"
	"github.com/pawlsec/pawl/store/bolt"
)

// TestWithoutKeep has keep unset, set, and unset again. Without it, and without a segment, there is no archive, no
// directory, and the ledger's file has the schema that earlier versions read.
func TestWithoutKeep(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ledger.db")
	l, err := bolt.Open(bolt.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	enter := func(tx broker.Tx) error {
		_, err := tx.Append(broker.Entry{At: time.Now().Add(-3 * time.Hour), Op: broker.OpResume})
		return err
	}
	if err := l.Update(t.Context(), enter); err != nil {
		t.Fatal(err)
	}
	files := func() (names []string) {
		list, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range list {
			names = append(names, f.Name())
		}
		return names
	}
	before := files()
	if a, err := wire.OpenArchive(t.Context(), l, wire.Config{Ledger: path}, nil); a != nil || err != nil {
		t.Errorf("without keep the archive is %v, %v; want none", a, err)
	}
	a, err := wire.OpenArchive(t.Context(), l, wire.Config{Ledger: path, Keep: time.Hour}, nil)
	if a == nil || err != nil {
		t.Fatalf("with keep the archive is %v, %v; want one", a, err)
	}
	if _, err := a.Entries(t.Context(), 0, 10); err != nil {
		t.Fatal(err)
	}
	if after := files(); !slices.Equal(after, before) {
		t.Errorf("before a segment the directory has %q, want %q", after, before)
	}
	if _, err := a.Add(t.Context(), nil, time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if a, err := wire.OpenArchive(t.Context(), l, wire.Config{Ledger: path}, nil); a == nil || err != nil {
		t.Errorf("without keep, but with a segment, the archive is %v, %v; want one", a, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close() //nolint:errcheck // only read
	if err := db.View(func(tx *bbolt.Tx) error {
		if got := string(tx.Bucket([]byte("meta")).Get([]byte("schema"))); got != "1" {
			t.Errorf("before the log is trimmed its schema is %q, want 1", got)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
