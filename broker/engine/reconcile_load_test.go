package engine_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// slowVault counts what it is asked, and lists leases for a while after it has ended them.
type slowVault struct {
	*brokertest.Vault
	until time.Time

	mu    sync.Mutex // guards kills and asked
	kills map[string]int
	asked int // whether leases are gone
}

func (v *slowVault) Kill(ctx context.Context, accessor string) error {
	v.mu.Lock()
	v.kills[accessor]++
	v.mu.Unlock()
	return v.Vault.Kill(ctx, accessor)
}

func (v *slowVault) LeasesGone(ctx context.Context, leases []string) ([]bool, error) {
	v.mu.Lock()
	v.asked++
	v.mu.Unlock()
	gone, err := v.Vault.LeasesGone(ctx, leases)
	for i := range gone {
		gone[i] = gone[i] && !time.Now().Before(v.until)
	}
	return gone, err
}

// TestVaultCallsPerRevocation holds that Vault is told once to end a token, and that a question about many leases is one question:
// how often it is asked grows with how long it takes, and not with how many there are.
func TestVaultCallsPerRevocation(t *testing.T) {
	asked := map[int]int{}
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
				t.Errorf("%d tokens were ended, want %d and the delegation's", len(v.kills), n)
			}
			for accessor, times := range v.kills {
				if times > 1 {
					t.Fatalf("the end of token %s was asked for %d times, want once", accessor, times)
				}
			}
			asked[n] = v.asked
		})
	}
	// 20, 40, 80, 160 and 320 ms after the first look and each time up to half as long again.
	if asked[20] < 4 || asked[20] > 6 || asked[1500] > 6 {
		t.Errorf("Vault was asked %d times whether 20 leases are gone, and %d times for 1500; want 4 to 6 times for either", asked[20], asked[1500])
	}
}
