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

// slowLedger delays the answer of an update that appends an entry with an op.
type slowLedger struct {
	broker.Ledger
	op    broker.Op
	delay time.Duration
}

func (l *slowLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	var appended bool
	err := l.Ledger.Update(ctx, func(tx broker.Tx) error {
		appended = false
		return f(opTx{tx, l.op, &appended})
	})
	if appended {
		pass(l.delay)
	}
	return err
}

type opTx struct {
	broker.Tx
	op       broker.Op
	appended *bool
}

func (t opTx) Append(e broker.Entry) (broker.Revision, error) {
	*t.appended = *t.appended || e.Op == t.op
	return t.Tx.Append(e)
}

// mintVault counts the mints and keeps the deadline of the last.
type mintVault struct {
	broker.Vault
	after    func() // called after each mint; nil: nothing
	mints    atomic.Int32
	deadline atomic.Pointer[time.Time]
}

func (v *mintVault) Mint(ctx context.Context, token broker.Handle, m broker.Mint) (broker.Lease, broker.Secret, error) {
	v.mints.Add(1)
	if deadline, ok := ctx.Deadline(); ok {
		v.deadline.Store(&deadline)
	}
	lease, secret, err := v.Vault.Mint(ctx, token, m)
	if v.after != nil {
		v.after()
	}
	return lease, secret, err
}

// TestMintEndsBeforeItsGrantSettles delays the record of the step's token, alone and with the intent. However long that
// takes, no mint is under way once the grant settles. The broker sends no mint after the mint's deadline.
func TestMintEndsBeforeItsGrantSettles(t *testing.T) {
	const mintBound = 5 * time.Second // as in start
	for _, row := range []struct {
		name  string
		first bool // step of the delegation: its handle is not known before the intent
		delay time.Duration
		mints int32
	}{
		{"at once", true, 0, 1}, {"after a second", true, time.Second, 1},
		{"after the mint's deadline", true, 3 * time.Second, 0},
		{"with the intent, at once", false, 0, 1}, {"with the intent, after a second", false, time.Second, 1},
		{"with the intent, after the mint's deadline", false, 3 * time.Second, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				vault := &mintVault{Vault: w.vault}
				w.brokerVault = vault
				ledger := &slowLedger{w.ledger, broker.OpHandle, row.delay}
				w.start(ledger)
				root := w.open("planner", broker.OpenRequest{})
				if !row.first {
					ledger.op, ledger.delay = "", 0
					w.issue("planner", step(root, "db.read"))
					ledger.op, ledger.delay = broker.OpIntent, row.delay
					vault.mints.Store(0)
				}
				got, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
				if n := vault.mints.Load(); n != row.mints {
					t.Fatalf("the broker sent %d mints, want %d", n, row.mints)
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
				deadline := vault.deadline.Load()
				if deadline == nil || got.Grant.MintDeadline.Before(deadline.Add(mintBound)) {
					t.Errorf("the grant settles at %v, want it %v after the mint's deadline %v, or later",
						got.Grant.MintDeadline, mintBound, deadline)
				}
			})
		})
	}
}

// TestCloseWhileMinting closes a grant while its mint is under way. The record of the mint, which was encoded before,
// does not overwrite the ending.
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
				t.Fatalf("Close = %v, %v, want it ending", g, err)
			}
		}
		w.issue("planner", step(root, "db.read"))
		pass(time.Second)
		w.wantAllClosed()
		v, err := w.Chain(ctx, root.Chain)
		if err != nil || v.Grants[0].Ending != broker.EndingClosed || v.Grants[0].Lease.ID == "" {
			t.Fatalf("Chain = %+v, %v, want the grant closed by its agent, and with its lease", v.Grants, err)
		}
	})
}

// rerunLedger runs the function of each update twice, and commits the second run.
type rerunLedger struct{ broker.Ledger }

var errAgain = errors.New("run it again")

func (l rerunLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	err := l.Ledger.Update(ctx, func(tx broker.Tx) error { return cmp.Or(f(tx), errAgain) })
	if !errors.Is(err, errAgain) {
		return err
	}
	return l.Ledger.Update(ctx, f)
}

func (l rerunLedger) Order(ctx context.Context, f func(broker.Tx) error, done func(error)) error {
	err := l.Ledger.Order(ctx, func(tx broker.Tx) error { return cmp.Or(f(tx), errAgain) }, func(error) {})
	if !errors.Is(err, errAgain) {
		return err
	}
	return l.Ledger.Order(ctx, f, done)
}

// TestIssueInRerunTransactions issues a step on a ledger that runs each function of an update again, as a ledger may.
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
		g := v.Grants[0]
		if g.State != broker.StateIssued || g.Token.Accessor == "" || g.MintDeadline.IsZero() || g.Lease.ID == "" {
			t.Errorf("the recorded grant = %+v, want it ISSUED, with Token, Lease and Settles", g)
		}
		if got.Grant.State != broker.StateIssued || got.Grant.Lease.ID != g.Lease.ID {
			t.Errorf("Issue = %+v, want the recorded grant %+v", got.Grant, g)
		}
	})
}
