package engine_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// killVault notes when it is first told to end a token, and may refuse.
type killVault struct {
	*brokertest.Vault
	down bool

	mu    sync.Mutex // guards what follows
	first time.Time
	kills int
}

func (v *killVault) Kill(ctx context.Context, accessor string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.kills++; v.first.IsZero() {
		v.first = time.Now()
	}
	if v.down {
		return errors.New("connection refused")
	}
	return v.Vault.Kill(ctx, accessor)
}

func (v *killVault) count() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.kills
}

// TestTargetsSeverFirst holds that Vault is told of a revocation once the target has cut, since it would end the same
// logins over the same database, and that a target that hangs holds it up for two seconds at most.
func TestTargetsSeverFirst(t *testing.T) {
	for _, row := range []struct {
		name                  string
		takes, atLeast, below time.Duration
	}{
		{"a target that cuts at once", 0, 0, 10 * time.Millisecond},
		{"one that takes a second", time.Second, time.Second, 1100 * time.Millisecond},
		{"one that hangs", 20 * time.Second, 2 * time.Second, 2100 * time.Millisecond},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				v := &killVault{Vault: w.vault}
				w.Stop()
				w.brokerVault = v
				w.start(w.ledger)
				root := w.open("root", broker.OpenRequest{})
				w.issue("root", step(root, "db.read"))
				w.target.Fail(func(point string) error {
					if point == "sever" {
						pass(row.takes)
					}
					return nil
				})
				began := time.Now()
				rv := w.revoke("chain:%s", root.Chain)
				pass(time.Minute)
				w.wantClosure(rv, broker.ClosureClosed)
				if took := v.first.Sub(began); took < row.atLeast || took >= row.below {
					t.Errorf("Vault was told %v after the revocation, want at least %v and less than %v", took, row.atLeast, row.below)
				}
			})
		})
	}
}

// readLedger counts the updates that look at a revocation.
type readLedger struct {
	broker.Ledger
	reads atomic.Int32
}

func (l *readLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	return l.Ledger.Update(ctx, func(tx broker.Tx) error { return f(readTx{tx, &l.reads}) })
}

type readTx struct {
	broker.Tx
	reads *atomic.Int32
}

func (t readTx) Get(key string) ([]byte, error) {
	if strings.HasPrefix(key, "r/") {
		t.reads.Add(1)
	}
	return t.Tx.Get(key)
}

// TestReconcilerWaitsWithoutReading holds that a revocation that waits for Vault leaves the ledger to others while nothing changes.
func TestReconcilerWaitsWithoutReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		v, l := &killVault{Vault: w.vault, down: true}, &readLedger{Ledger: w.ledger}
		w.Stop()
		w.brokerVault = v
		w.start(l)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		rv := w.revoke("chain:%s", root.Chain)
		pass(10 * time.Second)
		reads, kills := l.reads.Load(), v.count()
		pass(20 * time.Second)
		if got := l.reads.Load(); got != reads {
			t.Errorf("%d updates looked at a revocation of which nothing changed, want none", got-reads)
		}
		if v.count() == kills {
			t.Error("Vault was not asked again")
		}
		w.wantClosure(rv, broker.ClosureUnknown)
		v.mu.Lock()
		v.down = false
		v.mu.Unlock()
		pass(20 * time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
	})
}

// tickingLedger has the broker's clock go on by a millisecond for each record that an update reads, and notes the most
// grants that one update ended.
type tickingLedger struct {
	broker.Ledger
	w    *world
	most atomic.Int32
}

func (l *tickingLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	return l.Ledger.Update(ctx, func(tx broker.Tx) error {
		t := &tickingTx{Tx: tx, l: l}
		err := f(t)
		l.most.Store(max(l.most.Load(), t.ended))
		return err
	})
}

type tickingTx struct {
	broker.Tx
	l     *tickingLedger
	ended int32
}

func (t *tickingTx) Get(key string) ([]byte, error) {
	t.l.w.skew.Add(int64(time.Millisecond))
	return t.Tx.Get(key)
}

func (t *tickingTx) Append(e broker.Entry) (broker.Revision, error) {
	if e.Op == broker.OpClosed {
		t.ended++
	}
	return t.Tx.Append(e)
}

// TestReaperTransactionsAreShort holds that the closer, however much it has to record, is never long in the ledger: a fence waits
// for the update that is running.
func TestReaperTransactionsAreShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Stop()
		l := &tickingLedger{Ledger: w.ledger, w: w}
		w.start(l)
		root := w.open("root", broker.OpenRequest{})
		for range 100 {
			w.issue("root", step(root, "db.read"))
		}
		rv := w.revoke("chain:%s", root.Chain)
		pass(10 * time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		w.wantAllClosed()
		if most := l.most.Load(); most < 1 || most > 4 {
			t.Errorf("one update ended %d grants when reading each took a millisecond, want 1 to 4", most)
		}
	})
}
