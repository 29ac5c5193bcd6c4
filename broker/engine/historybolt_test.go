package engine_test

import (
	"context"
	"path/filepath"
	"testing"
	"testing/synctest"

	"github.com/anishathalye/porcupine"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/store/bolt"
)

// boltAttempts is the number of attempts of each client in a round on a file.
const boltAttempts = 25

// onBolt opens an empty ledger in a file. The test closes it.
func onBolt(t *testing.T) broker.Ledger {
	l, err := bolt.Open(bolt.Config{Path: filepath.Join(t.TempDir(), "ledger"), Reserve: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("Close = %v, want nil", err)
		}
	})
	return l
}

// TestHistoriesOnBolt is [TestHistories] on the ledger in a file, with 200 histories.
func TestHistoriesOnBolt(t *testing.T) {
	handed, refused := 0, 0
	for range 200 / roundChains {
		synctest.Test(t, func(t *testing.T) {
			s := newRound(t, boltAttempts, func(broker.Ledger) broker.Ledger { return onBolt(t) })
			if got := s.run(); got != porcupine.Ok {
				t.Fatalf("porcupine's result = %s, want %s", got, porcupine.Ok)
			}
			s.wantAllClosed()
			for _, history := range s.seen {
				for _, op := range history {
					if yes := op.Output.(bool); op.Input == handOver && yes {
						handed++
					} else if op.Input == handOver {
						refused++
					}
				}
			}
		})
	}
	t.Logf("%d secrets handed over, %d requests refused", handed, refused)
	if handed < 2_000 || refused < 5_000 {
		t.Errorf("%d secrets handed over and %d requests refused, want 2,000 and 5,000 or more", handed, refused)
	}
}

// unorderedLedger forgets the order of an ordered change and a fence: the change does not see the fences before it.
type unorderedLedger struct{ broker.Ledger }

func (l unorderedLedger) Order(ctx context.Context, f func(broker.Tx) error, done func(error)) error {
	return l.Ledger.Order(ctx, func(tx broker.Tx) error { return f(blindTx{tx}) }, done)
}

// TestHistoriesWithoutTheOrder holds that the checker can fail on the ledger in a file: it finds the promise that is
// broken when ISSUED may pass a fence.
func TestHistoriesWithoutTheOrder(t *testing.T) {
	for range 50 {
		found := false
		synctest.Test(t, func(t *testing.T) {
			s := newRound(t, boltAttempts, func(broker.Ledger) broker.Ledger { return unorderedLedger{onBolt(t)} })
			found = s.run() == porcupine.Illegal
		})
		if found {
			return
		}
	}
	t.Error("porcupine found no broken promise in 50 rounds in which ISSUED may pass a fence")
}
