package brokertest_test

import (
	"errors"
	"testing"
	"testing/synctest"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

func TestMemory(t *testing.T) {
	brokertest.Ledger(t, func(testing.TB) broker.Ledger { return brokertest.NewMemory() },
		func(_ testing.TB, l broker.Ledger) broker.Ledger {
			l.(*brokertest.Memory).Flush()
			return l.(*brokertest.Memory).Crash()
		},
		func(_ testing.TB, l broker.Ledger) broker.Ledger { return l.(*brokertest.Memory).Crash() })
}

// TestMemoryLosesOrders holds that a crash of a ledger in memory loses ordered changes, and that a fault fails it.
func TestMemoryLosesOrders(t *testing.T) { synctest.Test(t, memoryLosesOrders) }

func memoryLosesOrders(t *testing.T) {
	enter := func(key string) func(broker.Tx) error {
		return func(tx broker.Tx) error {
			_, err := tx.Append(broker.Entry{Op: broker.OpIssued, Detail: key})
			return errors.Join(err, tx.Put(key, []byte("1")))
		}
	}
	has := func(m *brokertest.Memory, key string) (is bool) {
		if err := m.View(t.Context(), func(tx broker.Tx) error {
			v, err := tx.Get(key)
			is = v != nil
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return is
	}
	m := brokertest.NewMemory()
	if err := m.Update(t.Context(), enter("a")); err != nil {
		t.Fatal(err)
	}
	for fault, kept := range map[brokertest.Fault]bool{
		brokertest.NotCommitted: false, brokertest.CommittedButFails: true,
	} {
		m := m.Crash()
		m.Fail(func(int, []broker.Entry) brokertest.Fault { return fault })
		var told error
		if err := m.Order(t.Context(), enter("b"), func(err error) { told = err }); err != nil {
			t.Fatal(err)
		}
		err := m.Update(t.Context(), enter("c"))
		if !errors.Is(err, brokertest.ErrFault) || !errors.Is(told, brokertest.ErrFault) {
			t.Errorf("fault %d: Update = %v and done(%v), want the fault in both", fault, err, told)
		}
		if has(m, "b") != kept || has(m, "c") != kept || !has(m, "a") {
			t.Errorf("fault %d: the order and the update on it are kept: %v and %v, want %v",
				fault, has(m, "b"), has(m, "c"), kept)
		}
	}
	m = m.Crash()
	if err := m.Order(t.Context(), enter("b"), func(error) {}); err != nil {
		t.Fatal(err)
	}
	if next := m.Crash(); has(next, "b") || !has(next, "a") {
		t.Error("a crash kept what was ordered, or lost what was durable")
	}
}

func TestMemoryFaults(t *testing.T) {
	m := brokertest.NewMemory()
	step := func(key string) error {
		return m.Update(t.Context(), func(tx broker.Tx) error {
			if _, err := tx.Append(broker.Entry{Op: broker.OpIntent, Detail: key}); err != nil {
				return err
			}
			return tx.Put(key, []byte("1"))
		})
	}
	faults := []brokertest.Fault{brokertest.None, brokertest.NotCommitted, brokertest.CommittedButFails}
	m.Fail(func(n int, entries []broker.Entry) brokertest.Fault {
		if want := []string{"a", "b", "c"}[n-1]; len(entries) != 1 || entries[0].Detail != want {
			t.Errorf("fault %d receives %v, want the entry %q", n, entries, want)
		}
		return faults[n-1]
	})
	for i, c := range []struct {
		key               string
		fails, notApplied bool
	}{{"a", false, false}, {"b", true, true}, {"c", true, false}} {
		err := step(c.key)
		if errors.Is(err, brokertest.ErrFault) != c.fails || errors.Is(err, broker.ErrNotCommitted) != c.notApplied {
			t.Errorf("update %d with fault %d = %v", i+1, faults[i], err)
		}
		err = m.View(t.Context(), func(tx broker.Tx) error {
			v, err := tx.Get(c.key)
			if (v == nil) != c.notApplied {
				t.Errorf("after fault %d the record is %q", faults[i], v)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	m.Fail(nil)
	if err := step("d"); err != nil {
		t.Errorf("Update without faults = %v, want nil", err)
	}
	if got, err := m.Entries(t.Context(), 2, 10); err != nil || len(got) != 1 || got[0].Detail != "d" {
		t.Errorf("Entries(2, 10) = %v, %v, want the entry d alone", got, err)
	}
}
