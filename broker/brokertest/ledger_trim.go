package brokertest

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/pawlsec/pawl/broker"
)

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
