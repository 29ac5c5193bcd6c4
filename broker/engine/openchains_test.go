package engine_test

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// TestOpenChainsAreBounded opens chains at once: exactly as many as one caller may have, over a restart too, until one
// ends. Other callers are not concerned.
func TestOpenChainsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Stop()
		w.mostChains, w.vault = broker.MaxOpenChains, w.vault.Restarted()
		w.start(w.ledger)
		open := func(name string, ttl time.Duration) error {
			_, err := w.Open(ctx, as(name), broker.OpenRequest{Task: "t", Rights: use("db.read"), TTL: ttl})
			return err
		}
		if err := open("agent", 10*time.Minute); err != nil {
			t.Fatal(err)
		}
		var opened atomic.Int64
		var wg sync.WaitGroup
		for range broker.MaxOpenChains + 50 {
			wg.Go(func() {
				if open("agent", 0) == nil {
					opened.Add(1)
				}
			})
		}
		wg.Wait()
		if n := opened.Load(); n != broker.MaxOpenChains-1 {
			t.Errorf("%d chains were opened beside the first, want %d", n, broker.MaxOpenChains-1)
		}
		w.Stop()
		w.vault = w.vault.Restarted()
		w.start(w.ledger)
		err := open("agent", 0)
		refused(t, "Open after the restart", err, broker.Denied, broker.CodeManyChains)
		var refusal *broker.Error
		if errors.As(err, &refusal); refusal.RetryAfter <= 0 || refusal.RetryAfter > 10*time.Minute+time.Second {
			t.Errorf("the refusal says to wait %v, want until the first chain ends", refusal.RetryAfter)
		}
		if err := open("agent/x", 0); err != nil {
			t.Errorf("Open of another caller = %v", err)
		}
		pass(refusal.RetryAfter)
		if err := open("agent", 0); err != nil {
			t.Errorf("Open after the wait = %v", err)
		}
		refused(t, "Open of one more", open("agent", 0), broker.Denied, broker.CodeManyChains)
	})
}
