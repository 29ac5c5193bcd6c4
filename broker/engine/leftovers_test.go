package engine_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// wantLeftovers fails the test unless the broker and the revocation count so many leases, and so many as stuck, while
// the closure says that all secrets are dead.
func (w *world) wantLeftovers(rv broker.Revocation, leases, stuck int) {
	w.t.Helper()
	now := w.wantClosure(rv, broker.ClosureClosed)
	if now.Leases != leases || now.Alive+now.Unknown != 0 || now.Dead != now.Grants || now.Settled.IsZero() {
		w.t.Errorf("the revocation is %+v, want all dead, settled, and %d leases still being removed", now, leases)
	}
	if n, late := w.Leftovers(); n != leases || late != stuck {
		w.t.Errorf("Leftovers() = %d, %d, want %d, %d", n, late, leases, stuck)
	}
}

// stick makes all leases of the world irrevocable.
func (w *world) stick() (ids []string) {
	for _, id := range w.vault.LeaseIDs() {
		w.vault.Stick(id, true)
		ids = append(ids, id)
	}
	return ids
}

// TestClosedBeforeLeases holds that a revocation is CLOSED once the target shows all secrets dead for good and their
// tokens are revoked, while Vault still has the leases. These are counted, also after a restart, and retried until they
// are gone. A sweep takes none of them for an orphan. An alarm says that their number does not fall.
func TestClosedBeforeLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.target.ProveFinally()
		root := w.open("root", broker.OpenRequest{})
		for range 3 {
			w.issue("root", step(root, "db.read"))
		}
		leases := w.stick()
		rv, rule := w.revoke("chain:%s", root.Chain), w.revoke("tool:db.read")
		pass(time.Second)
		w.wantLeftovers(rv, 3, 0)
		w.wantLeftovers(rule, 3, 0)
		if _, err := w.Sweep(ctx); err != nil || w.countEntries(broker.OpOrphan) != 0 || w.Irrevocable() != 3 {
			t.Errorf("Sweep() = %v with %d orphans and %d irrevocable leases, want no orphan and all three", err,
				w.countEntries(broker.OpOrphan), w.Irrevocable())
		}
		pass(2 * time.Minute)
		if _, err := w.Sweep(ctx); err != nil || w.countEntries(broker.OpOrphan) != 0 {
			t.Errorf("Sweep() = %v with %d orphans, want none", err, w.countEntries(broker.OpOrphan))
		}
		w.wantLeftovers(rv, 3, 3)
		if n := w.countAlarms("does not remove the leases of 3 closed grants"); n != 1 {
			t.Errorf("alarms about the leases = %d, want 1", n)
		}

		w.Stop()
		w.vault = w.vault.Restarted()
		w.start(w.ledger)
		pass(time.Second)
		w.wantLeftovers(rv, 3, 0) // for a minute the process cannot say that nothing moves
		w.vault.Stick(leases[0], false)
		pass(time.Minute)
		w.wantLeftovers(rv, 2, 0)
		w.wantLeftovers(rule, 2, 0)
		for _, id := range leases[1:] {
			w.vault.Stick(id, false)
		}
		pass(time.Minute)
		w.wantLeftovers(rv, 0, 0)
		w.wantLeftovers(rule, 0, 0)
		w.wantAllClosed()
	})
}

// TestLeftoversOfLaterRevocations holds that a revocation counts the leases of grants that ended before it, and that one
// stuck lease raises the alarm although others come and go.
func TestLeftoversOfLaterRevocations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.target.ProveFinally()
		root := w.open("root", broker.OpenRequest{})
		first := w.issue("root", step(root, "db.read"))
		w.stick()
		if g, err := w.Close(ctx, as("root"), first.Grant.ID); err != nil || g.State != broker.StateClosed {
			t.Fatalf("Close() = %+v, %v, want CLOSED", g, err)
		}
		for range 12 {
			g := w.issue("root", step(root, "db.read"))
			if _, err := w.Close(ctx, as("root"), g.Grant.ID); err != nil {
				t.Fatal(err)
			}
			pass(time.Minute)
		}
		if n, stuck := w.Leftovers(); n != 1 || stuck != 1 {
			t.Errorf("Leftovers() = %d, %d after twelve minutes, want 1, 1", n, stuck)
		}
		rv := w.revoke("chain:%s", root.Chain)
		pass(time.Second)
		w.wantLeftovers(rv, 1, 1)
	})
}

// TestLeaseIsPartOfAProof holds that where the target's proof is not final a grant is not closed before its lease is
// gone, as for a target that shows a secret disabled, and would take it again when its lease is renewed.
func TestLeaseIsPartOfAProof(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		leases := w.stick()
		rv := w.revoke("chain:%s", root.Chain)
		pass(time.Minute)
		w.wantClosure(rv, broker.ClosureUnknown)
		w.vault.Stick(leases[0], false)
		pass(30 * time.Second)
		w.wantLeftovers(rv, 0, 0)
	})
}

// mintingVault mints once more with each token right before it is revoked, as a party that has the token could. It
// fails the first revocations.
type mintingVault struct {
	*brokertest.Vault
	target *brokertest.Target
	fails  int
	steps  map[string]broker.GrantID // by accessor
}

func (v *mintingVault) Kill(ctx context.Context, accessor string) error {
	id, ok := v.steps[accessor]
	if !ok {
		return v.Vault.Kill(ctx, accessor)
	}
	if v.fails > 0 {
		v.fails--
		return errors.New("no answer")
	}
	delete(v.steps, accessor)
	v.target.Plant(id)
	return v.Vault.Kill(ctx, accessor)
}

// TestTokenBeforeProof holds that nothing is CLOSED by a proof of the target that is older than the end of the step's
// token: until then the token could mint again. What it made is found, and ended.
func TestTokenBeforeProof(t *testing.T) {
	for _, fails := range []int{0, 4} {
		t.Run(fmt.Sprintf("%d revocations fail", fails), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.target.ProveFinally()
				w.Stop()
				v := &mintingVault{Vault: w.vault, target: w.target, fails: fails, steps: map[string]broker.GrantID{}}
				w.brokerVault = v
				w.start(w.ledger)
				root := w.open("root", broker.OpenRequest{})
				g := w.issue("root", step(root, "db.read")).Grant
				v.steps[w.grantIn(root.Chain, g.ID).Token.Accessor] = g.ID
				w.stick()
				rv := w.revoke("chain:%s", root.Chain)
				for range 2000 {
					pass(time.Millisecond)
					now, err := w.Revocation(ctx, rv.ID)
					if alive := w.target.Alive(); err != nil || now.Closure == broker.ClosureClosed && len(alive) > 0 {
						t.Fatalf("the revocation is %s, %v, while %v works", now.Closure, err, alive)
					}
					if now.Closure == broker.ClosureClosed {
						break
					}
				}
				w.wantLeftovers(rv, 1, 0)
			})
		})
	}
}

// TestWorksAgainWithALease has a target forget the end of logins of which Vault still has the leases. They are live
// again, and not counted as leases that are still being removed until they are proven dead once more.
func TestWorksAgainWithALease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.target.ProveFinally()
		root := w.open("root", broker.OpenRequest{})
		for range 2 {
			w.issue("root", step(root, "db.read"))
		}
		leases := w.stick()
		rv := w.revoke("chain:%s", root.Chain)
		pass(time.Second)
		w.wantLeftovers(rv, 2, 0)
		w.target.Fail(func(point string) error {
			if point == "sever" {
				return errors.New("it cannot be severed")
			}
			return nil
		})
		w.target.Forget()
		w.target.Replace()
		pass(time.Second)
		now := w.wantClosure(rv, broker.ClosurePartial)
		if n, _ := w.Leftovers(); n != 0 || now.Leases != 0 || now.Alive != 2 {
			t.Errorf("Leftovers() = %d and the revocation is %+v, want two alive and no lease beside them", n, now)
		}
		w.target.Fail(nil)
		pass(30 * time.Second)
		w.wantLeftovers(rv, 2, 0)
		for _, id := range leases {
			w.vault.Stick(id, false)
		}
		pass(time.Minute)
		w.wantLeftovers(rv, 0, 0)
		w.wantAllClosed()
	})
}
