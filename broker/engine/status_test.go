package engine_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// TestStatusNamesEndedSteps holds that the status names the holder's own fenced steps, and no other holder's. It names
// them before their secrets are dead, and after.
func TestStatusNamesEndedSteps(t *testing.T) {
	for name, fence := range map[string]func(w *world, g broker.Grant){
		"by its own fence": func(w *world, g broker.Grant) { w.revoke("grant:%s", g.ID) },
		"by a rule":        func(w *world, g broker.Grant) { w.revoke("grant:%s and tool:db.read", g.ID) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				d := w.draw("root -> {writer, other}")
				first := w.issue("writer", step(d["writer"], "db.read")).Grant
				w.issue("writer", step(d["writer"], "db.read"))
				w.issue("other", step(d["other"], "db.read"))
				fence(w, first)
				for range 2 { // before and after its end is proven
					for holder, want := range map[string][]broker.GrantID{
						"writer": {first.ID}, "other": nil, "root": nil,
					} {
						s, err := w.Status(ctx, as(holder), d[holder].ID)
						if err != nil || s.Fence != nil || !slices.Equal(s.Ended, want) {
							t.Errorf("Status of %s = %+v, %v; want %v ended and no fence", holder, s, err, want)
						}
					}
					pass(time.Second)
				}
			})
		})
	}
}

// TestWatchFences holds that every fence over a chain, and the lifting of a freeze, wakes its WatchFences. The steps of
// a busy chain do not.
func TestWatchFences(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.draw("root -> {writer, other}")
		apart := w.open("apart", broker.OpenRequest{})
		take := func(name string) broker.Grant { return w.issue(name, step(d[name], "db.read")).Grant }
		var frozen broker.Revocation
		for _, row := range []struct {
			name  string
			event func() error
			want  bool
		}{
			{"a step", func() error { take("writer"); return nil }, false},
			{"the end of a step", func() error {
				_, err := w.Close(ctx, as("writer"), take("writer").ID)
				return err
			}, false},
			{"a fence on another chain", func() error { w.revoke("chain:%s", apart.Chain); return nil }, false},
			{"a freeze by a rule", func() (err error) {
				frozen, err = w.tryRevoke(true, "tool:deploy")
				return err
			}, true},
			{"the end of the freeze", func() error {
				_, _ = w.Unfreeze(ctx, responder, frozen.ID) // the first of two persons: refused
				_, err := w.Unfreeze(ctx, broker.Operator{Name: "ben"}, frozen.ID)
				return err
			}, true},
			{"a fence on a grant", func() error { w.revoke("grant:%s", take("other").ID); return nil }, true},
			{"a fence on a subtree", func() error { w.revoke("subtree:%s", d["other"].ID); return nil }, true},
			{"a fence on the chain", func() error { w.revoke("chain:%s", d["root"].Chain); return nil }, true},
		} {
			woken, cancel := w.WatchFences(d["root"].Chain)
			if err := row.event(); err != nil {
				t.Fatalf("%s = %v", row.name, err)
			}
			synctest.Wait()
			got := false
			select {
			case <-woken:
				got = true
			default:
			}
			cancel()
			if got != row.want {
				t.Errorf("%s: woken = %v, want %v", row.name, got, row.want)
			}
		}
	})
}
