package bolt_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/store/bolt"
)

// order is Order that must succeed. The channel receives what done is called with.
func order(t *testing.T, l *bolt.Ledger, f func(broker.Tx) error) <-chan error {
	t.Helper()
	done := make(chan error, 2)
	if err := l.Order(t.Context(), f, func(err error) { done <- err }); err != nil {
		t.Fatalf("Order = %v, want nil", err)
	}
	return done
}

// TestOrderWaitsForNoSync holds that orders wait for no commit, and share the next one with the update that comes.
func TestOrderWaitsForNoSync(t *testing.T) {
	h := newHang()
	path := filepath.Join(t.TempDir(), "ledger")
	var commits atomic.Int32
	l := mustOpen(t, bolt.WithFault(bolt.Config{Path: path, Reserve: -1}, func(at bolt.Stage) error {
		if at == bolt.BeforeCommit {
			commits.Add(1)
			return h.strike(at)
		}
		return nil
	}))
	first := order(t, l, enter(broker.OpIssued, "a")) // returns, although no commit can end
	<-h.held                                          // its own, after MaxOrderDelay
	if got := keys(t, l); !slices.Equal(got, []string{"a"}) || len(first) > 0 {
		t.Errorf("keys = %q and %d done before the commit, want a and none", got, len(first))
	}
	if got, err := l.Entries(t.Context(), 0, 10); len(got) > 0 || err != nil {
		t.Errorf("Entries = %v, %v, want none before the commit", got, err)
	}
	left, err := os.ReadFile(path) // as a crash leaves it
	if err != nil {
		t.Fatal(err)
	}
	h.free <- struct{}{}
	if err := <-first; err != nil {
		t.Errorf("done(%v), want nil", err)
	}
	if got, err := l.Entries(t.Context(), 0, 10); len(got) != 1 || err != nil {
		t.Errorf("Entries = %v, %v, want the one that is durable", got, err)
	}
	copied := filepath.Join(t.TempDir(), "ledger")
	if err := os.WriteFile(copied, left, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, mustOpen(t, bolt.Config{Path: copied, Reserve: -1})); len(got) > 0 {
		t.Errorf("a crash before the commit leaves %q, want nothing", got)
	}

	fenced := make(chan error, 1)
	go func() { fenced <- l.Update(t.Context(), enter(broker.OpFence, "f")) }()
	<-h.held
	waits := make(chan (<-chan error), 1)
	go func() { waits <- order(t, l, enter(broker.OpIssued, "b")) }()
	until(t, "the order is queued behind the commit", func() bool { return l.Waiting() == 1 })
	h.free <- struct{}{}
	second := <-waits
	if err := <-fenced; err != nil {
		t.Errorf("Update = %v, want nil", err)
	}
	<-h.held
	h.free <- struct{}{}
	if err := <-second; err != nil || commits.Load() != 3 {
		t.Errorf("done(%v) after %d commits, want nil after 3", err, commits.Load())
	}
	if err := l.Verify(t.Context()); err != nil {
		t.Errorf("Verify = %v, want nil", err)
	}
}

// TestFailedOrders fails the commit of ordered changes: alone, below an update, and with an unknown outcome.
func TestFailedOrders(t *testing.T) {
	boom := errors.New("boom")
	for name, row := range map[string]struct {
		at     bolt.Stage
		update bool
	}{
		"alone":                      {bolt.BeforeCommit, false},
		"below an update":            {bolt.BeforeCommit, true},
		"alone, outcome unknown":     {bolt.AfterCommit, false},
		"below one, outcome unknown": {bolt.AfterCommit, true},
	} {
		t.Run(name, func(t *testing.T) {
			var fails atomic.Bool
			l := mustOpen(t, bolt.WithFault(bolt.Config{Path: filepath.Join(t.TempDir(), "ledger"), Reserve: -1},
				func(at bolt.Stage) error {
					if at == row.at && fails.Load() {
						return boom
					}
					return nil
				}))
			if err := l.Update(t.Context(), enter(broker.OpOpen, "before")); err != nil {
				t.Fatal(err)
			}
			fails.Store(true)
			unknown := row.at == bolt.AfterCommit
			done := order(t, l, enter(broker.OpIssued, "a"))
			if row.update { // in the same commit, or in the next one
				if err := l.Update(t.Context(), enter(broker.OpFence, "u")); !errors.Is(err, boom) {
					t.Errorf("Update = %v, want the fault", err)
				}
			}
			if err := <-done; !errors.Is(err, boom) || errors.Is(err, broker.ErrNotCommitted) == unknown {
				t.Errorf("done(%v), want the fault, and ErrNotCommitted: %v", err, !unknown)
			}
			fails.Store(false)
			if err := l.Err(); errors.Is(err, bolt.ErrStopped) != unknown {
				t.Errorf("Err = %v, want it stopped: %v", err, unknown)
			}
			if unknown {
				err := l.Order(t.Context(), enter(broker.OpIssued, "c"), func(error) { t.Error("done was called") })
				if !errors.Is(err, bolt.ErrStopped) || !errors.Is(err, broker.ErrNotCommitted) {
					t.Errorf("Order of a stopped ledger = %v, want ErrStopped and ErrNotCommitted", err)
				}
				return
			}
			if got := keys(t, l); !slices.Equal(got, []string{"before"}) {
				t.Errorf("keys = %q, want before alone: the order is gone", got)
			}
			if err := l.Update(t.Context(), enter(broker.OpOpen, "after")); err != nil {
				t.Errorf("Update = %v, want nil", err)
			}
			if got := keys(t, l); !slices.Equal(got, []string{"after", "before"}) {
				t.Errorf("keys = %q, want after and before", got)
			}
			if err := l.Verify(t.Context()); err != nil {
				t.Errorf("Verify = %v, want nil", err)
			}
		})
	}
}

// TestOrdersOnAFullDisk holds that ordered changes go into the reserve, and that nothing more is ordered then.
func TestOrdersOnAFullDisk(t *testing.T) {
	var clock brokertest.Clock // it stands still: the reserve is not acquired again
	var fails atomic.Bool
	path := filepath.Join(t.TempDir(), "ledger")
	l := mustOpen(t, bolt.WithFault(bolt.Config{Path: path, Reserve: 1 << 20, Now: clock.Now}, func(at bolt.Stage) error {
		if at == bolt.BeforeCommit && fails.CompareAndSwap(true, false) {
			return full
		}
		return nil
	}))
	fails.Store(true)
	done := order(t, l, enter(broker.OpIssued, "issued"))
	if err := <-done; err != nil {
		t.Errorf("done(%v), want nil: its secret was handed out", err)
	}
	if err := l.Err(); !errors.Is(err, bolt.ErrDiskFull) {
		t.Errorf("Err = %v, want ErrDiskFull", err)
	}
	err := l.Order(t.Context(), enter(broker.OpIssued, "no"), func(error) { t.Error("done was called") })
	if !errors.Is(err, bolt.ErrDiskFull) || !errors.Is(err, broker.ErrNotCommitted) {
		t.Errorf("Order on a full disk = %v, want ErrDiskFull and ErrNotCommitted", err)
	}
	<-order(t, l, enter(broker.OpEnd, "end")) // it reduces authority
	if got := keys(t, l); !slices.Equal(got, []string{"end", "issued"}) {
		t.Errorf("keys = %q, want end and issued", got)
	}
}

// TestUrgent holds that an urgent update waits for the commit that is under way alone: it runs before all that wait, in
// a commit without them. The next commit has these, although another urgent update has come.
func TestUrgent(t *testing.T) {
	h := newHang()
	l := mustOpen(t, bolt.WithFault(bolt.Config{Path: filepath.Join(t.TempDir(), "ledger"), Reserve: -1}, h.strike))
	var ran []string // by the writer alone, and read while it is held
	var all sync.WaitGroup
	update := func(ctx context.Context, key string) {
		all.Go(func() {
			if err := l.Update(ctx, func(tx broker.Tx) error {
				ran = append(ran, key)
				return enter(broker.OpFence, key)(tx)
			}); err != nil {
				t.Errorf("Update(%s) = %v, want nil", key, err)
			}
		})
	}
	commit := func(want ...string) {
		t.Helper()
		<-h.held
		if !slices.Equal(ran, want) {
			t.Errorf("the commit is of %q, want %q", ran, want)
		}
		ran = nil
	}
	update(t.Context(), "first")
	commit("first")
	for i, key := range []string{"a", "b"} {
		update(t.Context(), key)
		until(t, key+" waits", func() bool { return l.Waiting() == i+1 })
	}
	update(broker.Urgent(t.Context()), "fence")
	until(t, "the fence waits", func() bool { return l.Waiting() == 3 })
	h.free <- struct{}{}
	commit("fence")
	update(broker.Urgent(t.Context()), "another")
	until(t, "another waits", func() bool { return l.Waiting() == 3 })
	h.free <- struct{}{}
	commit("another", "a", "b")
	h.free <- struct{}{}
	all.Wait()
	if err := l.Verify(t.Context()); err != nil {
		t.Errorf("Verify = %v, want nil", err)
	}
}
