package broker_test

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

// TestTargetsCutFirst holds that Vault is told of a revocation once the target has cut, since it would end the same
// logins over the same database, and that a target that hangs holds it up for two seconds at most.
func TestTargetsCutFirst(t *testing.T) {
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
				w.through = v
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
				w.closure(rv, broker.ClosureClosed)
				if took := v.first.Sub(began); took < row.atLeast || took >= row.below {
					t.Errorf("Vault was told %v after the revocation, want at least %v and less than %v", took, row.atLeast, row.below)
				}
			})
		})
	}
}
