package engine_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// killVault counts the requests to revoke a token, keeps the time of the first, and refuses them while down.
type killVault struct {
	*brokertest.Vault
	down bool

	mu    sync.Mutex // guards first and kills, and down once the broker runs
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

// TestTargetsSeverFirst holds that Vault gets the first request to revoke a token after the target has severed: Vault
// would end the same logins over the same database. A target that hangs delays this request for two seconds at most.
func TestTargetsSeverFirst(t *testing.T) {
	for _, row := range []struct {
		name                  string
		takes, atLeast, below time.Duration
	}{
		{"a target that severs at once", 0, 0, 10 * time.Millisecond},
		{"a target that takes a second", time.Second, time.Second, 1100 * time.Millisecond},
		{"a target that hangs", 20 * time.Second, 2 * time.Second, 2100 * time.Millisecond},
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
					t.Errorf("the first token was revoked %v after the fence, want at least %v and less than %v",
						took, row.atLeast, row.below)
				}
			})
		})
	}
}

// endings is a ledger that notes the order in which grants are recorded as CLOSED.
type endings struct {
	*brokertest.Memory
	order []broker.GrantID
}

func (l *endings) Order(ctx context.Context, f func(broker.Tx) error, done func(error)) error {
	var ended []broker.GrantID
	err := l.Memory.Order(ctx, func(tx broker.Tx) error {
		ended = nil
		return f(endingsTx{tx, &ended})
	}, done)
	if err == nil && len(ended) > 1 { // not those that each worker records beside it
		l.order = append(l.order, ended...)
	}
	return err
}

type endingsTx struct {
	broker.Tx
	ended *[]broker.GrantID
}

func (tx endingsTx) Append(e broker.Entry) (broker.Revision, error) {
	if e.Op == broker.OpClosed && e.Grant != "" {
		*tx.ended = append(*tx.ended, e.Grant)
	}
	return tx.Tx.Append(e)
}

// TestNeighboursAreClosedTogether holds that a large revocation records its grants in the order of their ids. Those of
// one transaction share pages of the ledger's file, so that its commit is short and no fence waits long for it.
func TestNeighboursAreClosedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Stop()
		w.target.ProveFinally() // so that one check closes them
		l := &endings{Memory: w.ledger}
		w.start(l)
		root := w.open("root", broker.OpenRequest{})
		for range 500 {
			w.issue("root", step(root, "db.read"))
		}
		rv := w.revoke("chain:%s", root.Chain)
		pass(10 * time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		synctest.Wait()
		if len(l.order) < 400 || !slices.IsSorted(l.order) {
			t.Errorf("%d grants were recorded together, sorted: %v; want nearly all 500, in the order of their ids",
				len(l.order), slices.IsSorted(l.order))
		}
	})
}
