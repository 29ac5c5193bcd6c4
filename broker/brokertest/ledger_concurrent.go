package brokertest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// The cases with many goroutines. They report with Error, never Fatal, which only the test's own goroutine may call.
// A function given to Update may run more than once. Each run must therefore reset the variables that it sets outside
// the transaction.

const crowd = 64

// together runs f in n goroutines and waits for them.
func together(n int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

// number reads a decimal number from a record. A missing record is 0.
func number(tx broker.Tx, key string) (int, error) {
	v, err := tx.Get(key)
	if err != nil || v == nil {
		return 0, err
	}
	return strconv.Atoi(string(v))
}

func add(tx broker.Tx, key string, n int) error {
	old, err := number(tx, key)
	if err != nil {
		return err
	}
	runtime.Gosched() // exposes a ledger that interleaves updates
	return tx.Put(key, strconv.AppendInt(nil, int64(old+n), 10))
}

func (t *ledgerTest) try(f func(broker.Tx) error) {
	if err := t.Update(t.Context(), f); err != nil {
		t.Errorf("Update = %v, want nil", err)
	}
}

func testCounter(t *ledgerTest) {
	const each = 20
	var mu sync.Mutex
	seen := map[broker.Revision]bool{}
	together(crowd, func(int) {
		for range each {
			var rev broker.Revision
			t.try(func(tx broker.Tx) (err error) {
				if err = add(tx, "n", 1); err == nil {
					rev, err = tx.Append(broker.Entry{Op: broker.OpIntent})
				}
				return err
			})
			mu.Lock()
			seen[rev] = true
			mu.Unlock()
		}
	})
	t.holds(fmt.Sprintf("n=%d", crowd*each))
	for rev := broker.Revision(1); rev <= crowd*each; rev++ {
		if !seen[rev] {
			t.Fatalf("no update received revision %d of %d, want each once", rev, crowd*each)
		}
	}
	t.revisionIs(crowd * each)
}

func testNeighbours(t *ledgerTest) {
	odd := errors.New("odd")
	together(crowd, func(i int) {
		for range 5 {
			err := t.Update(t.Context(), func(tx broker.Tx) error {
				if err := errors.Join(add(tx, "n", 1), appendTo(tx, "n")); err != nil {
					return err
				}
				if i%2 == 1 {
					return odd
				}
				return nil
			})
			if i%2 == 1 && !errors.Is(err, odd) || i%2 == 0 && err != nil {
				t.Errorf("Update of writer %d = %v", i, err)
			}
		}
	})
	t.holds(fmt.Sprintf("n=%d", crowd/2*5))
	t.revisionIs(crowd / 2 * 5)
}

// testFence runs intents, which read the nodes above them and write elsewhere, against a fence that writes one of
// those nodes. Their writes do not overlap, but no intent may be committed after the fence.
func testFence(t *ledgerTest) {
	for round := range 10 {
		root, leaf := fmt.Sprintf("d/%d/root", round), fmt.Sprintf("d/%d/leaf", round)
		t.update(put(root, "open", leaf, "open"))
		var fence, late atomic.Uint64
		var acknowledged atomic.Bool
		together(crowd, func(i int) {
			if i == crowd/2 {
				t.try(func(tx broker.Tx) error {
					rev, err := tx.Append(broker.Entry{Op: broker.OpFence})
					fence.Store(uint64(rev))
					return errors.Join(err, tx.Put(root, []byte("fenced")))
				})
				acknowledged.Store(true)
				return
			}
			for n := range 5 {
				after := acknowledged.Load()
				rev := t.intent(root, leaf, fmt.Sprintf("g/%d/%d/%d", round, i, n))
				if after && rev != 0 {
					t.Errorf("an intent that started after the fence was acknowledged is committed")
				}
				for old := late.Load(); uint64(rev) > old && !late.CompareAndSwap(old, uint64(rev)); old = late.Load() {
				}
			}
		})
		if fence.Load() < late.Load() {
			t.Errorf("an intent has revision %d, after the fence at %d", late.Load(), fence.Load())
		}
	}
}

// intent records a grant unless a node above it is fenced. It returns the revision, or 0.
func (t *ledgerTest) intent(root, leaf, grant string) (rev broker.Revision) {
	t.try(func(tx broker.Tx) error {
		rev = 0
		for _, node := range []string{root, leaf} {
			if v, err := tx.Get(node); err != nil || string(v) != "open" {
				return err
			}
		}
		runtime.Gosched()
		if err := tx.Put(grant, []byte("INTENT")); err != nil {
			return err
		}
		var err error
		rev, err = tx.Append(broker.Entry{Op: broker.OpIntent})
		return err
	})
	return rev
}

// testPhantom checks that a limit enforced by counting records holds while others add records.
func testPhantom(t *ledgerTest) {
	const limit = 10
	together(crowd, func(i int) {
		t.try(func(tx broker.Tx) error {
			live := 0
			err := tx.Scan("l/", "", func(string, []byte) bool { live++; return true })
			if err != nil || live >= limit {
				return err
			}
			runtime.Gosched()
			return put(fmt.Sprintf("l/%02d", i), "")(tx)
		})
	})
	t.view(func(tx broker.Tx) error {
		got, err := all(tx, "l/", "")
		if len(got) != limit {
			t.Errorf("%d records were added, want the limit, %d", len(got), limit)
		}
		return err
	})
}

func testViewFresh(t *ledgerTest) {
	var returned atomic.Int64 // the highest number of a returned update
	together(crowd/4, func(int) {
		for range 20 {
			var mine int
			t.try(func(tx broker.Tx) (err error) {
				if mine, err = number(tx, "n"); err != nil {
					return err
				}
				mine++
				return put("n", strconv.Itoa(mine))(tx)
			})
			for old := returned.Load(); int64(mine) > old && !returned.CompareAndSwap(old, int64(mine)); old = returned.Load() {
			}
			want := returned.Load()
			err := t.View(t.Context(), func(tx broker.Tx) error {
				got, err := number(tx, "n")
				if int64(got) < want {
					t.Errorf("a view reads %d, want at least %d from a returned update", got, want)
				}
				return err
			})
			if err != nil {
				t.Errorf("View = %v, want nil", err)
			}
		}
	})
}

func testViewConsistent(t *ledgerTest) {
	t.update(put("a", "1000", "b", "1000"))
	together(4, func(i int) {
		for range 20 {
			if i%2 == 0 {
				t.try(func(tx broker.Tx) error {
					return errors.Join(add(tx, "a", -1), add(tx, "b", 1), appendTo(tx, "move"))
				})
				continue
			}
			err := t.View(t.Context(), func(tx broker.Tx) error {
				a, err := number(tx, "a")
				if err != nil {
					return err
				}
				// An update is certain to commit between the two reads.
				t.try(func(tx broker.Tx) error {
					return errors.Join(add(tx, "a", 1), add(tx, "b", -1), appendTo(tx, "move"))
				})
				b, err := number(tx, "b")
				if a+b != 2000 {
					t.Errorf("a view reads %d and %d, want a sum of 2000", a, b)
				}
				return err
			})
			if err != nil {
				t.Errorf("View = %v, want nil", err)
			}
		}
	})
	t.holds("a=1000", "b=1000")
}

// The cases of [broker.Ledger.Order].

// order is Order that must succeed. The returned channel receives what done is called with.
func (t *ledgerTest) order(f func(broker.Tx) error) <-chan error {
	t.Helper()
	done := make(chan error, 2)
	if err := t.Order(t.Context(), f, func(err error) { done <- err }); err != nil {
		t.Fatalf("Order = %v, want nil", err)
	}
	return done
}

// became waits until an ordered change is durable.
func (t *ledgerTest) became(durable <-chan error) {
	t.Helper()
	select {
	case err := <-durable:
		if err != nil {
			t.Errorf("done(%v), want nil", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("done was not called in 10 s")
	}
}

func testOrderSeen(t *ledgerTest) {
	first := t.order(put("a", "1", "b", "1"))
	t.holds("a=1", "b=1")
	t.view(func(tx broker.Tx) error {
		if head, err := tx.Head(); head != 1 || err != nil {
			t.Errorf("Head in a view = %d, %v, want 1", head, err)
		}
		back := ""
		err := tx.ScanBack("", "", func(k string, _ []byte) bool { back += k; return true })
		if back != "ba" || err != nil {
			t.Errorf("ScanBack = %q, %v, want ba", back, err)
		}
		return nil
	})
	second := t.order(func(tx broker.Tx) error {
		return errors.Join(add(tx, "a", 1), tx.Put("b", nil), appendTo(tx, "a"))
	})
	t.holds("a=2")
	t.update(func(tx broker.Tx) error { return errors.Join(add(tx, "a", 1), appendTo(tx, "a")) })
	t.holds("a=3")
	t.became(first)
	t.became(second)
	t.revisionIs(3)
}

func testOrderDone(t *ledgerTest) {
	t.became(t.order(put("a", "1")))
	t.became(t.order(func(tx broker.Tx) error { // it changes nothing
		_, err := tx.Get("a")
		return err
	}))
	done := t.order(put("a", "2"))
	t.became(done)
	t.holds("a=2")
	t.revisionIs(2)
	if len(done) > 0 {
		t.Error("done was called twice")
	}
}

func testOrderWithUpdate(t *ledgerTest) {
	for i := range 20 {
		done := t.order(put("a", strconv.Itoa(i)))
		t.update(put("b", strconv.Itoa(i)))
		if len(done) != 1 {
			t.Fatal("an update returned that is durable, and what was ordered before it is not")
		}
		t.became(done)
		t.logHolds(broker.Revision(2*i + 2))
	}
	t.holds("a=19", "b=19")
}

func testOrderDiscards(t *ledgerTest) {
	t.update(put("a", "1"))
	mine := errors.New("changed my mind")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for name, row := range map[string]struct {
		ctx  context.Context
		f    func(broker.Tx) error
		want []error
	}{
		"an error": {t.Context(), func(tx broker.Tx) error { return errors.Join(put("a", "2")(tx), mine) }, []error{mine}},
		"no entry": {t.Context(), func(tx broker.Tx) error { return tx.Put("a", nil) },
			[]error{broker.ErrNoEntry, broker.ErrNotCommitted}},
		"no context": {cancelled, put("a", "2"), []error{context.Canceled, broker.ErrNotCommitted}},
	} {
		err := t.Order(row.ctx, row.f, func(err error) { t.Errorf("%s: done(%v), want no call", name, err) })
		for _, want := range row.want {
			if !errors.Is(err, want) {
				t.Errorf("Order with %s = %v, want %v", name, err, want)
			}
		}
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic of an ordered function did not reach its caller")
			}
		}()
		_ = t.Order(t.Context(), func(tx broker.Tx) error { _ = put("a", "2")(tx); panic("broken promise") },
			func(err error) { t.Errorf("a panic: done(%v), want no call", err) })
	}()
	t.became(t.order(put("b", "1")))
	t.holds("a=1", "b=1")
	t.revisionIs(2)
}

func testOrderCounter(t *ledgerTest) {
	const each = 20
	var durable atomic.Int64
	together(crowd, func(i int) {
		for range each {
			f := func(tx broker.Tx) error { return errors.Join(add(tx, "n", 1), appendTo(tx, "n")) }
			if i%4 == 0 {
				t.try(f)
				continue
			}
			if err := t.Order(t.Context(), f, func(err error) {
				if err == nil {
					durable.Add(1)
				}
			}); err != nil {
				t.Errorf("Order = %v, want nil", err)
			}
		}
	})
	t.holds(fmt.Sprintf("n=%d", crowd*each))
	t.update(put("z", "1"))
	if got := durable.Load(); got != crowd*each*3/4 {
		t.Errorf("%d ordered changes are durable after the last update, want %d", got, crowd*each*3/4)
	}
	t.revisionIs(crowd*each + 1)
}

// testOrderFence is testFence with hand-overs that are ordered, not waited for.
func testOrderFence(t *ledgerTest) {
	for round := range 10 {
		node := fmt.Sprintf("d/%d", round)
		t.update(put(node, "open"))
		var fence, late atomic.Uint64
		var acknowledged atomic.Bool
		together(crowd, func(i int) {
			if i == crowd/2 {
				t.try(func(tx broker.Tx) error {
					rev, err := tx.Append(broker.Entry{Op: broker.OpFence})
					fence.Store(uint64(rev))
					return errors.Join(err, tx.Put(node, []byte("fenced")))
				})
				acknowledged.Store(true)
				return
			}
			for n := range 5 {
				after := acknowledged.Load()
				rev := t.handOver(node, fmt.Sprintf("g/%d/%d/%d", round, i, n))
				if after && rev != 0 {
					t.Errorf("a hand-over that started after the fence was acknowledged was ordered")
				}
				for old := late.Load(); uint64(rev) > old && !late.CompareAndSwap(old, uint64(rev)); {
					old = late.Load()
				}
			}
		})
		if fence.Load() < late.Load() {
			t.Errorf("a hand-over has revision %d, after the fence at %d", late.Load(), fence.Load())
		}
	}
}

// handOver orders a hand-over unless the node is fenced. It returns the revision, or 0.
func (t *ledgerTest) handOver(node, grant string) (rev broker.Revision) {
	if err := t.Order(t.Context(), func(tx broker.Tx) error {
		rev = 0
		if v, err := tx.Get(node); err != nil || string(v) != "open" {
			return err
		}
		if err := tx.Put(grant, []byte("ISSUED")); err != nil {
			return err
		}
		var err error
		rev, err = tx.Append(broker.Entry{Op: broker.OpIssued})
		return err
	}, func(error) {}); err != nil {
		t.Errorf("Order = %v, want nil", err)
	}
	return rev
}

// testOrderViews reads while ordered changes become durable beside updates. A view must have all that was ordered before
// it, and the sum of one snapshot.
func testOrderViews(t *ledgerTest) {
	t.update(put("a", "1000", "b", "1000"))
	move := func(tx broker.Tx) error { return errors.Join(add(tx, "a", -1), add(tx, "b", 1), appendTo(tx, "move")) }
	var ordered atomic.Int64
	together(8, func(i int) {
		for range 50 {
			switch i % 4 {
			case 0:
				t.try(move)
				ordered.Add(1)
			case 1:
				if err := t.Order(t.Context(), move, func(error) {}); err != nil {
					t.Errorf("Order = %v, want nil", err)
				}
				ordered.Add(1)
			default:
				least := ordered.Load()
				if err := t.View(t.Context(), func(tx broker.Tx) error {
					a, err := number(tx, "a")
					b, berr := number(tx, "b")
					if a+b != 2000 || int64(b) < 1000+least {
						t.Errorf("a view reads %d and %d, want a sum of 2000 and %d or more", a, b, 1000+least)
					}
					return errors.Join(err, berr)
				}); err != nil {
					t.Errorf("View = %v, want nil", err)
				}
			}
		}
	})
	t.holds("a=800", "b=1200")
}

func testOrderDurable(t *ledgerTest, reopen again) {
	t.update(put("a", "1"))
	done := t.order(put("b", "2"))
	t.Ledger = reopen(t, t.Ledger)
	t.became(done)
	t.holds("a=1", "b=2")
	t.revisionIs(2)
}

// testOrderCrash crashes a ledger after some orders and updates. It leaves a beginning of their order, with each update
// that has returned in it.
func testOrderCrash(t *testing.T, open func(testing.TB) broker.Ledger, crash again) {
	for n := range 12 {
		l := &ledgerTest{TB: t, Ledger: open(t)}
		var want []string // in their order
		durable := 0
		for i := range n {
			key := fmt.Sprintf("k/%02d", i)
			if want = append(want, key+"=1"); i%5 == 2 {
				l.update(put(key, "1"))
				durable = len(want)
			} else {
				l.order(put(key, "1"))
			}
		}
		l.Ledger = crash(t, l.Ledger)
		l.view(func(tx broker.Tx) error {
			got, err := all(tx, "", "")
			if len(got) < durable || len(got) > n || !slices.Equal(got, want[:min(len(got), n)]) {
				t.Errorf("after %d updates a crash leaves %q, want %d or more of %q in their order", n, got, durable, want)
			}
			if len(got) > 0 {
				l.logHolds(broker.Revision(len(got)))
			}
			return err
		})
		l.update(put("z", "1")) // its revision follows
		l.view(func(tx broker.Tx) error {
			got, err := all(tx, "", "")
			l.logHolds(broker.Revision(len(got)))
			return err
		})
	}
}
