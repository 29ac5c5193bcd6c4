package archive_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/store/archive"
)

// world is a ledger with its archive.
type world struct {
	testing.TB
	*archive.Archive
	ledger *brokertest.Memory
	dir    string
	all    map[string]string // every record that was ever written
	fault  func(archive.Stage) error
}

func newWorld(t testing.TB) *world {
	w := &world{TB: t, ledger: brokertest.NewMemory(), dir: filepath.Join(t.TempDir(), "archive"), all: map[string]string{}}
	w.reopen()
	return w
}

// reopen makes the archive of the next process.
func (w *world) reopen() {
	w.Helper()
	a, err := archive.New(archive.WithFault(archive.Config{Ledger: w.ledger, Dir: w.dir}, func(at archive.Stage) error {
		if w.fault != nil {
			return w.fault(at)
		}
		return nil
	}))
	if err != nil {
		w.Fatalf("New = %v, want nil", err)
	}
	w.Archive = a
}

// put writes records, with an entry of the hour.
func (w *world) put(hour int, keys ...string) {
	w.Helper()
	if err := w.Update(w.Context(), func(tx broker.Tx) error {
		for _, key := range keys {
			w.all[key] = "value of " + key
			if err := tx.Put(key, []byte(w.all[key])); err != nil {
				return err
			}
		}
		_, err := tx.Append(broker.Entry{At: at(hour), Actor: "test", Op: broker.OpOpen, Detail: strings.Join(keys, " ")})
		return err
	}); err != nil {
		w.Fatalf("Update = %v, want nil", err)
	}
}

func at(hour int) time.Time { return brokertest.Epoch.Add(time.Duration(hour) * time.Hour) }

// records returns records as the ledger has them.
func (w *world) records(keys ...string) (list []broker.Archived) {
	for _, key := range keys {
		list = append(list, broker.Archived{Key: key, Value: []byte(w.all[key])})
	}
	return list
}

// remove removes the records, as the engine after an Add.
func (w *world) remove(s broker.Segment) {
	w.Helper()
	if err := w.Records(w.Context(), s, func(part []broker.Archived) error {
		return w.Update(w.Context(), func(tx broker.Tx) error {
			for _, r := range part {
				if err := tx.Put(r.Key, nil); err != nil {
					return err
				}
			}
			return enter(tx)
		})
	}); err != nil {
		w.Fatalf("removing the records of %s = %v, want nil", s.Name, err)
	}
	if err := w.Update(w.Context(), func(tx broker.Tx) error {
		return errors.Join(tx.Trim(s.Last), w.Finish(tx, s), enter(tx))
	}); err != nil {
		w.Fatalf("Finish = %v, want nil", err)
	}
}

func enter(tx broker.Tx) error {
	_, err := tx.Append(broker.Entry{At: at(1000), Actor: "pawl", Op: broker.OpArchived})
	return err
}

// move archives records and the entries before an hour.
func (w *world) move(hour int, keys ...string) broker.Segment {
	w.Helper()
	s, err := w.Add(w.Context(), w.records(keys...), at(hour))
	if err != nil {
		w.Fatalf("Add = %v, want nil", err)
	}
	w.remove(s)
	return s
}

// holds checks that nothing was lost and nothing is there twice: by each way to read.
func (w *world) holds() {
	w.Helper()
	var want []string
	for key, value := range w.all {
		want = append(want, key+"="+value)
	}
	slices.Sort(want)
	if err := w.History(w.Context(), func(tx broker.Tx) error {
		own := func(list []string) []string {
			return slices.DeleteFunc(list, func(s string) bool { return strings.HasPrefix(s, "s/") })
		}
		if got, err := scan(tx.Scan, "", ""); err != nil || !slices.Equal(own(got), want) {
			w.Errorf("Scan = %q, %v, want %q", got, err, want)
		}
		back, err := scan(tx.ScanBack, "", "")
		if slices.Reverse(back); err != nil || !slices.Equal(own(back), want) {
			w.Errorf("ScanBack, reversed = %q, %v, want %q", back, err, want)
		}
		for key, value := range w.all {
			if got, err := tx.Get(key); err != nil || string(got) != value {
				w.Errorf("Get(%q) = %q, %v, want %q", key, got, err, value)
			}
		}
		return nil
	}); err != nil {
		w.Errorf("History = %v, want nil", err)
	}
	if err := w.Verify(w.Context()); err != nil {
		w.Errorf("Verify = %v, want nil", err)
	}
	if err := w.Missing(w.Context()); err != nil {
		w.Errorf("Missing = %v, want nil", err)
	}
	next := broker.Revision(1)
	for {
		page, err := w.Entries(w.Context(), next-1, 3)
		if err != nil {
			w.Errorf("Entries after %d = %v, want nil", next-1, err)
		}
		for _, e := range page {
			if e.Revision != next {
				w.Fatalf("entry %d follows entry %d", e.Revision, next-1)
			}
			next++
		}
		if len(page) < 3 {
			break
		}
	}
	if err := w.View(w.Context(), func(tx broker.Tx) error {
		if head, err := tx.Head(); head != next-1 || err != nil {
			w.Errorf("the log ends at entry %d, want %d (%v)", next-1, head, err)
		}
		return nil
	}); err != nil {
		w.Error(err)
	}
}

func scan(f func(prefix, from string, f func(string, []byte) bool) error, prefix, from string) (list []string, err error) {
	err = f(prefix, from, func(key string, value []byte) bool {
		list = append(list, key+"="+string(value))
		return true
	})
	return list, err
}

func TestMove(t *testing.T) {
	w := newWorld(t)
	w.put(1, "c/1", "g/1", "g/2")
	w.put(2, "c/2", "g/3")
	w.put(9, "c/3", "g/4")
	w.holds()
	s := w.move(2, "c/1", "g/1", "g/2") // entry 2 is not old enough
	if s.Number != 1 || s.Name != "00000001.segment" || s.Records != 3 || s.Last != 1 {
		t.Errorf("Add = %+v, want the first segment with 3 records and entry 1", s)
	}
	w.holds()
	for name, want := range map[string]os.FileMode{w.dir: os.ModeDir | 0o700, filepath.Join(w.dir, s.Name): 0o600} {
		if info, err := os.Stat(name); err != nil || info.Mode() != want {
			t.Errorf("%s has mode %v, %v, want %v", name, info.Mode(), err, want)
		}
	}
	if err := w.View(t.Context(), func(tx broker.Tx) error {
		got, err := scan(tx.Scan, "g/", "")
		if want := []string{"g/3=value of g/3", "g/4=value of g/4"}; !slices.Equal(got, want) {
			t.Errorf("the ledger has %q, want %q", got, want)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	w.reopen()
	w.holds()
	w.move(3, "c/2", "g/3")
	if s, err := w.Add(t.Context(), nil, at(3)); err != nil || s.Number != 0 {
		t.Errorf("Add of nothing = %+v, %v, want no segment", s, err)
	}
	w.holds()
	w.all["g/1"] = "a later value of the ledger counts"
	if err := w.Update(t.Context(), func(tx broker.Tx) error {
		return errors.Join(tx.Put("g/1", []byte(w.all["g/1"])), enter(tx))
	}); err != nil {
		t.Fatal(err)
	}
	w.holds()
}

// hooked is a ledger that runs a function before it reads entries.
type hooked struct {
	broker.Ledger
	before func()
}

func (h *hooked) Entries(ctx context.Context, after broker.Revision, limit int) ([]broker.Entry, error) {
	if f := h.before; f != nil {
		h.before = nil
		f()
	}
	return h.Ledger.Entries(ctx, after, limit)
}

// TestEntriesWhileMoving moves entries between the two reads of one page.
func TestEntriesWhileMoving(t *testing.T) {
	for _, moved := range []int{0, 2} { // before the page is read
		w := newWorld(t)
		for i := range 6 {
			w.put(i, fmt.Sprintf("c/%d", i))
		}
		if moved > 0 {
			w.move(moved, "c/0")
		}
		h := &hooked{Ledger: w.ledger}
		a, err := archive.New(archive.Config{Ledger: h, Dir: w.dir})
		must(t, err)
		w.Archive = a
		h.before = func() { w.move(5, "c/1") }
		list, err := a.Entries(t.Context(), 0, 6)
		must(t, err)
		if len(list) != 6 {
			t.Fatalf("Entries = %d entries, want 6", len(list))
		}
		for i, e := range list {
			if e.Revision != broker.Revision(i+1) {
				t.Errorf("after %d moved: entry %d is revision %d", moved, i+1, e.Revision)
			}
		}
	}
}

// TestMergedScan compares scans over many segments with those of a ledger that has all.
func TestMergedScan(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	w := newWorld(t)
	whole := brokertest.NewMemory()
	var keys []string
	for i := range 400 {
		keys = append(keys, fmt.Sprintf("%c/%03d/%03d%s", 'c'+rune(r.IntN(3)), r.IntN(20), i, strings.Repeat("~", r.IntN(900))))
	}
	for part := range slices.Chunk(keys, 40) {
		w.put(1, part...)
		w.move(2, part[:30]...)
	}
	if err := whole.Update(t.Context(), func(tx broker.Tx) error {
		for key, value := range w.all {
			if err := tx.Put(key, []byte(value)); err != nil {
				return err
			}
		}
		return enter(tx)
	}); err != nil {
		t.Fatal(err)
	}
	for range 300 {
		prefix := keys[r.IntN(len(keys))][:2+r.IntN(5)]
		from := ""
		switch r.IntN(3) {
		case 0:
			from = keys[r.IntN(len(keys))]
		case 1:
			from = prefix + "5"
		}
		most := 1 + r.IntN(30)
		read := func(view func(context.Context, func(broker.Tx) error) error, back bool) (list []string) {
			if err := view(t.Context(), func(tx broker.Tx) error {
				f := tx.Scan
				if back {
					f = tx.ScanBack
				}
				return f(prefix, from, func(key string, value []byte) bool {
					list = append(list, key+"="+string(value))
					return len(list) < most
				})
			}); err != nil {
				t.Fatal(err)
			}
			return list
		}
		for _, back := range []bool{false, true} {
			if got, want := read(w.History, back), read(whole.View, back); !slices.Equal(got, want) {
				t.Fatalf("scan of %q from %q (back: %v) = %q, want %q", prefix, from, back, got, want)
			}
		}
	}
}

// TestCrashes ends an Add at each step, and a removal at each, and goes on with the next process.
func TestCrashes(t *testing.T) {
	boom := errors.New("the power fails")
	for _, stage := range []archive.Stage{archive.Written, archive.Renamed, archive.Listed} {
		t.Run(fmt.Sprint("stage ", stage), func(t *testing.T) {
			w := newWorld(t)
			w.put(1, "c/1", "g/1")
			w.move(2, "c/1", "g/1")
			w.put(3, "c/2", "g/2")
			w.fault = func(at archive.Stage) error {
				if at == stage {
					return boom
				}
				return nil
			}
			if _, err := w.Add(t.Context(), w.records("c/2", "g/2"), at(9)); !errors.Is(err, boom) {
				t.Fatalf("Add = %v, want the fault", err)
			}
			w.fault = nil
			w.ledger = w.ledger.Crash()
			w.reopen()
			w.holds()
			s, unfinished, err := w.Unfinished(t.Context())
			if want := stage == archive.Listed; err != nil || unfinished != want {
				t.Fatalf("Unfinished = %v, %v, want %v", unfinished, err, want)
			}
			if unfinished {
				if _, err := w.Add(t.Context(), nil, at(9)); err == nil {
					t.Error("Add beside an unfinished segment = nil, want an error")
				}
				w.remove(s)
			} else {
				s = w.move(9, "c/2", "g/2")
			}
			w.holds()
			w.put(20, "c/3")
			w.move(21, "c/3")
			w.holds()
			var names []string
			files, err := os.ReadDir(w.dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				names = append(names, f.Name())
			}
			want := []string{"00000001.segment", "00000002.segment", "00000003.segment"}
			if stage == archive.Renamed { // what the ledger did not list is kept aside
				want = slices.Insert(want, 2, "00000002.segment.unlisted")
			}
			if !slices.Equal(names, want) || s.Number != 2 {
				t.Errorf("the directory has %q, want %q", names, want)
			}
		})
	}
}

// TestCommitFails has the ledger fail the listing, with both outcomes.
func TestCommitFails(t *testing.T) {
	for _, fault := range []brokertest.Fault{brokertest.NotCommitted, brokertest.CommittedButFails} {
		w := newWorld(t)
		w.put(1, "c/1", "g/1")
		w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault { return fault })
		if _, err := w.Add(t.Context(), w.records("c/1", "g/1"), at(9)); err == nil {
			t.Fatal("Add = nil, want the fault of the ledger")
		}
		w.ledger.Fail(nil)
		w.holds()
		s, unfinished, err := w.Unfinished(t.Context())
		if want := fault == brokertest.CommittedButFails; err != nil || unfinished != want {
			t.Errorf("Unfinished = %v, %v, want %v", unfinished, err, want)
		}
		if unfinished {
			w.remove(s)
		} else {
			w.move(9, "c/1", "g/1")
		}
		w.holds()
	}
}

// TestFaultsAreNamed removes, changes, cuts and swaps segments. Reading it names the segment, what needs it not goes on,
// and the ledger works.
func TestFaultsAreNamed(t *testing.T) {
	for name, harm := range map[string]func(t *testing.T, dir string){
		"missing": func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, "00000002.segment"))) },
		"changed": func(t *testing.T, dir string) {
			change(t, filepath.Join(dir, "00000002.segment"), func(b []byte) []byte { b[20] ^= 1; return b })
		},
		"cut": func(t *testing.T, dir string) {
			change(t, filepath.Join(dir, "00000002.segment"), func(b []byte) []byte { return b[:len(b)-1] })
		},
		"swapped": func(t *testing.T, dir string) {
			other, err := os.ReadFile(filepath.Join(dir, "00000001.segment"))
			must(t, err)
			must(t, os.WriteFile(filepath.Join(dir, "00000002.segment"), other, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			for i := range 3 {
				w.put(i, fmt.Sprintf("c/%d", i), fmt.Sprintf("g/%d", i))
				w.move(i+1, fmt.Sprintf("c/%d", i), fmt.Sprintf("g/%d", i))
			}
			harm(t, w.dir)
			w.reopen() // it opens all the same
			isNamed := func(what string, err error) {
				t.Helper()
				var refusal *broker.Error
				if !errors.As(err, &refusal) || refusal.Code != broker.CodeArchiveDamaged ||
					!strings.Contains(refusal.Msg, "00000002.segment") {
					t.Errorf("%s = %v, want archive_damaged and the name of the segment", what, err)
				}
			}
			isNamed("Verify", w.Verify(t.Context()))
			isNamed("History", w.History(t.Context(), func(tx broker.Tx) error { _, err := tx.Get("g/1"); return err }))
			isNamed("Scan", w.History(t.Context(), func(tx broker.Tx) error { _, err := scan(tx.Scan, "g/", ""); return err }))
			entries := func(after broker.Revision) error { _, err := w.Entries(t.Context(), after, 100); return err }
			if s, err := w.List(t.Context()); err == nil && s[1].Tree.Size() > s[0].Tree.Size() {
				isNamed("Entries", entries(0))
			}
			if err := w.History(t.Context(), func(tx broker.Tx) error {
				for _, key := range []string{"g/0", "g/2"} {
					if got, err := tx.Get(key); err != nil || string(got) != w.all[key] {
						t.Errorf("Get(%q) = %q, %v, want the record", key, got, err)
					}
				}
				return nil
			}); err != nil {
				t.Errorf("History of others = %v, want nil", err)
			}
			w.put(50, "c/later")
			head := broker.Revision(0)
			if err := w.View(t.Context(), func(tx broker.Tx) (err error) { head, err = tx.Head(); return err }); err != nil {
				t.Errorf("View = %v, want nil", err)
			}
			if err := entries(head - 1); err != nil {
				t.Errorf("Entries of the ledger = %v, want nil", err)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func change(t *testing.T, path string, f func([]byte) []byte) {
	t.Helper()
	raw, err := os.ReadFile(path)
	must(t, err)
	must(t, os.WriteFile(path, f(raw), 0o600))
}
