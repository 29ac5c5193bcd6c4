package engine_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// TestSweepLeases holds that a sweep revokes the leases that the ledger does not know, except young ones: an issue may
// be about to record these. A lease that Vault cannot revoke stops no other revocation.
func TestSweepLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		known := w.vault.LeaseIDs()[0]
		old := time.Now().Add(-time.Minute)
		for _, id := range []string{"a-stuck", "old-1", "old-2", "z-stuck"} {
			w.vault.Plant(id, old)
			w.vault.Stick(id, strings.HasSuffix(id, "stuck"))
		}
		w.vault.Plant("young", time.Now())
		s, err := w.Sweep(ctx)
		if err == nil || s.Leases != 2 {
			t.Errorf("Sweep = %+v, %v; want 2 orphans revoked and an error for the others", s, err)
		}
		if got, want := w.vault.LeaseIDs(), []string{"a-stuck", known, "young", "z-stuck"}; !slices.Equal(got, want) {
			t.Errorf("leases = %v, want %v", got, want)
		}
		w.vault.Stick("a-stuck", false)
		w.vault.Stick("z-stuck", false)
		pass(10 * time.Second) // then the young lease is an orphan
		if s, err = w.Sweep(ctx); err != nil || s.Leases != 3 || !slices.Equal(w.vault.LeaseIDs(), []string{known}) {
			t.Errorf("Sweep later = %+v, %v, leases %v; want only the known lease left", s, err, w.vault.LeaseIDs())
		}
		if n := w.countEntries(broker.OpOrphan); n != 5 {
			t.Errorf("the audit log has %d orphans, want 5", n)
		}
	})
}

// leaseLister keeps the tools for which the broker listed leases, and counts the look-ups.
type leaseLister struct {
	*brokertest.Vault
	mu      sync.Mutex // guards tools against the scheduled sweeps
	tools   [][]broker.Tool
	lookUps int
}

// takeTools returns the tools of the lists since the last call.
func (a *leaseLister) takeTools() [][]broker.Tool {
	a.mu.Lock()
	defer a.mu.Unlock()
	tools := a.tools
	a.tools = nil
	return tools
}

func (a *leaseLister) Leases(ctx context.Context, tools []broker.Tool) ([]string, error) {
	a.mu.Lock()
	a.tools = append(a.tools, tools)
	a.mu.Unlock()
	return a.Vault.Leases(ctx, tools)
}

func (a *leaseLister) LookUpLeases(ctx context.Context, ids []string) ([]broker.FoundLease, error) {
	a.lookUps += len(ids)
	return a.Vault.LookUpLeases(ctx, ids)
}

// TestSweepCoversEarlierTools changes the path of one tool in the running bundle, and removes another. While their
// grants are live, a sweep also lists the leases at the paths from which the secrets came.
func TestSweepCoversEarlierTools(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Stop()
		vault := &leaseLister{Vault: w.vault}
		w.brokerVault = vault
		w.start(w.ledger)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		w.issue("root", step(root, "deploy"))
		delete(w.policy.Tools, "db.read")
		w.policy.Tools["deploy"] = broker.Tool{Name: "deploy", Backend: "target", Path: brokertest.Path("elsewhere/creds")}
		if _, err := w.Sweep(ctx); err != nil {
			t.Fatal(err)
		}
		if len(vault.tools) != 2 || vault.tools[0] != nil || len(vault.tools[1]) != 1 ||
			vault.tools[1][0].Path.String() != "target/creds" {
			t.Errorf("the sweep listed leases of %v, want those of the running bundle, then those below target/creds",
				vault.tools)
		}
		pass(2 * time.Minute)
		vault.tools = nil
		if _, err := w.Sweep(ctx); err != nil || len(vault.tools) != 1 {
			t.Errorf("after their end a sweep listed leases of %v, %v; want the running bundle's", vault.tools, err)
		}
	})
}

// TestSweepLooksUpUnknownLeases counts the requests of a sweep: one list, and one look-up for each lease that the ledger
// does not know. The leases of live grants cost nothing further.
func TestSweepLooksUpUnknownLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Stop()
		vault := &leaseLister{Vault: w.vault}
		w.brokerVault = vault
		w.start(w.ledger)
		root := w.open("root", broker.OpenRequest{})
		for range 30 {
			w.issue("root", step(root, "db.read"))
		}
		if _, err := w.Sweep(ctx); err != nil || len(vault.tools) != 1 || vault.lookUps != 0 {
			t.Errorf("a sweep over 30 known leases: %v, %d lists, %d look-ups; want 1 list and no look-up", err,
				len(vault.tools), vault.lookUps)
		}
		w.vault.Plant("orphan", time.Now().Add(-time.Minute))
		if s, err := w.Sweep(ctx); err != nil || s.Leases != 1 || vault.lookUps != 1 {
			t.Errorf("a sweep with an orphan = %+v, %v, %d look-ups; want it ended after 1", s, err, vault.lookUps)
		}
	})
}

// TestScheduledSweepsListLess counts the lists of the scheduled sweeps. Without a suspicion every tenth sweep lists the
// leases. After the start, after a lost answer and after an orphan each one does.
func TestScheduledSweepsListLess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Stop()
		vault := &leaseLister{Vault: w.vault}
		w.brokerVault, w.sweepEvery = vault, 10*time.Second
		w.start(w.ledger)
		root := w.open("root", broker.OpenRequest{})
		lists := func(what string, d time.Duration, want int) {
			t.Helper()
			vault.takeTools()
			pass(d)
			if n := len(vault.takeTools()); n != want {
				t.Errorf("%s: %d lists in %v, want %d", what, n, d, want)
			}
		}
		lists("after the start", 25*time.Second, 2) // a mint of the last process may complete within 17 s
		lists("without a suspicion", 80*time.Second, 0)
		lists("without a suspicion", 190*time.Second, 2)
		w.vault.Fail(func(point string) error {
			if point == "mint created" {
				return errors.New("connection reset")
			}
			return nil
		})
		_, err := w.Issue(ctx, as("root"), step(root, "db.read"))
		refused(t, "Issue", err, broker.Unavailable, broker.CodeOutcomeUnknown)
		w.vault.Fail(nil)
		lists("after a lost answer", 40*time.Second, 3) // until the mint cannot complete any more
		w.vault.Plant("orphan", time.Now().Add(-time.Hour))
		lists("until the next tenth sweep", 100*time.Second, 2) // which finds the orphan, and one more
		if n := w.countEntries(broker.OpOrphan); n != 1 {
			t.Errorf("the audit log has %d orphans, want 1", n)
		}
	})
}

// TestSweptBeforeClosed loses the answer of a mint, and Vault writes a lease that the ledger does not know. The
// revocation is not CLOSED before a sweep has revoked that lease.
func TestSweptBeforeClosed(t *testing.T) {
	for _, restarts := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			root := w.open("root", broker.OpenRequest{})
			w.issue("root", step(root, "db.read"))
			w.vault.Fail(func(point string) error {
				if point == "mint created" {
					return errors.New("connection reset")
				}
				return nil
			})
			_, err := w.Issue(ctx, as("root"), step(root, "db.read"))
			refused(t, "Issue", err, broker.Unavailable, broker.CodeOutcomeUnknown)
			w.vault.Fail(func(point string) error {
				if point == "leases" {
					return errors.New("Vault does not answer")
				}
				return nil
			})
			rv := w.revoke("chain:%s", root.Chain)
			pass(6 * time.Second)
			w.vault.Plant("target/creds/late", time.Now()) // as late as MintBound allows
			pass(time.Minute)
			if got := w.wantClosure(rv, broker.ClosureUnknown); !got.Unswept || got.Unknown != 0 || got.Dead != 2 {
				t.Errorf("before the sweep: %+v, want all grants dead, and Unswept", got)
			}
			if restarts {
				w.Stop()
				w.start(w.ledger)
			}
			w.vault.Fail(nil)
			pass(10 * time.Second)
			if got := w.wantClosure(rv, broker.ClosureClosed); got.Unswept {
				t.Errorf("after the sweep: %+v, want it swept", got)
			}
			w.wantAllClosed()
		})
	}
}

// TestYoungLeaseDelaysClosure holds that an unknown lease that may be the lost mint's delays the closure while it is
// young: another issue may be about to record it. A lease that was minted later does not delay the closure.
func TestYoungLeaseDelaysClosure(t *testing.T) {
	for _, row := range []struct {
		name   string
		minted time.Duration // after the fence
		delays bool
	}{{"minted within the bound", 6 * time.Second, true}, {"minted later", 40 * time.Second, false}} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				root := w.open("root", broker.OpenRequest{})
				w.vault.Fail(func(point string) error {
					if point == "mint created" {
						return errors.New("connection reset")
					}
					return nil
				})
				_, _ = w.Issue(ctx, as("root"), step(root, "db.read"))
				w.vault.Fail(nil)
				rv := w.revoke("chain:%s", root.Chain)
				w.vault.Plant("target/creds/young", time.Now().Add(row.minted))
				pass(11 * time.Second) // past Settles, and the lease is not 7 s old
				if !row.delays {
					w.wantClosure(rv, broker.ClosureClosed)
					return
				}
				w.wantClosure(rv, broker.ClosureUnknown)
				pass(10 * time.Second)
				w.wantClosure(rv, broker.ClosureClosed)
				if left := w.vault.LeaseIDs(); len(left) != 0 {
					t.Errorf("leases %v are alive when the revocation is CLOSED, want none", left)
				}
			})
		})
	}
}

// TestNoSweepWithoutALostMint holds that a revocation without a lost mint lists no leases: Vault is asked about each
// lease in a request of its own.
func TestNoSweepWithoutALostMint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		for range 50 {
			w.issue("root", step(root, "db.read"))
		}
		var listed atomic.Int32
		w.vault.Fail(func(point string) error {
			if point == "leases" {
				listed.Add(1)
			}
			return nil
		})
		rv := w.revoke("chain:%s", root.Chain)
		pass(time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		if n := listed.Load(); n != 0 {
			t.Errorf("the broker listed leases %d times, want never", n)
		}
	})
}

// TestIrrevocableLeases holds that a lease that Vault has given up revoking raises one alarm and shows in its grant's
// evidence. Its grant is not dead, and the broker retries until the lease is gone.
func TestIrrevocableLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		lease := w.vault.LeaseIDs()[0]
		w.issue("other", step(w.open("other", broker.OpenRequest{}), "db.read")) // Vault can revoke this lease
		w.vault.Plant("of/another/client", time.Now().Add(time.Hour))
		w.vault.Stick("of/another/client", true)
		w.vault.Stick(lease, true)
		rv := w.revoke("chain:%s", root.Chain)
		pass(time.Second)
		for range 3 {
			if _, err := w.Sweep(ctx); err != nil {
				t.Fatal(err)
			}
			pass(time.Second)
		}
		if n := w.Irrevocable(); n != 1 {
			t.Errorf("Irrevocable() = %d, want only the lease of the grant", n)
		}
		if n := w.countAlarms("given up revoking"); n != 1 {
			t.Errorf("the broker raised %d alarms about it, want 1", n)
		}
		v, err := w.Chain(ctx, root.Chain)
		if err != nil {
			t.Fatal(err)
		}
		givenUp := func(e broker.Evidence) bool { return strings.Contains(e.Answer, "given up revoking") }
		if g := v.Grants[0]; !slices.ContainsFunc(g.Evidence, givenUp) {
			t.Errorf("grant = %+v, want evidence that Vault has given up", g)
		}
		w.wantClosure(rv, broker.ClosureUnknown)
		w.vault.Stick(lease, false) // Vault can revoke it again
		if _, err := w.Sweep(ctx); err != nil {
			t.Fatal(err)
		}
		pass(time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		if _, err := w.Sweep(ctx); err != nil || w.Irrevocable() != 0 {
			t.Errorf("Irrevocable() = %d, %v; want none left", w.Irrevocable(), err)
		}
	})
}

// TestStuckLeaseCostIsConstant counts the lookups of a lease that Vault has given up. Each sweep ends its grant again,
// and yet there are no more lookups after many sweeps than after the first.
func TestStuckLeaseCostIsConstant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		w.vault.Stick(w.vault.LeaseIDs()[0], true)
		var lookups atomic.Int32
		w.vault.Fail(func(point string) error {
			if point == "gone" {
				lookups.Add(1)
			}
			return nil
		})
		rv := w.revoke("chain:%s", root.Chain)
		lookupsIn := func(minutes int) int32 {
			lookups.Store(0)
			for range minutes {
				if _, err := w.Sweep(ctx); err != nil {
					t.Fatal(err)
				}
				pass(time.Minute)
			}
			return lookups.Load()
		}
		lookupsIn(2)
		first := lookupsIn(5)
		lookupsIn(40)
		if later := lookupsIn(5); first == 0 || later > first*3/2 {
			t.Errorf("five minutes have %d lookups at first and %d later, want no more than half as many again",
				first, later)
		}
		w.wantClosure(rv, broker.ClosureUnknown)
	})
}

// TestStuckLeaseIsRetriedBetweenSweeps sweeps so often that no grant reaches the checks after which its lease is
// revoked by name. A lease that Vault has given up is revoked by name all the same.
func TestStuckLeaseIsRetriedBetweenSweeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		w.vault.Stick(w.vault.LeaseIDs()[0], true)
		w.revoke("chain:%s", root.Chain)
		tries := func() int { return w.countAlarms("outlived its token") }
		pass(5 * time.Second)
		before := tries()
		for range 40 {
			if _, err := w.Sweep(ctx); err != nil {
				t.Fatal(err)
			}
			pass(500 * time.Millisecond)
		}
		if n := tries() - before; n < 20 {
			t.Errorf("in 20 s with 40 sweeps the broker tried %d times to revoke the lease, want 20 or more", n)
		}
	})
}
