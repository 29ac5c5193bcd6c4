package sched_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker/engine/internal/sched"
)

var epoch = time.Date(2026, 1, 5, 9, 0, 0, 0, time.UTC)

// item is due some seconds after epoch.
type item struct {
	name string
	due  int
}

func (i item) Due() time.Time { return epoch.Add(time.Duration(i.due) * time.Second) }

// drain pops every item.
func drain(h *sched.Heap[item]) (due []int, names []string) {
	for h.Len() > 0 {
		first := h.First()
		if got := h.Pop(); got != first {
			panic(fmt.Sprintf("Pop() = %v, and First was %v", got, first))
		}
		due, names = append(due, first.due), append(names, first.name)
	}
	return due, names
}

func TestHeap(t *testing.T) {
	for name, row := range map[string]struct {
		add   []int
		first []bool // Add's result
	}{
		"in order":         {[]int{1, 2, 3}, []bool{true, false, false}},
		"in reverse order": {[]int{3, 2, 1}, []bool{true, true, true}},
		"mixed":            {[]int{5, 9, 1, 7, 3, 8, 2}, []bool{true, false, true, false, false, false, false}},
		"ties":             {[]int{2, 1, 2, 1, 2, 1}, []bool{true, true, false, true, false, true}},
		"empty":            {nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var h, filled sched.Heap[item]
			var items []item
			for i, due := range row.add {
				items = append(items, item{fmt.Sprint("item ", i), due})
				if got := h.Add(items[i]); got != row.first[i] {
					t.Errorf("Add(%d) = %v, want %v", due, got, row.first[i])
				}
			}
			filled.Fill(items)
			for _, h := range []*sched.Heap[item]{&h, &filled} {
				due, names := drain(h)
				if want := slices.Sorted(slices.Values(row.add)); !slices.Equal(due, want) {
					t.Errorf("popped %v, want %v", due, want)
				}
				slices.Sort(names)
				if len(slices.Compact(names)) != len(row.add) {
					t.Errorf("popped %v, want each of %d items once", names, len(row.add))
				}
			}
		})
	}
}

// TestHeapEach holds that the heap is in order after Each has changed the due times.
func TestHeapEach(t *testing.T) {
	var h sched.Heap[item]
	h.Fill([]item{{"a", 1}, {"b", 2}, {"c", 3}, {"d", 4}})
	h.Each(func(i item) item { i.due = 10 - i.due; return i })
	if _, names := drain(&h); !slices.Equal(names, []string{"d", "c", "b", "a"}) {
		t.Errorf("popped %v, want them reversed", names)
	}
}

func TestBusy(t *testing.T) {
	for name, row := range map[string]struct {
		most  int
		calls string // +a is Begin(a), +a! is one that must be false, and -a is End(a)
		left  string
	}{
		"no limit":               {0, "+a +b +c", "abc"},
		"a key twice":            {0, "+a +a!", "a"},
		"a key again":            {0, "+a -a +a", "a"},
		"above the limit":        {2, "+a +b +c!", "ab"},
		"below the limit by End": {1, "+a -a +b", "b"},
		"End of an unknown key":  {1, "+a -b +b!", "a"},
	} {
		t.Run(name, func(t *testing.T) {
			b := sched.Busy[byte]{Most: row.most}
			for call := range strings.FieldsSeq(row.calls) {
				if call[0] == '-' {
					b.End(call[1])
				} else if got, want := b.Begin(call[1]), !strings.HasSuffix(call, "!"); got != want {
					t.Errorf("%s in %q = %v, want %v", call, row.calls, got, want)
				}
			}
			for _, key := range []byte("abc") {
				if got, want := b.Has(key), strings.Contains(row.left, string(key)); got != want {
					t.Errorf("Has(%c) after %q = %v, want %v", key, row.calls, got, want)
				}
			}
		})
	}
}

// TestLocks holds that one caller at a time has a key, and that other keys are free.
func TestLocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var locks sched.Locks[string]
		var wg sync.WaitGroup
		working := map[string]int{} // the locks guard each key's entry; mu guards the map
		var mu sync.Mutex
		begin := time.Now()
		for i := range 10 {
			key := []string{"a", "b"}[i%2]
			wg.Go(func() {
				unlock, err := locks.Lock(context.Background(), key)
				if err != nil {
					t.Errorf("Lock(%s) = %v", key, err)
					return
				}
				mu.Lock()
				if working[key]++; working[key] != 1 {
					t.Errorf("%d callers have %s, want 1", working[key], key)
				}
				mu.Unlock()
				time.Sleep(time.Second)
				mu.Lock()
				working[key]--
				mu.Unlock()
				unlock()
			})
		}
		wg.Wait()
		if took := time.Since(begin); took != 5*time.Second {
			t.Errorf("five callers on each of two keys took %v, want 5s", took)
		}
	})
}

// TestLocksCancelled holds that a cancelled caller stops waiting, and leaves the lock to its holder and to the next
// caller.
func TestLocksCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var locks sched.Locks[string]
		unlock, err := locks.Lock(context.Background(), "a")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancelled, next := make(chan error, 1), make(chan error, 1)
		go func() {
			_, err := locks.Lock(ctx, "a")
			cancelled <- err
		}()
		go func() {
			unlock, err := locks.Lock(context.Background(), "a")
			if err == nil {
				unlock()
			}
			next <- err
		}()
		synctest.Wait()
		cancel()
		synctest.Wait()
		select {
		case err := <-cancelled:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("Lock when cancelled = %v, want %v", err, context.Canceled)
			}
		default:
			t.Error("the cancelled caller still waits")
		}
		select {
		case err := <-next:
			t.Errorf("Lock of a held key = %v, want it to wait", err)
		default:
		}
		unlock()
		if err := <-next; err != nil {
			t.Errorf("Lock after the unlock = %v, want the lock", err)
		}
		if unlock, err = locks.Lock(ctx, "a"); err != nil {
			t.Errorf("Lock of a free key with a cancelled context = %v, want the lock", err)
		} else {
			unlock()
		}
	})
}

// TestSignal holds that Notify never blocks, and that several notifications become one.
func TestSignal(t *testing.T) {
	s := sched.NewSignal()
	for range 3 {
		s.Notify()
	}
	notified := 0
	for {
		select {
		case <-s:
			notified++
			continue
		default:
		}
		break
	}
	if notified != 1 {
		t.Errorf("three notifications arrived as %d, want 1", notified)
	}
}
