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

// TestWorksAgain has a target forget that logins ended, as a failover to a server that missed it. A revocation of such
// logins is not CLOSED any more. All of them are ended again, and proven dead again.
func TestWorksAgain(t *testing.T) {
	for name, notice := range map[string]func(*world){
		"another server takes its place": func(w *world) { w.target.Replace() },
		"a sweep": func(w *world) {
			if s, err := w.Sweep(ctx); err != nil || s.Logins == 0 {
				w.t.Errorf("Sweep = %+v, %v, want the logins that work again", s, err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				const grants = 130 // more than one transaction takes
				root, other := w.open("root", broker.OpenRequest{}), w.open("root", broker.OpenRequest{})
				for range grants {
					w.issue("root", step(root, "db.read"))
				}
				closed := w.issue("root", step(other, "db.read"))
				if _, err := w.Close(ctx, as("root"), closed.Grant.ID); err != nil {
					t.Fatal(err)
				}
				chain, rule := w.revoke("chain:%s", root.Chain), w.revoke("tool:db.read")
				pass(10 * time.Second)
				w.wantClosure(chain, broker.ClosureClosed)
				w.wantClosure(rule, broker.ClosureClosed)

				w.target.Forget()
				w.target.Fail(func(point string) error {
					if point == "sever" {
						return errors.New("it cannot be severed")
					}
					return nil
				})
				notice(w)
				pass(time.Second)
				for rv, alive := range map[*broker.Revocation]int{&chain: grants, &rule: grants + 1} {
					now := w.wantClosure(*rv, broker.ClosurePartial)
					if now.Alive != alive || now.Grants < alive || now.Dead+now.Alive != now.Grants || !now.Settled.IsZero() {
						t.Errorf("the revocation of %s is %+v, want %d alive and not settled", rv.Selector, now, alive)
					}
				}
				if n := w.countAlarms("131 secrets that were proven dead work again at target"); n != 1 {
					t.Errorf("alarms about the logins = %d, want 1", n)
				}
				if n := w.countEntries(broker.OpOrphan); n != grants+1 {
					t.Errorf("entries about the logins = %d, want %d", n, grants+1)
				}
				w.target.Fail(nil)
				pass(30 * time.Second)
				for _, rv := range []broker.Revocation{chain, rule} {
					if now := w.wantClosure(rv, broker.ClosureClosed); now.Dead != now.Grants || now.Settled.IsZero() {
						t.Errorf("the revocation of %s is %+v, want all dead", rv.Selector, now)
					}
				}
				w.wantAllClosed()
				pass(time.Minute)
				if n := w.countEntries(broker.OpOrphan); n != grants+1 {
					t.Errorf("entries about the logins a minute later = %d, want %d", n, grants+1)
				}
			})
		})
	}
}

// holdingVault does not answer look-ups of leases before it is told to.
type holdingVault struct {
	*brokertest.Vault
	asked  sync.Once
	answer chan struct{}
	first  chan struct{} // closed at the first look-up
}

func (v *holdingVault) LeasesGone(ctx context.Context, leases []string) ([]bool, error) {
	v.asked.Do(func() { close(v.first) })
	<-v.answer
	return v.Vault.LeasesGone(ctx, leases)
}

// TestProofOfFormerServer has another server take a target's place while the broker, with the proof of the former one,
// still waits for Vault. That proof is worth nothing any more.
func TestProofOfFormerServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		v := &holdingVault{Vault: w.vault, answer: make(chan struct{}), first: make(chan struct{})}
		w.Stop()
		w.brokerVault = v
		w.start(w.ledger)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		rv := w.revoke("chain:%s", root.Chain)
		<-v.first
		pass(time.Second)
		w.target.Forget()
		w.target.Fail(func(point string) error {
			if point == "sever" {
				return errors.New("it cannot be severed")
			}
			return nil
		})
		w.target.Replace()
		pass(time.Second)
		close(v.answer)
		pass(time.Second)
		w.wantClosure(rv, broker.ClosurePartial)
		w.target.Fail(nil)
		pass(30 * time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		w.wantAllClosed()
	})
}

// TestReplacedByAWrongClock has another server take a target's place, or forget an end, while the broker's clock is an
// hour ahead. Once it is right again, a proof counts at once, and a secret that works again is found.
func TestReplacedByAWrongClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		w.skew.Store(int64(time.Hour))
		w.target.Replace()
		synctest.Wait()
		w.skew.Store(0)
		rv := w.revoke("chain:%s", root.Chain)
		pass(30 * time.Second)
		w.wantClosure(rv, broker.ClosureClosed)

		root = w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		w.skew.Store(int64(time.Hour))
		rv = w.revoke("chain:%s", root.Chain)
		synctest.Wait()
		w.skew.Store(0)
		pass(30 * time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		w.target.Fail(func(point string) error {
			if point == "sever" {
				return errors.New("it cannot be severed")
			}
			return nil
		})
		w.target.Forget()
		w.target.Replace()
		pass(time.Second)
		w.wantClosure(rv, broker.ClosurePartial)
		w.target.Fail(nil)
		pass(30 * time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
	})
}
