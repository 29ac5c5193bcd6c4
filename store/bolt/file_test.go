package bolt_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/store/bolt"
)

func TestOpen(t *testing.T) {
	if _, err := bolt.Open(bolt.Config{}); err == nil || !strings.Contains(err.Error(), "Path") {
		t.Errorf("Open without a path = %v, want an error that names Path", err)
	}
	path := filepath.Join(t.TempDir(), "ledger")
	if err := os.Mkdir(path+".reserve", 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := bolt.Open(bolt.Config{Path: path}); err == nil ||
		!strings.Contains(err.Error(), "acquiring the reserve") {
		t.Errorf("Open with a directory in place of the reserve = %v, want \"acquiring the reserve\" in it", err)
	}
	if err := os.Remove(path + ".reserve"); err != nil {
		t.Fatal(err)
	}
	l := mustOpen(t, bolt.Config{Path: path, Reserve: 1 << 20})
	for _, name := range []string{path, path + ".reserve"} {
		info, err := os.Stat(name)
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("%s has mode %v, %v, want 0600", name, info.Mode(), err)
		}
	}
	_, err := bolt.Open(bolt.Config{Path: path, LockTimeout: 1})
	if !errors.Is(err, bolt.ErrInUse) || !strings.Contains(err.Error(), path) {
		t.Errorf("Open of a ledger in use = %v, want ErrInUse and the path", err)
	}
	if err := l.Close(); err != nil {
		t.Fatalf("Close = %v, want nil", err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("Close again = %v, want nil", err)
	}
	if err := l.Update(t.Context(), enter(broker.OpOpen, "a")); !errors.Is(err, bolt.ErrClosed) || !errors.Is(err, broker.ErrNotCommitted) {
		t.Errorf("Update after Close = %v, want ErrClosed and ErrNotCommitted", err)
	}
}

// TestOpenRefuses changes a good ledger with bbolt itself. The file's structure stays valid, and only its content is
// wrong.
func TestOpenRefuses(t *testing.T) {
	log := func(tx *bbolt.Tx) *bbolt.Bucket { return tx.Bucket([]byte("log")) }
	records := func(tx *bbolt.Tx) *bbolt.Bucket { return tx.Bucket([]byte("records")) }
	for _, c := range []struct {
		name   string
		change func(*bbolt.Tx) error
		want   error
		text   string
	}{
		{"newer schema", func(tx *bbolt.Tx) error { return tx.Bucket([]byte("meta")).Put([]byte("schema"), []byte("3")) },
			bolt.ErrNewer, "schema 3, this version supports schemas up to 2"},
		{"no schema", func(tx *bbolt.Tx) error { return tx.Bucket([]byte("meta")).Delete([]byte("schema")) },
			bolt.ErrDamaged, "schema"},
		{"no head", func(tx *bbolt.Tx) error { return tx.Bucket([]byte("meta")).Delete([]byte("head")) },
			bolt.ErrDamaged, "head"},
		{"no log", func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte("log")) },
			bolt.ErrDamaged, "bucket"},
		{"entry changed", func(tx *bbolt.Tx) error {
			k := []byte{0, 0, 0, 0, 0, 0, 0, 7}
			return log(tx).Put(k, bytes.Replace(log(tx).Get(k), []byte("fence"), []byte("hence"), 1))
		}, bolt.ErrDamaged, "entry 7 does not follow"},
		{"entry lost", func(tx *bbolt.Tx) error { return log(tx).Delete([]byte{0, 0, 0, 0, 0, 0, 0, 7}) },
			bolt.ErrDamaged, "entry 7 is missing"},
		{"last entry lost", func(tx *bbolt.Tx) error {
			k, _ := log(tx).Cursor().Last()
			return log(tx).Delete(k)
		}, bolt.ErrDamaged, "ends at revision 19, but the head has revision 20"},
		{"record changed", func(tx *bbolt.Tx) error {
			v := bytes.Clone(records(tx).Get([]byte("d/03")))
			v[len(v)-1] ^= 1
			return records(tx).Put([]byte("d/03"), v)
		}, bolt.ErrDamaged, `"d/03"`},
		{"record moved", func(tx *bbolt.Tx) error {
			return records(tx).Put([]byte("d/03"), bytes.Clone(records(tx).Get([]byte("d/04"))))
		}, bolt.ErrDamaged, `"d/03"`},
		{"record lost", func(tx *bbolt.Tx) error { return records(tx).Delete([]byte("d/03")) },
			bolt.ErrDamaged, "19 records, but the head counts 20"},
		{"older version of a record", func(tx *bbolt.Tx) error {
			return records(tx).Put([]byte("d/03"), bolt.Seal("d/03", "older"))
		}, bolt.ErrDamaged, "do not match the head's checksum"},
	} {
		refused := func(t *testing.T, compacted bool) {
			path := filepath.Join(t.TempDir(), "ledger")
			fill(t, path, 20)
			if compacted {
				compact(t, path)
			}
			change(t, path, compacted, c.change)
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = bolt.Open(bolt.Config{Path: path, Reserve: -1})
			text := fmt.Sprint(err)
			if !errors.Is(err, c.want) || !strings.Contains(text, path) || !strings.Contains(text, c.text) {
				t.Errorf("Open = %v, want %v with the path and %q", err, c.want, c.text)
			}
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
				t.Errorf("Open changed the file that it refused (%v)", err)
			}
		}
		t.Run(c.name, func(t *testing.T) { refused(t, false) })
		t.Run(c.name+", compacted", func(t *testing.T) { refused(t, true) })
	}
}

// change runs f on the file without the ledger's knowledge. list keeps a list of free pages.
func change(t *testing.T, path string, list bool, f func(*bbolt.Tx) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoFreelistSync: !list})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Update(f), db.Close()); err != nil {
		t.Fatal(err)
	}
}

// fill makes a ledger with n fenced nodes.
func fill(t testing.TB, path string, n int) {
	t.Helper()
	l := mustOpen(t, bolt.Config{Path: path, Reserve: -1})
	for i := range n {
		if err := l.Update(t.Context(), enter(broker.OpFence, fmt.Sprintf("d/%02d", i))); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestDamage flips bits in ledger files, overwrites and truncates them. A file that still opens must have its content
// unchanged.
func TestDamage(t *testing.T) {
	t.Run("as written", func(t *testing.T) { damageAll(t, newSpecimen(t)) })
	t.Run("compacted", func(t *testing.T) { damageAll(t, newSpecimen(t).compact(t)) })
}

func damageAll(t *testing.T, good specimen) {
	opened := 0
	const rounds = 200
	for seed := range uint64(rounds) {
		bad, what := good.damage(rand.New(rand.NewPCG(seed, 1)))
		if good.survives(t, bad, fmt.Sprintf("seed %d: %s", seed, what)) {
			opened++
		}
	}
	t.Logf("%d of %d damaged files opened with their content unchanged, %d were refused", opened, rounds, rounds-opened)
	if opened == 0 || opened > rounds/2 {
		t.Errorf("%d of %d damaged files opened: the damage is not representative", opened, rounds)
	}
}

// TestMetaPages damages the meta pages. bbolt itself would recover by going back one transaction, which may have been a
// fence.
func TestMetaPages(t *testing.T) {
	const page = 4096
	good := newSpecimen(t)
	past := filepath.Join(t.TempDir(), "past")
	fill(t, past, 3)
	old, err := os.ReadFile(past)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		damage func(b []byte) []byte
	}{
		{"newer or older meta page flipped, 0", func(b []byte) []byte { b[16+50] ^= 1; return b }},
		{"newer or older meta page flipped, 1", func(b []byte) []byte { b[page+16+50] ^= 1; return b }},
		{"meta page 0 of another file", func(b []byte) []byte { copy(b[:page], old); return b }},
		{"meta page 1 of another file", func(b []byte) []byte { copy(b[page:2*page], old[page:]); return b }},
		{"truncated by one byte", func(b []byte) []byte { return b[:len(b)-1] }},
		{"truncated to zero bytes", func(b []byte) []byte { return nil }},
	} {
		if good.survives(t, c.damage(bytes.Clone(good.bytes)), c.name) {
			t.Errorf("%s: it opened, want ErrDamaged", c.name)
		}
	}
}

// FuzzDamage searches for undetected damage. It xors bytes at an offset.
func FuzzDamage(f *testing.F) {
	good := newSpecimen(f)
	f.Add(uint32(0), []byte{1})
	f.Add(uint32(4096+10), []byte{1, 0})
	f.Add(uint32(2*4096+12), []byte{0, 0, 0, 0x80})
	f.Fuzz(func(t *testing.T, at uint32, mask []byte) {
		bad := bytes.Clone(good.bytes)
		for i, m := range mask {
			bad[(int(at)+i)%len(bad)] ^= m
		}
		good.survives(t, bad, fmt.Sprintf("%x at %d", mask, at))
	})
}

// specimen is a ledger file with its content.
type specimen struct {
	bytes []byte // up to the last page in use
	dump  string
}

func newSpecimen(t testing.TB) specimen {
	path := filepath.Join(t.TempDir(), "ledger")
	random := rand.New(rand.NewPCG(1, 2))
	for range 4 { // reopened, so that pages are freed and reused
		l := mustOpen(t, bolt.Config{Path: path, Reserve: -1})
		for range 40 {
			err := l.Update(t.Context(), func(tx broker.Tx) error {
				for range 3 {
					var value []byte
					if n := random.IntN(1500); n > 200 {
						value = bytes.Repeat([]byte{byte(n)}, n)
					}
					if err := tx.Put(fmt.Sprintf("g/%03d", random.IntN(200)), value); err != nil {
						return err
					}
				}
				return enter(broker.OpIntent, "big")(tx)
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		big := func(tx broker.Tx) error {
			return errors.Join(enter(broker.OpFence, "d/1")(tx), tx.Put("big", make([]byte, 10_000)))
		}
		if err := errors.Join(l.Update(t.Context(), big), l.Close()); err != nil {
			t.Fatal(err)
		}
	}
	return readSpecimen(t, path)
}

// compact returns the specimen after bbolt has compacted it.
func (s specimen) compact(t testing.TB) specimen {
	path := filepath.Join(t.TempDir(), "ledger")
	if err := os.WriteFile(path, s.bytes, 0o600); err != nil {
		t.Fatal(err)
	}
	compact(t, path)
	compacted := readSpecimen(t, path)
	if compacted.dump != s.dump || len(compacted.bytes) > len(s.bytes) {
		t.Errorf("a compacted ledger has other content, or %d bytes after %d", len(compacted.bytes), len(s.bytes))
	}
	return compacted
}

func readSpecimen(t testing.TB, path string) specimen {
	all, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	err = db.View(func(tx *bbolt.Tx) error {
		all = all[:tx.Size()]
		return nil
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	return specimen{all, mustDump(t, path)}
}

// damage returns a damaged copy and a description of the damage.
func (s specimen) damage(r *rand.Rand) (bad []byte, what string) {
	bad = bytes.Clone(s.bytes)
	at := r.IntN(len(bad))
	switch r.IntN(5) {
	case 0:
		return bad[:at], fmt.Sprintf("truncated to %d bytes", at)
	case 1:
		sector := at / 512 * 512
		clear(bad[sector:min(sector+512, len(bad))])
		return bad, fmt.Sprintf("sector at %d is zeros", sector)
	case 2: // in a page header or the first elements
		at = at/4096*4096 + r.IntN(64)
	}
	bit := r.IntN(8)
	bad[min(at, len(bad)-1)] ^= 1 << bit
	return bad, fmt.Sprintf("bit %d of byte %d flipped", bit, at)
}

// survives reports whether the file opens. It fails the test if the file opens with other content.
func (s specimen) survives(t *testing.T, bad []byte, what string) bool {
	t.Helper()
	dir, err := os.MkdirTemp("", "damage") // t.TempDir would keep all files until the end of the test
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	path := filepath.Join(dir, "ledger")
	if err := os.WriteFile(path, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := dump(t, path)
	switch {
	case err != nil && !errors.Is(err, bolt.ErrDamaged) && !errors.Is(err, bolt.ErrNewer):
		t.Errorf("%s: Open = %v, want ErrDamaged", what, err)
	case err != nil && !strings.Contains(err.Error(), path):
		t.Errorf("%s: Open = %v, want the path in it", what, err)
	case err == nil && got != s.dump:
		t.Errorf("%s: it opened with other content", what)
	}
	return err == nil
}

// dump returns the whole content of a ledger.
func dump(t testing.TB, path string) (string, error) {
	l, err := bolt.Open(bolt.Config{Path: path, Reserve: -1})
	if err != nil {
		return "", err
	}
	defer func() { _ = l.Close() }() // only read
	var b strings.Builder
	err = l.View(t.Context(), func(tx broker.Tx) error {
		err := tx.Scan("", "", func(k string, v []byte) bool {
			again, err := tx.Get(k) // on another path through the tree
			if err != nil || !bytes.Equal(again, v) {
				t.Errorf("Get(%s) differs from Scan (%v)", k, err)
			}
			fmt.Fprintf(&b, "%s=%x\n", k, v)
			return true
		})
		return err
	})
	if err != nil {
		return "", err
	}
	entries, err := l.Entries(t.Context(), 0, 1<<30)
	fmt.Fprint(&b, entries)
	return b.String(), errors.Join(err, l.Verify(t.Context()))
}

func mustDump(t testing.TB, path string) string {
	t.Helper()
	s, err := dump(t, path)
	if err != nil {
		t.Fatalf("Open(%q) = %v, want nil", path, err)
	}
	return s
}

// TestKilled kills a writing process several times. Every acknowledged update must be in the file, and the file must be
// intact.
func TestKilled(t *testing.T) {
	if path := os.Getenv("PAWL_TEST_LEDGER"); path != "" {
		writeUntilKilled(t, path)
		return
	}
	path := filepath.Join(t.TempDir(), "ledger")
	acknowledged := map[string]bool{}
	for round := range 5 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), "PAWL_TEST_LEDGER="+path, fmt.Sprintf("PAWL_TEST_ROUND=%d", round))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			if key, ok := strings.CutPrefix(lines.Text(), "done "); ok {
				acknowledged[key] = true
			}
			if n == 300+100*round {
				_ = cmd.Process.Kill() // it may have exited already
			}
		}
		_ = cmd.Wait() // it was killed

		l := mustOpen(t, bolt.Config{Path: path, Reserve: -1})
		found := map[string]bool{}
		for _, key := range keys(t, l) {
			found[key] = true
		}
		for key := range acknowledged {
			if !found[key] {
				t.Errorf("round %d: %s was acknowledged and is lost", round, key)
			}
		}
		if len(acknowledged) < 300*(round+1) {
			t.Fatalf("round %d: only %d updates were acknowledged", round, len(acknowledged))
		}
		if err := errors.Join(l.Verify(t.Context()), l.Close()); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
}

// writeUntilKilled writes from many goroutines and prints each acknowledged key, until the process is killed.
func writeUntilKilled(t *testing.T, path string) {
	l := mustOpen(t, bolt.Config{Path: path, Reserve: -1})
	var mu sync.Mutex // guards stdout's lines
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := range 100_000 {
				key := "g/" + os.Getenv("PAWL_TEST_ROUND") + "/" + strconv.Itoa(w) + "/" + strconv.Itoa(i)
				if err := l.Update(t.Context(), enter(broker.OpIntent, key)); err != nil {
					return
				}
				mu.Lock()
				fmt.Println("done " + key)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

// TestTreeShapes compares the reader of the file with bbolt's writer for many shapes of tree. Every ledger must open
// again, and pass bbolt's own check.
func TestTreeShapes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 3))
		l := mustOpen(t, bolt.Config{Path: path, Reserve: -1})
		for range 30 {
			err := l.Update(t.Context(), func(tx broker.Tx) error {
				for range r.IntN(300) {
					key := fmt.Sprintf("%c/%d", 'a'+rune(r.IntN(3)), r.IntN(3000))
					value := make([]byte, r.IntN(900))
					if r.IntN(10) < int(seed%10) {
						value = nil
					}
					if err := tx.Put(key, value); err != nil {
						return err
					}
				}
				_, err := tx.Append(broker.Entry{At: brokertest.Epoch, Op: broker.OpIntent})
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		change(t, path, false, func(tx *bbolt.Tx) error {
			for err := range tx.Check() {
				t.Errorf("bbolt finds: %v", err)
			}
			return nil
		})
	}
}
