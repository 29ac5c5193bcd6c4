package engine_test

import (
	"cmp"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// sealed returns a step with a secret sealed for the named collector; empty: for the holder. In place of encryption,
// the bytes are reversed.
func sealed(d broker.Delegation, collector string) broker.StepRequest {
	r := step(d, "db.read")
	r.Seal = &broker.Seal{Thumbprint: "thumb", Encrypt: func(_ broker.Grant, s broker.Secret) ([]byte, error) {
		return reversed(s.Reveal()), nil
	}}
	if collector != "" {
		r.Seal.Collector = as(collector).ID
	}
	return r
}

func reversed(b []byte) []byte {
	out := make([]byte, len(b))
	for i, c := range b {
		out[len(b)-1-i] = c
	}
	return out
}

func TestCollectOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		for _, collector := range []string{"", "worker"} {
			got := w.issue("root", sealed(root, collector))
			collects := cmp.Or(collector, "root")
			if !got.Secret.Empty() || got.Grant.Collector != as(collects).ID || got.Grant.Sealed != "thumb" {
				t.Fatalf("Issue of a sealed step = %+v, want no secret, and %s to collect it", got.Grant, collects)
			}
			_, _, err := w.Collect(ctx, as("thief"), got.Grant.ID)
			refused(t, "Collect by another caller", err, broker.NotFound, broker.CodeGrantUnknown)
			g, bytes, err := w.Collect(ctx, as(collects), got.Grant.ID)
			if err != nil || !w.target.Login(reversed(bytes)) || !g.Collected.Equal(time.Now()) {
				t.Fatalf("Collect = %+v, %v; want a secret that works", g, err)
			}
			_, _, err = w.Collect(ctx, as(collects), got.Grant.ID)
			refused(t, "Collect again", err, broker.Conflict, broker.CodeAlreadyCollected)
		}
		if n := w.countEntries(broker.OpCollected); n != 2 {
			t.Errorf("%d collections are recorded, want 2", n)
		}
		plain := w.issue("root", step(root, "db.read"))
		_, _, err := w.Collect(ctx, as("root"), plain.Grant.ID)
		refused(t, "Collect of a step that is not sealed", err, broker.NotFound, broker.CodeGrantUnknown)
		_, _, err = w.Collect(ctx, as("root"), "gr000000000000000000000000")
		refused(t, "Collect of an unknown grant", err, broker.NotFound, broker.CodeGrantUnknown)
		r := sealed(root, "")
		r.Seal.Collector = spiffeid.RequireFromString("spiffe://elsewhere.org/worker")
		_, err = w.Issue(ctx, as("root"), r)
		refused(t, "Issue for a collector in another trust domain", err, broker.Denied, broker.CodeForeignDomain)
	})
}

// TestCollectAfter holds that an event that ends or stops a step between its answer and the collection also stops the
// collection.
func TestCollectAfter(t *testing.T) {
	type event func(*world, broker.Delegation, broker.Grant)
	for name, row := range map[string]struct {
		event event
		kind  broker.Kind
		code  broker.Code
		works bool // the secret still works, and is not handed over
	}{
		"the chain is revoked": {func(w *world, d broker.Delegation, _ broker.Grant) {
			w.revoke("chain:%s", d.Chain)
		}, broker.Revoked, broker.CodeFenced, false},
		"the step is revoked": {func(w *world, _ broker.Delegation, g broker.Grant) {
			w.revoke("grant:%s", g.ID)
		}, broker.Revoked, broker.CodeFenced, false},
		"a rule covers it": {func(w *world, _ broker.Delegation, _ broker.Grant) {
			w.revoke("tool:db.read")
		}, broker.Revoked, broker.CodeFenced, false},
		"the chain is frozen": {func(w *world, d broker.Delegation, _ broker.Grant) {
			if _, err := w.tryRevoke(true, "chain:%s", d.Chain); err != nil {
				w.t.Fatal(err)
			}
		}, broker.Revoked, broker.CodeFrozen, true},
		"its agent closes it": {func(w *world, _ broker.Delegation, g broker.Grant) {
			if _, err := w.Close(ctx, as("root"), g.ID); err != nil {
				w.t.Fatal(err)
			}
		}, broker.Expired, broker.CodeExpired, false},
		"it expires": {func(_ *world, _ broker.Delegation, g broker.Grant) {
			pass(time.Until(g.Expires))
		}, broker.Expired, broker.CodeExpired, false},
		"the broker restarts": {func(w *world, _ broker.Delegation, _ broker.Grant) {
			w.Stop()
			w.vault = w.vault.Restarted()
			w.start(w.ledger)
		}, broker.Expired, broker.CodeDeliveryLost, false},
	} {
		for _, wait := range []time.Duration{0, time.Second} { // at once, and after the background work
			t.Run(name+"/"+wait.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					root := w.open("root", broker.OpenRequest{})
					g := w.issue("root", sealed(root, "worker")).Grant
					row.event(w, root, g)
					pass(wait)
					_, bytes, err := w.Collect(ctx, as("worker"), g.ID)
					if bytes != nil {
						t.Fatal("Collect handed a secret over")
					}
					refused(t, "Collect", err, row.kind, row.code)
					pass(5 * time.Second)
					if alive := w.target.Alive(); len(alive) > 0 != row.works {
						t.Errorf("alive after Collect: %v, want a login: %v", alive, row.works)
					}
				})
			})
		}
	}
}

// TestCollectAgainstAFence revokes a chain while collectors collect. A collection that began after the acknowledgement
// hands nothing over.
func TestCollectAgainstAFence(t *testing.T) {
	for range 30 {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			root := w.open("root", broker.OpenRequest{})
			var grants []broker.GrantID
			for range 40 {
				grants = append(grants, w.issue("root", sealed(root, "")).Grant.ID)
			}
			var wg sync.WaitGroup
			var acknowledged atomic.Bool
			for i, id := range grants {
				wg.Go(func() {
					if i == len(grants)/2 {
						w.revoke("chain:%s", root.Chain)
						acknowledged.Store(true)
					}
					after := acknowledged.Load()
					if _, bytes, err := w.Collect(ctx, as("root"), id); after && (err == nil || bytes != nil) {
						t.Error("Collect handed a secret over after the acknowledgement")
					}
				})
			}
			wg.Wait()
			pass(10 * time.Second)
			w.wantAllClosed()
		})
	}
}

// TestCollectRace holds that one of many concurrent collections gets the secret.
func TestCollectRace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		g := w.issue("root", sealed(w.open("root", broker.OpenRequest{}), "")).Grant
		var collected atomic.Int32
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				if _, bytes, err := w.Collect(ctx, as("root"), g.ID); err == nil && bytes != nil {
					collected.Add(1)
				}
			})
		}
		wg.Wait()
		if collected.Load() != 1 {
			t.Errorf("%d collections got the secret, want 1", collected.Load())
		}
	})
}

// TestSecondUse holds that the broker applies the consequence that policy attaches to a second collection.
func TestSecondUse(t *testing.T) {
	for consequence := broker.ConsequenceDeny; consequence <= broker.ConsequenceFreezeCaller; consequence++ {
		t.Run(consequence.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.policy.Answer = func(q broker.Question) broker.Decision {
					if q.Violation == broker.ViolationSecondUse {
						return broker.Decision{Consequence: consequence}
					}
					return broker.Decision{Allow: true}
				}
				d := w.draw("root -> sub")
				above, beside := w.issue("root", step(d["root"], "db.read")), w.issue("sub", step(d["sub"], "db.read"))
				twice := w.issue("sub", sealed(d["sub"], "worker")).Grant
				_, bytes, err := w.Collect(ctx, as("worker"), twice.ID)
				if err != nil {
					t.Fatal(err)
				}
				apart := w.open("worker", broker.OpenRequest{})
				_, _, err = w.Collect(ctx, as("worker"), twice.ID)
				refused(t, "Collect again", err, broker.Conflict, broker.CodeAlreadyCollected)
				var e *broker.Error
				if errors.As(err, &e); (e.Revocation == "") != (consequence == broker.ConsequenceDeny) {
					t.Errorf("after %s the refusal names revocation %q", consequence, e.Revocation)
				}
				pass(time.Second)
				for name, row := range map[string]struct {
					secret []byte
					dead   bool
				}{
					"collected twice":       {reversed(bytes), consequence >= broker.ConsequenceRevokeStep},
					"of the same holder":    {beside.Secret.Reveal(), consequence >= broker.ConsequenceRevokeSubtree},
					"of the chain's opener": {above.Secret.Reveal(), consequence >= broker.ConsequenceRevokeChain},
				} {
					if w.target.Login(row.secret) == row.dead {
						t.Errorf("after %s the secret %s is dead: %v, want %v", consequence, name, !row.dead, row.dead)
					}
				}
				_, err = w.Issue(ctx, as("worker"), step(apart, "db.read"))
				if frozen := consequence == broker.ConsequenceFreezeCaller; errors.Is(err, broker.Revoked) != frozen {
					t.Errorf("after %s a step in the collector's chain = %v, want it frozen: %v",
						consequence, err, frozen)
				}
				if n := w.countEntries(broker.OpViolation); n != 1 {
					t.Errorf("%d violations are recorded, want 1", n)
				}
			})
		})
	}
}

// TestSealedSecretsAreLimited holds that the broker refuses a sealed step before the mint when too many sealed secrets
// wait. A collection or an end frees a place. A secret that cannot be sealed is ended.
func TestSealedSecretsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		r := sealed(root, "")
		for _, encrypt := range []func(broker.Grant, broker.Secret) ([]byte, error){
			func(broker.Grant, broker.Secret) ([]byte, error) { return nil, errors.New("no") },
			func(broker.Grant, broker.Secret) ([]byte, error) {
				return []byte(strings.Repeat("x", broker.MaxSealed+1)), nil
			},
		} {
			r.Seal.Encrypt = encrypt
			_, err := w.Issue(ctx, as("root"), r)
			refused(t, "Issue of a secret that cannot be sealed", err, broker.Unavailable, broker.CodeDeliveryLost)
		}
		pass(time.Second)
		w.wantAllClosed()
		var last broker.Grant
		for i := range 1000 {
			got, err := w.Issue(ctx, as("root"), sealed(root, ""))
			if err != nil {
				refused(t, "Issue above the limit", err, broker.Unavailable, broker.CodeDeliveriesFull)
				if alive := len(w.target.Alive()); i < 100 || alive != i {
					t.Errorf("Issue was refused after %d steps with %d secrets alive, want nothing minted", i, alive)
				}
				break
			}
			last = got.Grant
		}
		w.issue("other", sealed(w.open("other", broker.OpenRequest{}), "")) // the limit is each caller's own
		if _, _, err := w.Collect(ctx, as("root"), last.ID); err != nil {
			t.Fatal(err)
		}
		w.issue("root", sealed(root, ""))
		w.revoke("chain:%s", root.Chain)
		pass(time.Second)
		again := w.open("root", broker.OpenRequest{})
		for range 100 {
			w.issue("root", sealed(again, ""))
		}
	})
}

// TestCollectWithoutLedger holds that Collect hands nothing over that the ledger cannot record. The secret stays
// collectable.
func TestCollectWithoutLedger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		g := w.issue("root", sealed(w.open("root", broker.OpenRequest{}), "")).Grant
		untilDurable()
		w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault { return brokertest.NotCommitted })
		_, bytes, err := w.Collect(ctx, as("root"), g.ID)
		if refused(t, "Collect", err, broker.Unavailable, broker.CodeLedgerDown); bytes != nil {
			t.Error("Collect handed a secret over without a record")
		}
		w.ledger.Fail(nil)
		if _, bytes, err := w.Collect(ctx, as("root"), g.ID); err != nil || bytes == nil {
			t.Errorf("Collect once the ledger works = %v, want the secret", err)
		}
	})
}
