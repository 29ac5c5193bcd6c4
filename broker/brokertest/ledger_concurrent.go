package brokertest

import (
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"

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
