package engine_test

import (
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
	"github.com/pawlsec/pawl/broker/selector"
)

// sealed is a step whose secret the named caller collects. What stands for encrypting turns the
// bytes round, so that unsealed can read them.
func sealed(d broker.Delegation, collector string) broker.StepRequest {
	r := step(d, "db.read")
	r.Seal = &broker.Seal{Thumbprint: "thumb", Encrypt: func(_ broker.Grant, s broker.Secret) ([]byte, error) { return reversed(s.Reveal()), nil }}
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
			who := map[string]string{"": "root", "worker": "worker"}[collector]
			if !got.Secret.Empty() || got.Grant.Collector != as(who).ID || got.Grant.Sealed != "thumb" {
				t.Fatalf("a sealed step = %+v, want no secret and %s to collect it", got.Grant, who)
			}
			_, _, err := w.Collect(ctx, as("thief"), got.Grant.ID)
			refused(t, "Collect by somebody else", err, broker.NotFound, broker.CodeGrantUnknown)
			g, bytes, err := w.Collect(ctx, as(who), got.Grant.ID)
			if err != nil || !w.target.Login(reversed(bytes)) || !g.Collected.Equal(time.Now()) {
				t.Fatalf("Collect = %+v, %v; want a secret that works", g, err)
			}
			_, _, err = w.Collect(ctx, as(who), got.Grant.ID)
			refused(t, "Collect again", err, broker.Conflict, broker.CodeAlreadyCollected)
		}
		if n := w.countEntries(broker.OpCollected); n != 2 {
			t.Errorf("%d collections are on record, want 2", n)
		}
		plain := w.issue("root", step(root, "db.read"))
		_, _, err := w.Collect(ctx, as("root"), plain.Grant.ID)
		refused(t, "Collect of what is not sealed", err, broker.NotFound, broker.CodeGrantUnknown)
		_, _, err = w.Collect(ctx, as("root"), "gr000000000000000000000000")
		refused(t, "Collect of nothing", err, broker.NotFound, broker.CodeGrantUnknown)
		r := sealed(root, "")
		r.Seal.Collector = spiffeid.RequireFromString("spiffe://elsewhere.org/worker")
		_, err = w.Issue(ctx, as("root"), r)
		refused(t, "a collector elsewhere", err, broker.Denied, broker.CodeForeignDomain)
	})
}

// TestCollectAfter: whatever ends or stops a step between its answer and the collection stops the
// collection, too.
func TestCollectAfter(t *testing.T) {
	for name, row := range map[string]struct {
		between func(*world, broker.Delegation, broker.Grant)
		kind    broker.Kind
		code    broker.Code
		works   bool // the secret goes on, unseen
	}{
		"the chain is revoked": {func(w *world, d broker.Delegation, _ broker.Grant) { w.revoke("chain:%s", d.Chain) }, broker.Revoked, broker.CodeFenced, false},
		"the step is revoked":  {func(w *world, _ broker.Delegation, g broker.Grant) { w.revoke("grant:%s", g.ID) }, broker.Revoked, broker.CodeFenced, false},
		"a rule is written":    {func(w *world, _ broker.Delegation, _ broker.Grant) { w.revoke("tool:db.read") }, broker.Revoked, broker.CodeFenced, false},
		"it is frozen": {func(w *world, d broker.Delegation, _ broker.Grant) {
			if _, err := w.Revoke(ctx, responder, selector.Request{Selector: selecting(w.t, "chain:%s", d.Chain), Reason: "a look", Freeze: true}); err != nil {
				w.t.Fatal(err)
			}
		}, broker.Revoked, broker.CodeFrozen, true},
		"it is closed": {func(w *world, _ broker.Delegation, g broker.Grant) {
			if _, err := w.Close(ctx, as("root"), g.ID); err != nil {
				w.t.Fatal(err)
			}
		}, broker.Expired, broker.CodeExpired, false},
		"its time is over": {func(_ *world, _ broker.Delegation, g broker.Grant) { pass(time.Until(g.Expires)) }, broker.Expired, broker.CodeExpired, false},
		"the broker restarts": {func(w *world, _ broker.Delegation, _ broker.Grant) {
			w.Stop()
			w.vault = w.vault.Restarted()
			w.start(w.ledger)
		}, broker.Expired, broker.CodeDeliveryLost, false},
	} {
		for _, wait := range []time.Duration{0, time.Second} { // at once, and when everything has settled
			t.Run(name+"/"+wait.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					root := w.open("root", broker.OpenRequest{})
					g := w.issue("root", sealed(root, "worker")).Grant
					row.between(w, root, g)
					pass(wait)
					_, bytes, err := w.Collect(ctx, as("worker"), g.ID)
					if bytes != nil {
						t.Fatal("a secret was given")
					}
					refused(t, "Collect", err, row.kind, row.code)
					pass(5 * time.Second)
					if alive := w.target.Alive(); len(alive) > 0 != row.works {
						t.Errorf("alive afterwards: %v, want some: %v", alive, row.works)
					}
				})
			})
		}
	}
}

// TestCollectAgainstAFence: collectors and a revocation at once. A collection that began after the
// acknowledgement gives nothing.
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
						t.Error("a secret was given after the acknowledgement")
					}
				})
			}
			wg.Wait()
			pass(10 * time.Second)
			w.wantAllClosed()
		})
	}
}

// TestCollectRace: of many at once one gets it.
func TestCollectRace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		g := w.issue("root", sealed(w.open("root", broker.OpenRequest{}), "")).Grant
		var given atomic.Int32
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				if _, bytes, err := w.Collect(ctx, as("root"), g.ID); err == nil && bytes != nil {
					given.Add(1)
				}
			})
		}
		wg.Wait()
		if given.Load() != 1 {
			t.Errorf("%d got the secret, want 1", given.Load())
		}
	})
}

// TestSecondUse: what policy says follows a second collection.
func TestSecondUse(t *testing.T) {
	for what := broker.ConsequenceDeny; what <= broker.ConsequenceFreezeCaller; what++ {
		t.Run(what.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.policy.Answer = func(q broker.Question) broker.Decision {
					if q.Violation == broker.ViolationSecondUse {
						return broker.Decision{Consequence: what}
					}
					return broker.Decision{Allow: true}
				}
				d := w.draw("root -> sub")
				above, beside, twice := w.issue("root", step(d["root"], "db.read")), w.issue("sub", step(d["sub"], "db.read")), w.issue("sub", sealed(d["sub"], "worker")).Grant
				_, bytes, err := w.Collect(ctx, as("worker"), twice.ID)
				if err != nil {
					t.Fatal(err)
				}
				apart := w.open("worker", broker.OpenRequest{})
				_, _, err = w.Collect(ctx, as("worker"), twice.ID)
				refused(t, "Collect again", err, broker.Conflict, broker.CodeAlreadyCollected)
				var e *broker.Error
				if errors.As(err, &e); (e.Revocation == "") != (what == broker.ConsequenceDeny) {
					t.Errorf("after %s the refusal names revocation %q", what, e.Revocation)
				}
				pass(time.Second)
				for name, row := range map[string]struct {
					secret []byte
					dead   bool
				}{"collected twice": {reversed(bytes), what >= broker.ConsequenceRevokeStep}, "beside it": {beside.Secret.Reveal(), what >= broker.ConsequenceRevokeSubtree},
					"above it": {above.Secret.Reveal(), what >= broker.ConsequenceRevokeChain}} {
					if w.target.Login(row.secret) == row.dead {
						t.Errorf("after %s the secret %s is dead: %v", what, name, !row.dead)
					}
				}
				if _, err := w.Issue(ctx, as("worker"), step(apart, "db.read")); errors.Is(err, broker.Revoked) != (what == broker.ConsequenceFreezeCaller) {
					t.Errorf("after %s a step of the collector's own = %v", what, err)
				}
				if n := w.countEntries(broker.OpViolation); n != 1 {
					t.Errorf("%d violations are on record, want 1", n)
				}
			})
		})
	}
}

// TestSealedSecretsAreLimited: what waits is bounded before anything is minted, and ends give room again; a
// secret that cannot be sealed is ended.
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
			refused(t, "a step that cannot be sealed", err, broker.Unavailable, broker.CodeDeliveryLost)
		}
		pass(time.Second)
		w.wantAllClosed()
		var last broker.Grant
		for i := range 1000 {
			got, err := w.Issue(ctx, as("root"), sealed(root, ""))
			if err != nil {
				refused(t, "a step too many", err, broker.Unavailable, broker.CodeDeliveriesFull)
				if i < 100 || len(w.target.Alive()) != i {
					t.Errorf("refused after %d, with %d alive; want nothing minted for it", i, len(w.target.Alive()))
				}
				break
			}
			last = got.Grant
		}
		w.issue("other", sealed(w.open("other", broker.OpenRequest{}), "")) // has room of its own
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

// TestCollectWithoutLedger: nothing is given that is not on record, and it is not lost by that.
func TestCollectWithoutLedger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		g := w.issue("root", sealed(w.open("root", broker.OpenRequest{}), "")).Grant
		w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault { return brokertest.NotCommitted })
		_, bytes, err := w.Collect(ctx, as("root"), g.ID)
		if refused(t, "Collect", err, broker.Unavailable, broker.CodeLedgerDown); bytes != nil {
			t.Error("a secret was given without a record")
		}
		w.ledger.Fail(nil)
		if _, bytes, err := w.Collect(ctx, as("root"), g.ID); err != nil || bytes == nil {
			t.Errorf("Collect afterwards = %v, want the secret", err)
		}
	})
}
