package closing_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// slowVault takes a second to revoke a token.
type slowVault struct{ *brokertest.Vault }

func (v slowVault) Kill(ctx context.Context, accessor string) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(time.Second):
		return v.Vault.Kill(ctx, accessor)
	}
}

// world is a running reaper with a ledger of one chain. Make it inside a synctest bubble.
type world struct {
	*closing.Reaper
	t      *testing.T
	target *brokertest.Target // of the backends "target" and "other"
	ledger *brokertest.Memory
	cache  records.Cache
	root   broker.Delegation
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	var work sync.WaitGroup
	t.Cleanup(func() { stop(); work.Wait() })
	w := &world{t: t, target: brokertest.NewTarget(), ledger: brokertest.NewMemory()}
	w.Reaper = closing.New(closing.Config{Vault: slowVault{brokertest.NewVault(w.target)}, Now: time.Now,
		Backends: map[string]broker.Backend{"target": w.target, "other": w.target},
		Alarm:    func(op string, err error) { t.Errorf("alarm: %s: %v", op, err) },
		View: func(ctx context.Context, _ string, f func(*records.Tx) error) error {
			return w.ledger.View(ctx, func(tx broker.Tx) error { return f(w.cache.In(tx)) })
		},
		Update: w.update, Undeliverable: func(*broker.Grant) bool { return false }, Discard: func([]broker.Grant) {},
		Order: func(ctx context.Context, _ string, f func(*records.Tx) error, done func(error)) error {
			return w.ledger.Order(ctx, func(tx broker.Tx) error { return f(w.cache.In(tx)) }, done)
		},
		Context: ctx, Background: work.Go, CallTimeout: 10 * time.Second, Workers: 8})
	work.Go(w.Run)

	agent := spiffeid.RequireFromString("spiffe://example.org/agent")
	w.root = broker.Delegation{ID: "dl000000000000000000000001", Chain: "ch000000000000000000000001", Holder: agent,
		Created: time.Now(), Expires: time.Now().Add(time.Hour)}
	w.must(w.update(ctx, "test", func(tx *records.Tx) error {
		return errors.Join(tx.AddChain(broker.Chain{ID: w.root.Chain, Task: "a task", Opener: agent,
			Opened: time.Now(), Root: w.root.ID}), tx.AddDelegation(w.root, broker.Entry{Op: broker.OpOpen}))
	}))
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) update(ctx context.Context, _ string, f func(*records.Tx) error) error {
	return w.ledger.Update(ctx, func(tx broker.Tx) error { return f(w.cache.In(tx)) })
}

// issued writes n issued grants that must end.
func (w *world) issued(n int, name, backend string, ending broker.Ending) (grants []broker.Grant) {
	w.t.Helper()
	w.must(w.update(context.Background(), "test", func(tx *records.Tx) error {
		grants = nil
		for i := range n {
			g := broker.Grant{ID: broker.GrantID(fmt.Sprintf("gr%s%020d", name, i)), Chain: w.root.Chain,
				Delegation: w.root.ID, Caller: w.root.Holder, Tool: "db.read", Backend: backend,
				State: broker.StateIssued, Created: time.Now(), Expires: time.Now().Add(time.Hour), Ending: ending,
				Token: broker.Handle{Accessor: fmt.Sprintf("accessor %s %d", name, i)}}
			encoded, err := records.EncodeGrant(g)
			if err := errors.Join(err, tx.AddEncoded(encoded)); err != nil {
				return err
			}
			grants = append(grants, g)
		}
		_, err := tx.Enter(broker.Entry{Op: broker.OpIssued, Chain: w.root.Chain, Delegation: w.root.ID})
		return err
	}))
	return grants
}

// close ends grants, and returns how long it took until all were closed.
func (w *world) close(grants []broker.Grant) time.Duration {
	began := time.Now()
	var all []<-chan struct{}
	for _, g := range grants {
		closed, cancel := w.Closed(g.ID)
		defer cancel()
		all = append(all, closed)
	}
	w.EndNow(grants...)
	for _, closed := range all {
		<-closed
	}
	return time.Since(began)
}

// live counts the grants in the ledger that are not closed.
func (w *world) live() (n int) {
	w.t.Helper()
	w.must(w.ledger.View(context.Background(), func(tx broker.Tx) error {
		return w.cache.In(tx).EachLiveID(records.Everywhere, func(broker.GrantID) error { n++; return nil })
	}))
	return n
}

// TestFewAreNotDelayedByMany revokes 2,000 grants at one backend while Vault takes a second for each token. An agent
// that closes one grant at the same backend waits only for its own token. Grants at another backend wait for each other
// only.
func TestFewAreNotDelayedByMany(t *testing.T) {
	const many = 2000
	for _, row := range []struct {
		name, backend string
		grants        int
		most          time.Duration
	}{
		{"one at the same backend", "target", 1, 2 * time.Second},
		{"one at another backend", "other", 1, 2 * time.Second},
		{"many at another backend", "other", 500, 70 * time.Second}, // eight tokens at once
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				revoked := w.issued(many, "mm", "target", broker.EndingRevoked)
				progress := w.Follow(revoked, nil, nil)
				defer progress.Close()
				w.EndFenced(revoked)
				time.Sleep(10 * time.Second)

				if took := w.close(w.issued(row.grants, "oo", row.backend, broker.EndingClosed)); took > row.most {
					t.Errorf("%d grants were closed after %v, want at most %v", row.grants, took, row.most)
				}
				if n := w.live(); n != many {
					t.Errorf("%d grants are live then, want all %d others", n, many)
				}
				time.Sleep(10 * time.Minute)
				if n, left := w.live(), len(progress.Left()); n != 0 || left != 0 {
					t.Errorf("%d grants are live after ten minutes and Progress has %d left, want none", n, left)
				}
			})
		})
	}
}

// TestFewStayFew pushes many grants one by one while the worker is busy. They are one large pass then, and a single
// grant that comes after them waits only for its own token.
func TestFewStayFew(t *testing.T) {
	const many = 500
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		first := w.issued(1, "ff", "target", broker.EndingClosed)[0]
		w.EndNow(first)
		synctest.Wait() // the worker revokes its token
		for _, g := range w.issued(many, "mm", "target", broker.EndingClosed) {
			w.EndNow(g)
			synctest.Wait() // each reaches the worker by itself
		}
		time.Sleep(2 * time.Second)
		if took := w.close(w.issued(1, "oo", "target", broker.EndingClosed)); took > 2*time.Second {
			t.Errorf("one grant was closed after %v, want at most 2s", took)
		}
		time.Sleep(10 * time.Minute)
		if n := w.live(); n != 0 {
			t.Errorf("%d grants are live after ten minutes, want none", n)
		}
	})
}

// TestSevering holds that a backend is severing until its target has answered, and that no other backend is.
func TestSevering(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		answer := make(chan struct{})
		w.target.Fail(func(point string) error {
			if point == "sever" {
				<-answer
			}
			return nil
		})
		check := func(when string, want bool) {
			t.Helper()
			synctest.Wait()
			for backend, want := range map[string]bool{"target": want, "other": false} {
				if got := w.Severing(map[string]bool{backend: true}); got != want {
					t.Errorf("Severing of %s %s = %v, want %v", backend, when, got, want)
				}
			}
		}
		check("before", false)
		w.EndFenced(w.issued(3, "mm", "target", broker.EndingRevoked))
		check("while the target severs", true)
		close(answer)
		check("after the target's answer", false)
	})
}
