package engine_test

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// readLedger counts the reads of revocations in updates.
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

// TestReconcilerWaitsWithoutReading holds that, while a revocation waits for Vault and nothing changes, no update reads
// the revocation: updates exclude each other.
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
			t.Errorf("updates read a revocation %d times while nothing changed, want never", got-reads)
		}
		if v.count() == kills {
			t.Error("the broker did not retry to revoke the token")
		}
		w.wantClosure(rv, broker.ClosureUnknown)
		v.mu.Lock()
		v.down = false
		v.mu.Unlock()
		pass(20 * time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
	})
}

// tickingLedger advances the broker's clock by a millisecond for each record that an update reads. It keeps the largest
// number of grants that one update closed.
type tickingLedger struct {
	broker.Ledger
	w    *world
	most atomic.Int32
}

func (l *tickingLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	return l.Ledger.Update(ctx, l.ticking(f))
}

func (l *tickingLedger) Order(ctx context.Context, f func(broker.Tx) error, done func(error)) error {
	return l.Ledger.Order(ctx, l.ticking(f), done)
}

func (l *tickingLedger) ticking(f func(broker.Tx) error) func(broker.Tx) error {
	return func(tx broker.Tx) error {
		t := &tickingTx{Tx: tx, l: l}
		err := f(t)
		l.most.Store(max(l.most.Load(), t.closed))
		return err
	}
}

type tickingTx struct {
	broker.Tx
	l      *tickingLedger
	closed int32
}

func (t *tickingTx) Get(key string) ([]byte, error) {
	t.l.w.skew.Add(int64(time.Millisecond))
	return t.Tx.Get(key)
}

func (t *tickingTx) Append(e broker.Entry) (broker.Revision, error) {
	if e.Op == broker.OpClosed {
		t.closed++
	}
	return t.Tx.Append(e)
}

// TestReaperTransactionsAreShort holds that the reaper splits its work into short updates, however much it has to
// record: a fence waits for the update that runs.
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
			t.Errorf("one update closed %d grants when each read took a millisecond, want 1 to 4", most)
		}
	})
}

// slowVault counts the requests that it gets. It lists leases until a time, although it has ended them earlier.
type slowVault struct {
	*brokertest.Vault
	until time.Time

	mu      sync.Mutex // guards kills and lookups
	kills   map[string]int
	lookups int // requests that ask whether leases are gone
}

func (v *slowVault) Kill(ctx context.Context, accessor string) error {
	v.mu.Lock()
	v.kills[accessor]++
	v.mu.Unlock()
	return v.Vault.Kill(ctx, accessor)
}

func (v *slowVault) LeasesGone(ctx context.Context, leases []string) ([]bool, error) {
	v.mu.Lock()
	v.lookups++
	v.mu.Unlock()
	gone, err := v.Vault.LeasesGone(ctx, leases)
	for i := range gone {
		gone[i] = gone[i] && !time.Now().Before(v.until)
	}
	return gone, err
}

// TestVaultCallsPerRevocation holds that the broker revokes each token once, and looks up many leases in one request.
// The number of lookups grows with the time that Vault takes, and not with the number of leases.
func TestVaultCallsPerRevocation(t *testing.T) {
	lookups := map[int]int{}
	for _, n := range []int{20, 1500} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			v := &slowVault{Vault: w.vault, kills: map[string]int{}}
			w.Stop()
			w.brokerVault = v
			w.start(w.ledger)
			root := w.open("root", broker.OpenRequest{})
			for range n {
				w.issue("root", step(root, "db.read"))
			}
			v.until = time.Now().Add(400 * time.Millisecond)
			rv := w.revoke("chain:%s", root.Chain)
			pass(10 * time.Second)
			w.wantClosure(rv, broker.ClosureClosed)
			w.wantAllClosed()
			if len(v.kills) < n {
				t.Errorf("%d tokens were revoked, want %d and the delegation's", len(v.kills), n)
			}
			for accessor, times := range v.kills {
				if times > 1 {
					t.Fatalf("token %s was revoked %d times, want once", accessor, times)
				}
			}
			lookups[n] = v.lookups
		})
	}
	// The retries come 20, 40, 80, 160 and 320 ms after the first lookup, each plus up to half of that.
	if lookups[20] < 4 || lookups[20] > 6 || lookups[1500] > 6 {
		t.Errorf("Vault looked up 20 leases in %d requests and 1500 leases in %d, want 4 to 6 requests for either",
			lookups[20], lookups[1500])
	}
}
