package brokertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
)

// Ledger is the suite that every ledger must pass. open returns an empty ledger and closes it with Cleanup. reopen
// closes the given ledger and opens its data on disk again. crash opens the data that a crash at this moment would
// leave. If a ledger has the method Verify, the suite tests it too.
func Ledger(t *testing.T, open func(testing.TB) broker.Ledger, reopen, crash again) {
	cases := []struct {
		name string
		f    func(*ledgerTest)
	}{
		{"put and get", testPutGet},
		{"nil deletes, empty is a value", testNilEmpty},
		{"large values", testLarge},
		{"values are copied", testCopied},
		{"scan", testScan},
		{"scan reads the transaction's own writes", testScanOwn},
		{"scan in the opposite order", testScanBack},
		{"an error discards everything", testDiscard},
		{"a panic discards everything", testPanic},
		{"no entry, no change", testNoEntry},
		{"a view changes nothing", testReadOnly},
		{"cancelled before it started", testCancelled},
		{"revisions", testRevisions},
		{"head", testHead},
		{"trim", testTrim},
		{"trim is an update", testTrimRefused},
		{"counter", testCounter},
		{"one fails, the others do not", testNeighbours},
		{"no intent after the fence", testFence},
		{"no phantoms", testPhantom},
		{"a view reads the last update", testViewFresh},
		{"a view is one snapshot", testViewConsistent},
		{"what is ordered is seen at once", testOrderSeen},
		{"what is ordered becomes durable", testOrderDone},
		{"what is ordered is durable with an update", testOrderWithUpdate},
		{"an order that fails changes nothing", testOrderDiscards},
		{"orders and updates have one order", testOrderCounter},
		{"nothing is ordered after the fence", testOrderFence},
		{"a view sees what was ordered, once", testOrderViews},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { c.f(&ledgerTest{TB: t, Ledger: open(t)}) })
	}
	t.Run("trimmed is durable", func(t *testing.T) { testTrimDurable(&ledgerTest{TB: t, Ledger: open(t)}, reopen) })
	t.Run("durable", func(t *testing.T) { testDurable(&ledgerTest{TB: t, Ledger: open(t)}, reopen) })
	t.Run("what was ordered is durable after a close", func(t *testing.T) {
		testOrderDurable(&ledgerTest{TB: t, Ledger: open(t)}, reopen)
	})
	t.Run("a crash loses the last orders alone", func(t *testing.T) { testOrderCrash(t, open, crash) })
}

// again opens the data of a ledger again. The ledger itself is not used after that.
type again = func(testing.TB, broker.Ledger) broker.Ledger

// ledgerTest is one case with its ledger.
type ledgerTest struct {
	testing.TB
	broker.Ledger
}

func (t *ledgerTest) update(f func(broker.Tx) error) {
	t.Helper()
	if err := t.Update(t.Context(), f); err != nil {
		t.Fatalf("Update = %v, want nil", err)
	}
}

func (t *ledgerTest) view(f func(broker.Tx) error) {
	t.Helper()
	if err := t.View(t.Context(), f); err != nil {
		t.Fatalf("View = %v, want nil", err)
	}
}

// put returns an update that puts key, value pairs with one entry.
func put(pairs ...string) func(broker.Tx) error {
	return func(tx broker.Tx) error {
		for i := 0; i < len(pairs); i += 2 {
			if err := tx.Put(pairs[i], []byte(pairs[i+1])); err != nil {
				return err
			}
		}
		return appendTo(tx, pairs[0])
	}
}

func appendTo(tx broker.Tx, detail string) error {
	_, err := tx.Append(broker.Entry{At: Epoch, Actor: "test", Op: broker.OpOpen, Detail: detail})
	return err
}

// all returns the records of a scan as "key=value".
func all(tx broker.Tx, prefix, after string) (list []string, err error) {
	err = tx.Scan(prefix, after, func(k string, v []byte) bool {
		list = append(list, k+"="+string(v))
		return true
	})
	return list, err
}

// holds fails the test unless the ledger's records are exactly want, as "key=value".
func (t *ledgerTest) holds(want ...string) {
	t.Helper()
	t.view(func(tx broker.Tx) error {
		got, err := all(tx, "", "")
		if !slices.Equal(got, want) {
			t.Errorf("records = %q, want %q", got, want)
		}
		return err
	})
}

func testPutGet(t *ledgerTest) {
	t.update(put("a", "1", "b", "2"))
	t.update(func(tx broker.Tx) error {
		got, err := tx.Get("a")
		if string(got) != "1" || err != nil {
			t.Errorf("Get(a) = %q, %v, want 1", got, err)
		}
		if err := put("a", "3")(tx); err != nil {
			return err
		}
		if got, err = tx.Get("a"); string(got) != "3" || err != nil {
			t.Errorf("Get(a) after Put = %q, %v, want 3", got, err)
		}
		return nil
	})
	t.holds("a=3", "b=2")
}

func testNilEmpty(t *ledgerTest) {
	t.update(func(tx broker.Tx) error {
		if err := tx.Put("empty", []byte{}); err != nil {
			return err
		}
		return put("gone", "1")(tx)
	})
	t.update(func(tx broker.Tx) error {
		if err := tx.Put("gone", nil); err != nil {
			return err
		}
		if got, err := tx.Get("gone"); got != nil || err != nil {
			t.Errorf("Get of a deleted key = %q, %v, want nil", got, err)
		}
		if err := tx.Put("never", nil); err != nil {
			t.Errorf("Put(never, nil) = %v, want nil", err)
		}
		return appendTo(tx, "delete")
	})
	t.view(func(tx broker.Tx) error {
		for key, want := range map[string][]byte{"empty": {}, "gone": nil, "never": nil} {
			got, err := tx.Get(key)
			if err != nil || len(got) != 0 || (got == nil) != (want == nil) {
				t.Errorf("Get(%s) = %#v, %v, want %#v", key, got, err, want)
			}
		}
		return nil
	})
	if err := t.Update(t.Context(), put("", "no key")); err == nil {
		t.Error(`Put("", …) was accepted, want an error`)
	}
	t.holds("empty=")
}

func testLarge(t *ledgerTest) {
	big := strings.Repeat("0123456789", 10_000)
	for _, size := range []int{0, 1, 4_000, 5_000, 100_000} {
		t.update(put("big", big[:size], "near", "1"))
		t.holds("big="+big[:size], "near=1")
	}
}

func testCopied(t *ledgerTest) {
	v := []byte("one")
	t.update(func(tx broker.Tx) error {
		copy(v, "one")
		err := tx.Put("k", v)
		copy(v, "two")
		return errors.Join(err, appendTo(tx, "k"))
	})
	t.holds("k=one")
}

func testScan(t *ledgerTest) {
	t.update(put("l/a/1", "", "l/a/2", "", "l/a/3", "", "l/b/1", "", "l/", "", "k", "", "m", ""))
	for _, c := range []struct{ prefix, after, want string }{
		{"l/a/", "", "l/a/1 l/a/2 l/a/3"},
		{"l/a/", "l/a/1", "l/a/2 l/a/3"},
		{"l/a/", "l/a/11", "l/a/2 l/a/3"},
		{"l/a/", "l/a/3", ""},
		{"l/a/", "k", "l/a/1 l/a/2 l/a/3"},
		{"l/a/", "m", ""},
		{"l/", "", "l/ l/a/1 l/a/2 l/a/3 l/b/1"},
		{"l/", "l/", "l/a/1 l/a/2 l/a/3 l/b/1"},
		{"x", "", ""},
		{"", "l/a/3", "l/b/1 m"},
	} {
		t.view(func(tx broker.Tx) error {
			got, err := all(tx, c.prefix, c.after)
			if s := strings.ReplaceAll(strings.Join(got, " "), "=", ""); s != c.want {
				t.Errorf("Scan(%q, %q) = %q, want %q", c.prefix, c.after, s, c.want)
			}
			return err
		})
	}
	t.view(func(tx broker.Tx) error {
		n := 0
		err := tx.Scan("l/", "", func(string, []byte) bool { n++; return n < 2 })
		if n != 2 {
			t.Errorf("Scan continued to record %d after false, want 2", n)
		}
		return err
	})
}

func testScanOwn(t *ledgerTest) {
	t.update(put("a/1", "old", "a/3", "old", "a/5", "old", "b", "old"))
	t.update(func(tx broker.Tx) error {
		err := put("a/0", "new", "a/3", "new", "a/4", "new", "a/9", "new", "c", "new")(tx)
		err = errors.Join(err, tx.Put("a/5", nil), tx.Put("a/4", nil), tx.Put("a/7", nil))
		for after, want := range map[string]string{
			"":    "a/0=new a/1=old a/3=new a/9=new",
			"a/1": "a/3=new a/9=new",
			"a/4": "a/9=new",
		} {
			got, serr := all(tx, "a/", after)
			if s := strings.Join(got, " "); s != want {
				t.Errorf("Scan(a/, %q) = %q, want %q", after, s, want)
			}
			err = errors.Join(err, serr)
		}
		return err
	})
	t.holds("a/0=new", "a/1=old", "a/3=new", "a/9=new", "b=old", "c=new")
}

func testScanBack(t *ledgerTest) {
	t.update(put("a", "", "l/", "", "l/a", "", "l/c", "", "l/e", "", "m", ""))
	back := func(tx broker.Tx, prefix, before, want string) {
		var got []string
		err := tx.ScanBack(prefix, before, func(k string, _ []byte) bool { got = append(got, k); return len(got) < 4 })
		if s := strings.Join(got, " "); s != want || err != nil {
			t.Errorf("ScanBack(%q, %q) = %q, %v; want %q", prefix, before, s, err, want)
		}
	}
	t.view(func(tx broker.Tx) error {
		for _, c := range []struct{ prefix, before, want string }{
			{"l/", "", "l/e l/c l/a l/"}, {"l/", "l/d", "l/c l/a l/"}, {"l/", "l/c", "l/a l/"}, {"l/", "l/", ""}, {"l/", "b", ""},
			{"l/", "z", "l/e l/c l/a l/"}, {"m", "", "m"}, {"", "", "m l/e l/c l/a"}, {"x", "", ""}, {"0", "", ""},
		} {
			back(tx, c.prefix, c.before, c.want)
		}
		return nil
	})
	t.update(func(tx broker.Tx) error {
		err := errors.Join(put("l/b", "", "l/e", "new", "l/f", "")(tx), tx.Put("l/c", nil))
		back(tx, "l/", "", "l/f l/e l/b l/a")
		back(tx, "l/", "l/e", "l/b l/a l/")
		back(tx, "n", "", "")
		return err
	})
}

func testHead(t *ledgerTest) {
	head := func(when string, tx broker.Tx, want broker.Revision) {
		if got, err := tx.Head(); got != want || err != nil {
			t.Errorf("Head %s = %d, %v, want %d", when, got, err, want)
		}
	}
	t.view(func(tx broker.Tx) error { head("of an empty ledger", tx, 0); return nil })
	t.update(func(tx broker.Tx) error {
		head("before Append", tx, 0)
		err := errors.Join(appendTo(tx, "one"), appendTo(tx, "two"))
		head("after two", tx, 2)
		return err
	})
	mine := errors.New("changed my mind")
	if err := t.Update(t.Context(), func(tx broker.Tx) error { return errors.Join(appendTo(tx, "gone"), mine) }); !errors.Is(err, mine) {
		t.Errorf("Update = %v, want the function's own error", err)
	}
	t.view(func(tx broker.Tx) error { head("later", tx, 2); return nil })
}

func testDiscard(t *ledgerTest) {
	t.update(put("a", "1"))
	mine := errors.New("changed my mind")
	err := t.Update(t.Context(), func(tx broker.Tx) error {
		return errors.Join(put("a", "2", "b", "2")(tx), tx.Put("a", nil), mine)
	})
	if !errors.Is(err, mine) {
		t.Errorf("Update = %v, want the function's own error", err)
	}
	t.holds("a=1")
	t.revisionIs(1)
}

func testPanic(t *ledgerTest) {
	func() {
		defer func() {
			if v := recover(); v == nil || !strings.Contains(fmt.Sprint(v), "broken promise") {
				t.Errorf("recovered %v, want the function's panic in the caller", v)
			}
		}()
		_ = t.Update(t.Context(), func(tx broker.Tx) error {
			_ = put("a", "1")(tx)
			panic("broken promise")
		})
	}()
	t.update(put("b", "1"))
	t.holds("b=1")
	t.revisionIs(1)
}

func testNoEntry(t *ledgerTest) {
	t.update(put("a", "1"))
	for name, value := range map[string][]byte{"put": []byte("2"), "delete": nil} {
		err := t.Update(t.Context(), func(tx broker.Tx) error { return tx.Put("a", value) })
		if !errors.Is(err, broker.ErrNoEntry) || !errors.Is(err, broker.ErrNotCommitted) {
			t.Errorf("Update with a %s and no entry = %v, want ErrNoEntry and ErrNotCommitted", name, err)
		}
	}
	t.update(func(tx broker.Tx) error { return appendTo(tx, "an entry alone is fine") })
	t.update(func(tx broker.Tx) error {
		_, err := tx.Get("a")
		return err
	})
	t.holds("a=1")
	t.revisionIs(2)
}

func testReadOnly(t *ledgerTest) {
	t.view(func(tx broker.Tx) error {
		if err := tx.Put("a", []byte("1")); err == nil {
			t.Error("Put in a view = nil, want an error")
		}
		if _, err := tx.Append(broker.Entry{}); err == nil {
			t.Error("Append in a view = nil, want an error")
		}
		return nil
	})
	mine := errors.New("not found")
	if err := t.View(t.Context(), func(broker.Tx) error { return mine }); !errors.Is(err, mine) {
		t.Errorf("View = %v, want the function's own error", err)
	}
	t.holds()
}

func testCancelled(t *ledgerTest) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := t.Update(ctx, put("a", "1"))
	if !errors.Is(err, context.Canceled) || !errors.Is(err, broker.ErrNotCommitted) {
		t.Errorf("Update = %v, want context.Canceled and ErrNotCommitted", err)
	}
	if err := t.View(ctx, func(broker.Tx) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("View = %v, want context.Canceled", err)
	}
	t.holds()
	t.revisionIs(0)
}

func testRevisions(t *ledgerTest) {
	t.update(func(tx broker.Tx) error {
		for want := broker.Revision(1); want <= 3; want++ {
			got, err := tx.Append(broker.Entry{Revision: 77, Op: broker.OpOpen})
			if got != want || err != nil {
				t.Errorf("Append = %d, %v, want %d", got, err, want)
			}
		}
		return nil
	})
	t.revisionIs(3)
}

// revisionIs fails the test unless the last entry has this revision.
func (t *ledgerTest) revisionIs(want broker.Revision) {
	t.Helper()
	stop := errors.New("roll back")
	err := t.Update(t.Context(), func(tx broker.Tx) error {
		next, err := tx.Append(broker.Entry{Op: broker.OpOpen})
		if next != want+1 {
			t.Errorf("the next revision = %d, want %d", next, want+1)
		}
		return errors.Join(stop, err)
	})
	if !errors.Is(err, stop) {
		t.Errorf("Update = %v, want the function's own error", err)
	}
	t.logHolds(want)
}

// logHolds checks the audit log of a ledger that exposes it.
func (t *ledgerTest) logHolds(last broker.Revision) {
	t.Helper()
	if v, ok := t.Ledger.(interface{ Verify(context.Context) error }); ok {
		if err := v.Verify(t.Context()); err != nil {
			t.Errorf("Verify = %v, want nil", err)
		}
	}
	l, ok := t.Ledger.(interface {
		Entries(context.Context, broker.Revision, int) ([]broker.Entry, error)
	})
	if !ok {
		return
	}
	var got []broker.Entry
	for { // in pages, as an export reads it
		page, err := l.Entries(t.Context(), broker.Revision(len(got)), 7)
		if err != nil {
			t.Fatalf("Entries(%d, 7) = %v, want nil", len(got), err)
		}
		if len(page) == 0 {
			break
		}
		got = append(got, page...)
	}
	for i, e := range got {
		if e.Revision != broker.Revision(i+1) {
			t.Fatalf("entry %d has revision %d, want no gaps", i+1, e.Revision)
		}
	}
	if len(got) != int(last) {
		t.Errorf("the log has %d entries, want %d", len(got), last)
	}
}

func testDurable(t *ledgerTest, reopen again) {
	big := bytes.Repeat([]byte("x"), 100_000)
	entry := broker.Entry{At: Epoch, Actor: "test", Op: broker.OpFence, Chain: "ch", Delegation: "dl", Grant: "gr",
		Revocation: "rv", Tool: "t", Code: broker.CodeFenced, Bundle: "b", Policies: []string{"p", "q"}, Detail: "<&>\u2028"}
	t.update(put("a", "1", "b", "2", "big", string(big)))
	t.update(func(tx broker.Tx) error {
		_, err := tx.Append(entry)
		return errors.Join(err, tx.Put("a", nil))
	})
	for range 2 {
		t.Ledger = reopen(t, t.Ledger)
		t.holds("b=2", "big="+string(big))
		t.revisionIs(2)
	}
	if l, ok := t.Ledger.(interface {
		Entries(context.Context, broker.Revision, int) ([]broker.Entry, error)
	}); ok {
		got, err := l.Entries(t.Context(), 1, 10)
		entry.Revision = 2
		if err != nil || len(got) != 1 || fmt.Sprint(got[0]) != fmt.Sprint(entry) {
			t.Errorf("Entries(1, 10) = %v, %v, want %v", got, err, entry)
		}
	}
	t.update(put("c", "3"))
	t.holds("b=2", "big="+string(big), "c=3")
	t.revisionIs(3)
}

// fill writes n entries, each in its own update.
func (t *ledgerTest) fill(n int) {
	t.Helper()
	for i := range n {
		t.update(put(fmt.Sprintf("fill/%d", i), "x"))
	}
}

func trim(through broker.Revision) func(broker.Tx) error {
	return func(tx broker.Tx) error {
		return errors.Join(appendTo(tx, "trim"), tx.Trim(through))
	}
}

// logIs fails the test unless the log has exactly the revisions from first to last.
func (t *ledgerTest) logIs(first, last broker.Revision) {
	t.Helper()
	list, err := t.Entries(t.Context(), 0, 100)
	if err != nil {
		t.Fatalf("Entries = %v, want nil", err)
	}
	var got, want []broker.Revision
	for _, e := range list {
		got = append(got, e.Revision)
	}
	for r := first; r <= last; r++ {
		want = append(want, r)
	}
	if !slices.Equal(got, want) {
		t.Errorf("the log has revisions %v, want %v", got, want)
	}
	if v, ok := t.Ledger.(interface{ Verify(context.Context) error }); ok {
		if err := v.Verify(t.Context()); err != nil {
			t.Errorf("Verify = %v, want nil", err)
		}
	}
}

func testTrim(t *ledgerTest) {
	t.fill(5)
	t.update(trim(2))
	t.logIs(3, 6)
	t.update(trim(1)) // they are gone already
	t.logIs(3, 7)
	list, err := t.Entries(t.Context(), 3, 2)
	if err != nil || len(list) != 2 || list[0].Revision != 4 {
		t.Errorf("Entries after 3 = %v, %v, want 4 and 5", list, err)
	}
	t.update(trim(7)) // all but its own
	t.logIs(8, 8)
	t.view(func(tx broker.Tx) error {
		if head, err := tx.Head(); head != 8 || err != nil {
			t.Errorf("Head = %d, %v, want 8", head, err)
		}
		return nil
	})
}

func testTrimRefused(t *ledgerTest) {
	t.fill(3)
	if err := t.Update(t.Context(), func(tx broker.Tx) error { return tx.Trim(2) }); !errors.Is(err, broker.ErrNoEntry) {
		t.Errorf("Trim without an entry = %v, want ErrNoEntry", err)
	}
	if err := t.Update(t.Context(), trim(9)); err == nil {
		t.Error("Trim of entries that there are not = nil, want an error")
	}
	if err := t.View(t.Context(), func(tx broker.Tx) error { return tx.Trim(1) }); err == nil {
		t.Error("Trim in a View = nil, want an error")
	}
	t.logIs(1, 3)
}

func testTrimDurable(t *ledgerTest, reopen again) {
	t.fill(4)
	t.update(trim(3))
	again := &ledgerTest{TB: t.TB, Ledger: reopen(t.TB, t.Ledger)}
	again.logIs(4, 5)
	again.fill(1)
	again.logIs(4, 6)
}
