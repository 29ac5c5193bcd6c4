package bolt_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/store/bolt"
)

// held opens a ledger whose check does not begin before the test calls check.
func held(t testing.TB, path string) (l *bolt.Ledger, check func()) {
	t.Helper()
	begin := make(chan struct{})
	l, err := bolt.OpenUnchecked(bolt.Config{Path: path, Reserve: -1, BeforeCheck: func() { <-begin }})
	if err != nil {
		t.Fatalf("OpenUnchecked(%q) = %v, want nil", path, err)
	}
	return l, func() {
		close(begin)
		<-l.Checked()
	}
}

// expectOnlyFences fails unless the ledger takes a fence under key and refuses an intent with reason.
func expectOnlyFences(t testing.TB, l *bolt.Ledger, key string, reason error) {
	t.Helper()
	if err := l.Err(); !errors.Is(err, reason) {
		t.Errorf("Err = %v, want %v", err, reason)
	}
	err := l.Update(context.Background(), enter(broker.OpIntent, "g/new"))
	if !errors.Is(err, reason) || !errors.Is(err, broker.ErrNotCommitted) {
		t.Errorf("Update with an intent = %v, want %v and ErrNotCommitted", err, reason)
	}
	if err := l.Update(context.Background(), enter(broker.OpFence, key)); err != nil {
		t.Fatalf("Update with a fence = %v, want nil", err)
	}
	expectRecord(t, l, key)
}

// expectRecord fails unless the ledger has the record and the entry of a fence, each once.
func expectRecord(t testing.TB, l *bolt.Ledger, key string) {
	t.Helper()
	var seen []string
	var head broker.Revision
	err := l.View(context.Background(), func(tx broker.Tx) error {
		v, err := tx.Get(key)
		if err != nil || string(v) != "value of "+key {
			t.Errorf("Get(%s) = %q, %v, want its value", key, v, err)
		}
		if head, err = tx.Head(); err != nil {
			return err
		}
		return tx.Scan(key, "", func(k string, _ []byte) bool { seen = append(seen, k); return true })
	})
	if err != nil || !slices.Equal(seen, []string{key}) {
		t.Errorf("Scan(%s) = %q, %v, want it once", key, seen, err)
	}
	entries, err := l.Entries(context.Background(), max(head, 100)-100, 100)
	n := 0
	for _, e := range entries {
		if e.Detail == key && e.Op == broker.OpFence {
			n++
		}
	}
	if err != nil || n != 1 || entries[len(entries)-1].Revision != head {
		t.Errorf("the last of %d entries has %d fences of %s, %v, want one, up to revision %d", len(entries), n, key, err, head)
	}
}

// large makes a ledger with n closed steps, with the records and entries that the engine leaves of them.
func large(t testing.TB, path string, n int) {
	t.Helper()
	l := mustOpen(t, bolt.Config{Path: path, Reserve: -1})
	ops := []broker.Op{broker.OpIntent, broker.OpHandle, broker.OpIssued, broker.OpEnd, broker.OpClosed}
	const batch = 5000
	value := bytes.Repeat([]byte{7}, 500)
	for from := 0; from < n; from += batch {
		if err := l.Update(t.Context(), func(tx broker.Tx) error {
			for i := from; i < min(from+batch, n); i++ {
				id := fmt.Sprintf("gr_%018d", i)
				err := errors.Join(tx.Put("g/"+id, value), tx.Put(fmt.Sprintf("p/ch_%018d/%s", i/100, id), []byte{}))
				for _, op := range ops {
					_, entered := tx.Append(broker.Entry{At: brokertest.Epoch, Actor: "spiffe://example.org/agent", Op: op,
						Chain: broker.ChainID(fmt.Sprintf("ch_%018d", i/100)), Grant: broker.GrantID(id), Tool: "db.read"})
					err = errors.Join(err, entered)
				}
				if err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// compact does what bbolt's own command does: bbolt compact -o NEW OLD. The new file replaces the old one.
func compact(t testing.TB, path string) {
	t.Helper()
	src, err := bbolt.Open(path, 0o400, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	dst, err := bbolt.Open(path+".compact", 0o600, &bbolt.Options{NoSync: true}) // its flag --no-sync
	if err != nil {
		t.Fatal(err)
	}
	const txMaxSize = 65536 // the command's default
	err = errors.Join(bbolt.Compact(dst, src, txMaxSize), dst.Close(), src.Close(), os.Rename(path+".compact", path))
	if err != nil {
		t.Fatal(err)
	}
}

func copyFile(t testing.TB, to, from string) {
	t.Helper()
	src, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close() //nolint:errcheck // read only
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(dst, src); err != nil {
		t.Fatal(err)
	}
	if err := dst.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestLarge is about a ledger of 15,000 closed steps. A fence does not wait for the check of the file, and a file that
// bbolt has compacted is the same ledger.
func TestLarge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	large(t, path, 15_000)
	t.Run("a fence does not wait for the check", func(t *testing.T) {
		before, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		l, check := held(t, path)
		expectOnlyFences(t, l, "f/1", bolt.ErrChecking)
		expectOnlyFences(t, l, "f/2", bolt.ErrChecking)
		if after, err := os.Stat(path); err != nil || after.ModTime() != before.ModTime() {
			t.Errorf("the file was written before it was checked (%v)", err)
		}
		check()
		if err := l.Err(); err != nil {
			t.Errorf("Err after the check = %v, want nil", err)
		}
		if err := l.Update(t.Context(), enter(broker.OpIntent, "g/new")); err != nil {
			t.Errorf("Update with an intent after the check = %v, want nil", err)
		}
		expectRecord(t, l, "f/1")
		expectRecord(t, l, "f/2")
		if err := errors.Join(l.Verify(t.Context()), l.Close()); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path + ".pending"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the file of pending updates = %v, want none", err)
		}
	})
	t.Run("compacted", func(t *testing.T) {
		before := mustOpen(t, bolt.Config{Path: path, Reserve: -1})
		head, size := headOf(t, before), int64(0)
		if info, err := os.Stat(path); err == nil {
			size = info.Size()
		}
		if err := before.Close(); err != nil {
			t.Fatal(err)
		}
		compact(t, path)
		info, err := os.Stat(path)
		if err != nil || info.Size() >= size {
			t.Errorf("compacted: %v, %v, want fewer than %d bytes", info.Size(), err, size)
		}
		l, check := held(t, path)
		expectOnlyFences(t, l, "f/3", bolt.ErrChecking)
		check()
		if err := l.Err(); err != nil {
			t.Fatalf("Err of a compacted ledger = %v, want nil", err)
		}
		for i := range 50 { // pages of the list are reused
			if err := l.Update(t.Context(), enter(broker.OpIntent, fmt.Sprintf("g/%d", i))); err != nil {
				t.Fatal(err)
			}
		}
		if got := headOf(t, l); got != head+51 {
			t.Errorf("the head is at %d, want %d", got, head+51)
		}
		if err := errors.Join(l.Verify(t.Context()), l.Close()); err != nil {
			t.Error(err)
		}
		l = mustOpen(t, bolt.Config{Path: path, Reserve: -1})
		expectRecord(t, l, "f/3")
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Run("compacted, without one record", func(t *testing.T) {
		change(t, path, true, func(tx *bbolt.Tx) error { return tx.Bucket([]byte("records")).Delete([]byte("f/1")) })
		l, check := held(t, path)
		expectOnlyFences(t, l, "f/4", bolt.ErrChecking)
		check()
		if err := l.Err(); !errors.Is(err, bolt.ErrDamaged) || !strings.Contains(err.Error(), "records, but the head counts") {
			t.Errorf("Err = %v, want ErrDamaged and the number of records", err)
		}
		expectRecord(t, l, "f/4")
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
}

func headOf(t testing.TB, l *bolt.Ledger) (head int64) {
	t.Helper()
	if err := l.View(context.Background(), func(tx broker.Tx) error {
		r, err := tx.Head()
		head = int64(r)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return head
}

// TestPendingSurvives ends the process between each two acts of taking in the fences that were taken during the check.
func TestPendingSurvives(t *testing.T) {
	dir := t.TempDir()
	path, saved := filepath.Join(dir, "ledger"), filepath.Join(dir, "saved")
	fill(t, path, 20)
	l, check := held(t, path)
	expectOnlyFences(t, l, "f/1", bolt.ErrChecking)
	expectOnlyFences(t, l, "f/2", bolt.ErrChecking)
	copyFile(t, saved, path)
	copyFile(t, saved+".pending", path+".pending")
	check()
	if err := errors.Join(l.Err(), l.Close()); err != nil {
		t.Fatal(err)
	}
	reopen := func(what string) {
		t.Helper()
		l := mustOpen(t, bolt.Config{Path: path, Reserve: -1})
		expectRecord(t, l, "f/1")
		expectRecord(t, l, "f/2")
		if err := errors.Join(l.Verify(t.Context()), l.Close()); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	reopen("taken in")

	copyFile(t, path+".pending", saved+".pending")
	reopen("killed after the commit, and before the updates were removed")

	copyFile(t, path, saved)
	copyFile(t, path+".pending", saved+".pending")
	reopen("killed before the check had ended")

	copyFile(t, path, saved)
	raw, err := os.ReadFile(saved + ".pending")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".pending", append(raw, raw[:len(raw)/3]...), 0o600); err != nil {
		t.Fatal(err)
	}
	reopen("killed while a third fence was written")

	// An older copy was put back, without the fences.
	fill(t, path+".old", 3)
	copyFile(t, path, path+".old")
	copyFile(t, path+".pending", saved+".pending")
	_, err = bolt.Open(bolt.Config{Path: path, Reserve: -1})
	if !errors.Is(err, bolt.ErrDamaged) || !strings.Contains(err.Error(), "follow revision 20 of another copy") {
		t.Errorf("Open of an older copy = %v, want ErrDamaged and the revision", err)
	}
	raw[len(raw)/4] ^= 1
	copyFile(t, path, saved)
	if err := os.WriteFile(path+".pending", raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err = bolt.Open(bolt.Config{Path: path, Reserve: -1}); !errors.Is(err, bolt.ErrDamaged) {
		t.Errorf("Open with damaged updates beside it = %v, want ErrDamaged", err)
	}
}

// TestFailedCheck takes fences before and after the check finds that a record is missing. They stay, over a restart too,
// and the damaged file stays as it is.
func TestFailedCheck(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	fill(t, path, 20)
	change(t, path, false, func(tx *bbolt.Tx) error { return tx.Bucket([]byte("records")).Delete([]byte("d/03")) })
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	l, check := held(t, path)
	expectOnlyFences(t, l, "f/1", bolt.ErrChecking)
	check()
	expectOnlyFences(t, l, "f/2", bolt.ErrDamaged)
	expectRecord(t, l, "f/1")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l, check = held(t, path)
	expectRecord(t, l, "f/1")
	expectRecord(t, l, "f/2")
	check()
	expectOnlyFences(t, l, "f/3", bolt.ErrDamaged)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the damaged file was changed (%v)", err)
	}
}

// TestUncheckedDamage reads damaged files that are not checked yet. Each read has its value or fails, and none ends the
// process.
func TestUncheckedDamage(t *testing.T) {
	good := newSpecimen(t)
	path := filepath.Join(t.TempDir(), "ledger")
	opened, failed := 0, 0
	for seed := range uint64(300) {
		bad, what := good.damage(rand.New(rand.NewPCG(seed, 1)))
		_ = os.Remove(path + ".pending") // of the round before, if it took a fence
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		begin := make(chan struct{})
		l, err := bolt.OpenUnchecked(bolt.Config{Path: path, Reserve: -1, BeforeCheck: func() { <-begin }})
		if err != nil {
			continue
		}
		opened++
		errs := []error{
			l.View(t.Context(), func(tx broker.Tx) error {
				return tx.Scan("", "", func(string, []byte) bool { return true })
			}),
			l.Update(t.Context(), enter(broker.OpFence, "g/100")),
		}
		_, err = l.Entries(t.Context(), 0, 1<<30)
		for _, err := range append(errs, err) {
			if err != nil {
				failed++
			}
		}
		close(begin)
		if err := l.Close(); err != nil {
			t.Errorf("seed %d: %s: Close = %v, want nil", seed, what, err)
		}
	}
	t.Logf("%d of 300 files opened, and %d reads failed", opened, failed)
	if opened < 100 || failed == 0 {
		t.Errorf("%d files opened, and %d reads failed: the damage is not representative", opened, failed)
	}
}

// TestFreeList damages the list of free pages of a compacted file. bbolt would write over the pages on it.
func TestFreeList(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	fill(t, path, 20)
	compact(t, path)
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const page = 4096
	for at := 2 * page; ; at += page { // the page with the flag 0x10
		if at >= len(raw) {
			t.Fatal("the compacted file has no list of free pages")
		}
		if raw[at+8] == 0x10 && raw[at+10] > 0 {
			for id := range byte(len(raw) / page) {
				bad := bytes.Clone(raw)
				if bad[at+16] == id {
					continue
				}
				bad[at+16] = id
				if err := os.WriteFile(path, bad, 0o600); err != nil {
					t.Fatal(err)
				}
				l, err := bolt.Open(bolt.Config{Path: path, Reserve: -1})
				if err == nil { // the page is free, but is not on the list twice
					err = l.Verify(t.Context())
					if err := errors.Join(err, l.Close()); err != nil {
						t.Errorf("a list with page %d: %v", id, err)
					}
					continue
				}
				if !errors.Is(err, bolt.ErrDamaged) {
					t.Errorf("Open of a list with page %d = %v, want ErrDamaged", id, err)
				}
			}
			break
		}
	}
}
