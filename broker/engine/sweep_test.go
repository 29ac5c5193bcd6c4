package engine_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// TestSweepLeases: of what Vault lists, only what the ledger does not know and no issue can still be about to
// record is ended, and one that cannot be ended keeps no other alive.
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
			t.Errorf("Sweep = %+v, %v; want 2 strays ended and an error for the others", s, err)
		}
		if got, want := w.vault.LeaseIDs(), []string{"a-stuck", known, "young", "z-stuck"}; !slices.Equal(got, want) {
			t.Errorf("leases = %v, want %v", got, want)
		}
		w.vault.Stick("a-stuck", false)
		w.vault.Stick("z-stuck", false)
		pass(10 * time.Second) // then the young one is nobody's
		if s, err = w.Sweep(ctx); err != nil || s.Leases != 3 || !slices.Equal(w.vault.LeaseIDs(), []string{known}) {
			t.Errorf("Sweep later = %+v, %v, %v left; want the known lease alone", s, err, w.vault.LeaseIDs())
		}
		strays := 0
		entries, _ := w.Entries(ctx, 0, 1000)
		for _, e := range entries {
			if e.Op == broker.OpOrphan {
				strays++
			}
		}
		if strays != 5 {
			t.Errorf("%d strays in the audit, want 5", strays)
		}
	})
}

// asked notes for which tools leases were listed.
type leaseLister struct {
	broker.Vault
	tools [][]broker.Tool
}

func (a *leaseLister) Leases(_ context.Context, tools []broker.Tool) ([]broker.FoundLease, error) {
	a.tools = append(a.tools, tools)
	return nil, nil
}

// TestSweepCoversEarlierTools: a lease of a tool that the running bundle has elsewhere, or no more, is looked for at
// the path that it came from, as long as its grant lives.
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
		w.policy.Tools["deploy"] = broker.Tool{Name: "deploy", Backend: "target", Path: []string{"elsewhere", "creds"}}
		if _, err := w.Sweep(ctx); err != nil {
			t.Fatal(err)
		}
		if len(vault.tools) != 2 || vault.tools[0] != nil || len(vault.tools[1]) != 1 || strings.Join(vault.tools[1][0].Path, "/") != "target/creds" {
			t.Errorf("leases were listed of %v, want the running bundle's and then those below target/creds", vault.tools)
		}
		pass(2 * time.Minute)
		vault.tools = nil
		if _, err := w.Sweep(ctx); err != nil || len(vault.tools) != 1 {
			t.Errorf("with none of them alive, leases were listed of %v, %v; want the running bundle's alone", vault.tools, err)
		}
	})
}

// TestSweptBeforeClosed: the answer of a mint was lost, and Vault wrote a lease that the ledger does not know. The
// revocation is not CLOSED while it is there.
func TestSweptBeforeClosed(t *testing.T) {
	for _, restarts := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			root := w.open("root", broker.OpenRequest{})
			w.issue("root", step(root, "db.read"))
			w.vault.Fail(func(point string) error {
				if point == "mint created" {
					return errors.New("the connection was cut")
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
			w.vault.Plant("target/creds/late", time.Now()) // as late as Vault's bound allows
			pass(time.Minute)
			if got := w.wantClosure(rv, broker.ClosureUnknown); !got.Unswept || got.Unknown != 0 || got.Dead != 2 {
				t.Errorf("before the sweep: %+v, want all dead and yet not closed", got)
			}
			if restarts {
				w.Stop()
				w.start(w.ledger)
			}
			w.vault.Fail(nil)
			pass(10 * time.Second)
			if got := w.wantClosure(rv, broker.ClosureClosed); got.Unswept {
				t.Errorf("CLOSED and unswept: %+v", got)
			}
			w.wantAllClosed()
		})
	}
}

// TestYoungLeaseDelaysClosure: a lease that may be the lost mint's, and is too young to be told from another issue's,
// keeps the revocation open until it is old enough; what was minted later does not.
func TestYoungLeaseDelaysClosure(t *testing.T) {
	for _, row := range []struct {
		name   string
		issued time.Duration // after the fence
		open   bool
	}{{"in time to be the lost one", 6 * time.Second, true}, {"minted later", 40 * time.Second, false}} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				root := w.open("root", broker.OpenRequest{})
				w.vault.Fail(func(point string) error {
					if point == "mint created" {
						return errors.New("the connection was cut")
					}
					return nil
				})
				_, _ = w.Issue(ctx, as("root"), step(root, "db.read"))
				w.vault.Fail(nil)
				rv := w.revoke("chain:%s", root.Chain)
				w.vault.Plant("target/creds/young", time.Now().Add(row.issued))
				pass(11 * time.Second) // past Settles, and the lease is not 7 s old
				want := broker.ClosureClosed
				if row.open {
					want = broker.ClosureUnknown
				}
				w.wantClosure(rv, want)
				if row.open {
					pass(10 * time.Second)
					w.wantClosure(rv, broker.ClosureClosed)
					if left := w.vault.LeaseIDs(); len(left) != 0 {
						t.Errorf("CLOSED with %v alive", left)
					}
				}
			})
		})
	}
}

// TestNoSweepWithoutALostMint: listing leases costs a request each, so a revocation none of whose mints was lost asks
// for none.
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
			t.Errorf("leases were listed %d times, want never", n)
		}
	})
}

// TestIrrevocableLeases: what Vault has given up revoking is said once, shown with its grant, never called dead, and
// tried again until it goes.
func TestIrrevocableLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		lease := w.vault.LeaseIDs()[0]
		w.issue("other", step(w.open("other", broker.OpenRequest{}), "db.read")) // whose lease is well
		w.vault.Plant("somebody/elses", time.Now().Add(time.Hour))
		w.vault.Stick("somebody/elses", true)
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
			t.Errorf("Irrevocable() = %d, want ours alone", n)
		}
		if said := w.countAlarms("given up revoking"); said != 1 {
			t.Errorf("it was said %d times, want once", said)
		}
		v, err := w.Chain(ctx, root.Chain)
		if err != nil || !slices.ContainsFunc(v.Grants[0].Evidence, func(e broker.Evidence) bool { return strings.Contains(e.Answer, "given up revoking") }) {
			t.Errorf("grant = %+v, %v; want it to say that Vault has given up", v.Grants[0], err)
		}
		w.wantClosure(rv, broker.ClosureUnknown)
		w.vault.Stick(lease, false) // the database is back
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

// TestStuckLeaseCostIsConstant: each sweep has a lease that Vault has given up tried again, and however long that goes on,
// it is looked at no more often than at first.
func TestStuckLeaseCostIsConstant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		w.vault.Stick(w.vault.LeaseIDs()[0], true)
		var looks atomic.Int32
		w.vault.Fail(func(point string) error {
			if point == "gone" {
				looks.Add(1)
			}
			return nil
		})
		rv := w.revoke("chain:%s", root.Chain)
		minutes := func(n int) int32 {
			looks.Store(0)
			for range n {
				if _, err := w.Sweep(ctx); err != nil {
					t.Fatal(err)
				}
				pass(time.Minute)
			}
			return looks.Load()
		}
		minutes(2)
		first := minutes(5)
		minutes(40)
		if later := minutes(5); first == 0 || later > first*3/2 {
			t.Errorf("in five minutes it is looked at %d times at first, and %d times later; want no more", first, later)
		}
		w.wantClosure(rv, broker.ClosureUnknown)
	})
}

// TestStuckLeaseIsRetriedBetweenSweeps: however often sweeps hurry a lease that Vault has given up, it is revoked by
// name, for which a grant that was hurried a moment ago would be given time.
func TestStuckLeaseIsRetriedBetweenSweeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		w.vault.Stick(w.vault.LeaseIDs()[0], true)
		w.revoke("chain:%s", root.Chain)
		tried := func() int { return w.countAlarms("outlived its token") }
		pass(5 * time.Second)
		before := tried()
		for range 40 {
			if _, err := w.Sweep(ctx); err != nil {
				t.Fatal(err)
			}
			pass(500 * time.Millisecond)
		}
		if n := tried() - before; n < 20 {
			t.Errorf("in 20 s with 40 sweeps it was tried %d times, want about once for each", n)
		}
	})
}
