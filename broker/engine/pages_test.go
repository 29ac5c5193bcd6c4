package engine_test

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/selector"
)

// TestPagesAreStable reads lists in small pages, while others open chains, take steps and end them. Each page continues
// where the one before ended: nothing that was there at the first page is missing, and nothing comes twice.
func TestPagesAreStable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var chains, revocations, canaries []string
		for i := range 23 {
			d := w.open("planner", broker.OpenRequest{})
			pass(10 * time.Millisecond) // ids begin with the time
			chains = append(chains, string(d.Chain))
			rv, err := w.Revoke(ctx, responder, selector.Request{Freeze: true, Reason: "a test",
				Selector: selecting(t, "chain:%s", d.Chain)})
			if err != nil {
				t.Fatal(err)
			}
			revocations = append(revocations, string(rv.ID))
			c, _, err := w.Plant(ctx, responder, broker.PlantRequest{Note: fmt.Sprint(i)})
			if err != nil {
				t.Fatal(err)
			}
			canaries = append(canaries, string(c.ID))
		}
		for name, list := range map[string]struct {
			want []string
			read func(broker.Page) (ids []string, next string, err error)
		}{
			"chains": {chains, func(p broker.Page) (ids []string, next string, err error) {
				list, next, err := w.Engine.Chains(ctx, true, p)
				for _, s := range list {
					ids = append(ids, string(s.Chain.ID))
				}
				return ids, next, err
			}},
			"revocations": {revocations, func(p broker.Page) (ids []string, next string, err error) {
				list, next, err := w.Engine.Revocations(ctx, p)
				for _, rv := range list {
					ids = append(ids, string(rv.ID))
				}
				return ids, next, err
			}},
			"canaries": {canaries, func(p broker.Page) (ids []string, next string, err error) {
				list, next, err := w.Engine.Canaries(ctx, p)
				for _, c := range list {
					ids = append(ids, string(c.ID))
				}
				return ids, next, err
			}},
		} {
			var got []string
			for p := (broker.Page{Limit: 4}); ; {
				ids, next, err := list.read(p)
				if err != nil || len(ids) > 4 {
					t.Fatalf("%s: a page of %d, %v; want at most 4", name, len(ids), err)
				}
				got = append(got, ids...)
				pass(10 * time.Millisecond)
				d := w.open("meanwhile", broker.OpenRequest{})
				if _, _, err := w.Plant(ctx, responder, broker.PlantRequest{}); err != nil {
					t.Fatal(err)
				}
				if _, err := w.Revoke(ctx, responder, selector.Request{Reason: "a test",
					Selector: selecting(t, "chain:%s", d.Chain)}); err != nil {
					t.Fatal(err)
				}
				if p.After = next; next == "" {
					break
				}
			}
			slices.Reverse(list.want)
			if got = got[max(0, len(got)-len(list.want)):]; !slices.Equal(got, list.want) {
				t.Errorf("%s: the pages have %q, want %q", name, got, list.want)
			}
		}
	})
}

// TestChainPages reads a chain in pages, while its steps end: first its delegations, then its grants.
func TestChainPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{Depth: 2})
		want := []string{string(root.ID)}
		for i := range 5 {
			pass(10 * time.Millisecond)
			d, err := w.Delegate(ctx, as("root"), broker.DelegateRequest{From: root.ID, To: as(fmt.Sprint("child/", i)).ID,
				Rights: use("db.read")})
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, string(d.ID))
		}
		var grants []broker.GrantID
		for range 9 {
			pass(10 * time.Millisecond)
			g := w.issue("root", step(root, "db.read")).Grant
			grants = append(grants, g.ID)
			want = append(want, string(g.ID))
		}
		for limit := 1; limit < 20; limit++ {
			var got []string
			for p := (broker.Page{Limit: limit}); ; {
				v, err := w.Engine.Chain(ctx, root.Chain, p)
				if err != nil || len(v.Delegations)+len(v.Grants) > limit {
					t.Fatalf("a page of %d: %+v, %v", limit, v, err)
				}
				for _, d := range v.Delegations {
					got = append(got, string(d.ID))
				}
				for _, g := range v.Grants {
					got = append(got, string(g.ID))
				}
				if len(grants) > 0 && limit%2 == 1 {
					if _, err := w.Close(ctx, as("root"), grants[0]); err != nil {
						t.Fatal(err)
					}
					grants = grants[1:]
				}
				if p.After = v.Next; v.Next == "" {
					break
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("the pages of %d have %q, want %q", limit, got, want)
			}
		}
	})
}

// TestPageCostsWhatItShows reads first pages of lists of any length: of the open chains beside many that have ended, too.
func TestPageCostsWhatItShows(t *testing.T) {
	for _, all := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w, ledger := newCounted(t)
			cost := func(more int) int64 {
				for range more {
					w.open("planner", broker.OpenRequest{TTL: time.Minute})
				}
				pass(2 * time.Minute)
				if _, err := w.Sweep(ctx); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				for range 20 {
					w.open("planner", broker.OpenRequest{TTL: time.Minute})
				}
				return ledger.count(func() {
					list, _, err := w.Engine.Chains(ctx, all, broker.Page{Limit: 10})
					if err != nil || len(list) != 10 {
						t.Fatalf("Chains = %d of them, %v; want 10", len(list), err)
					}
				})
			}
			few := cost(20)
			if many := cost(1000); many > few+10 || few > 100 {
				t.Errorf("all %t: a page of 10 of 40 chains reads %d records, of 1060 chains %d; want as many, at most 100",
					all, few, many)
			}
		})
	}
}

// TestOpenChainsAreCounted counts the chains that a caller has open, by one key for each.
func TestOpenChainsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		for i := range 3 {
			w.open("planner", broker.OpenRequest{TTL: time.Duration(i+1) * time.Minute})
		}
		w.open("planner/2", broker.OpenRequest{})
		for _, want := range []int{3, 2, 1, 0} {
			if got := w.openChains(as("planner").ID.String(), 10); got != want {
				t.Errorf("planner has %d open chains, want %d", got, want)
			}
			pass(time.Minute + 10*time.Millisecond)
		}
	})
}

// openChains counts the open chains of a caller.
func (w *world) openChains(opener string, most int) (n int) {
	w.t.Helper()
	var cache records.Cache
	if err := w.ledger.View(ctx, func(tx broker.Tx) (err error) {
		n, err = cache.In(tx).OpenChains(opener, w.clock(), most)
		return err
	}); err != nil {
		w.t.Fatal(err)
	}
	return n
}
