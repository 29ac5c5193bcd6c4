package engine_test

import (
	"context"
	"errors"
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
