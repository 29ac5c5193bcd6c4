package engine_test

import (
	"cmp"
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// slowLedger takes its time to answer for an update that appends an entry of one kind.
type slowLedger struct {
	broker.Ledger
	op broker.Op
	by time.Duration
}

func (l slowLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	var seen bool
	err := l.Ledger.Update(ctx, func(tx broker.Tx) error {
		seen = false
		return f(opTx{tx, l.op, &seen})
	})
	if seen {
		pass(l.by)
	}
	return err
}

type opTx struct {
	broker.Tx
	op   broker.Op
	seen *bool
}

func (t opTx) Append(e broker.Entry) (broker.Revision, error) {
	*t.seen = *t.seen || e.Op == t.op
	return t.Tx.Append(e)
}

// mintVault remembers until when the last mint may last.
type mintVault struct {
	broker.Vault
	after func() // called once each mint was made; nil: nothing
	mints atomic.Int32
	until atomic.Pointer[time.Time]
}

func (v *mintVault) Mint(ctx context.Context, token broker.Handle, m broker.Mint) (broker.Lease, broker.Secret, error) {
	v.mints.Add(1)
	if until, ok := ctx.Deadline(); ok {
		v.until.Store(&until)
	}
	lease, secret, err := v.Vault.Mint(ctx, token, m)
	if v.after != nil {
		v.after()
	}
	return lease, secret, err
}

// However long the ledger takes to record the step's token: when a grant settles, whatever was
// sent for it is over, and a mint whose time is over is not sent.
func TestMintEndsBeforeItsGrantSettles(t *testing.T) {
	const mintBound = 5 * time.Second // as in start
	for _, row := range []struct {
		name  string
		takes time.Duration
		mints int32
	}{{"at once", 0, 1}, {"a second", time.Second, 1}, {"longer than a mint may", 3 * time.Second, 0}} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				vault := &mintVault{Vault: w.vault}
				w.brokerVault = vault
				w.start(slowLedger{w.ledger, broker.OpHandle, row.takes})
				root := w.open("planner", broker.OpenRequest{})
				got, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
				if n := vault.mints.Load(); n != row.mints {
					t.Fatalf("%d mints were sent, want %d", n, row.mints)
				}
				if row.mints == 0 {
					refused(t, "Issue, recorded too late", err, broker.Unavailable, broker.CodeLedgerDown)
					pass(time.Minute)
					w.wantAllClosed()
					return
				}
				if err != nil {
					t.Fatalf("Issue = %v, want a secret", err)
				}
				if until := vault.until.Load(); until == nil || got.Grant.Settles.Before(until.Add(mintBound)) {
					t.Errorf("the grant settles at %v, and its mint may last until %v and %v more", got.Grant.Settles, until, mintBound)
				}
			})
		})
	}
}

// What was encoded before a transaction is not put over what the ledger was told meanwhile.
func TestCloseWhileMinting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		vault := &mintVault{Vault: w.vault}
		w.brokerVault = vault
		w.start(w.ledger)
		root := w.open("planner", broker.OpenRequest{})
		vault.after = func() {
			v, err := w.Chain(ctx, root.Chain)
			if err != nil || len(v.Grants) != 1 {
				t.Fatalf("Chain = %v, %v, want one grant", v, err)
			}
			soon, cancel := context.WithTimeout(ctx, time.Millisecond)
			defer cancel()
			if g, err := w.Close(soon, as("planner"), v.Grants[0].ID); err != nil || g.Ending != broker.EndingClosed {
				t.Fatalf("Close = %v, %v, want it on its way to its end", g, err)
			}
		}
		w.issue("planner", step(root, "db.read"))
		pass(time.Second)
		w.wantAllClosed()
		v, err := w.Chain(ctx, root.Chain)
		if err != nil || v.Grants[0].Ending != broker.EndingClosed || v.Grants[0].Lease.ID == "" {
			t.Fatalf("Chain = %+v, %v, want the grant closed by its agent, with its lease", v.Grants, err)
		}
	})
}

// rerunLedger runs what each update does twice, and keeps the second time.
type rerunLedger struct{ broker.Ledger }

var errAgain = errors.New("once more")

func (l rerunLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	err := l.Ledger.Update(ctx, func(tx broker.Tx) error { return cmp.Or(f(tx), errAgain) })
	if !errors.Is(err, errAgain) {
		return err
	}
	return l.Ledger.Update(ctx, f)
}

// A ledger may run what records a step again.
func TestIssueInRerunTransactions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start(rerunLedger{w.ledger})
		root := w.open("planner", broker.OpenRequest{})
		got := w.issue("planner", step(root, "db.read"))
		v, err := w.Chain(ctx, root.Chain)
		if err != nil || len(v.Grants) != 1 {
			t.Fatalf("Chain = %v, %v, want one grant", v, err)
		}
		if g := v.Grants[0]; g.State != broker.StateIssued || g.Token.Accessor == "" || g.Settles.IsZero() || g.Lease.ID == "" {
			t.Errorf("recorded: %+v, want it issued, with its token, its lease and when it settles", g)
		}
		if g := got.Grant; g.State != broker.StateIssued || g.Lease.ID != v.Grants[0].Lease.ID {
			t.Errorf("Issue = %+v, want what was recorded: %+v", g, v.Grants[0])
		}
	})
}
