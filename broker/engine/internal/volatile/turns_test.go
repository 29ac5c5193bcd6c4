package volatile_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/volatile"
)

func caller(name string) spiffeid.ID {
	return spiffeid.RequireFromString("spiffe://example.org/" + name)
}

// TestTurns has one caller with many steps at a backend, and two with one step each. Those wait for one turn of each
// other caller at the most, and a step at another backend for none.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := 0
		turns := volatile.Turns{AtOnce: 1, Each: 5, Longest: time.Minute, Refused: func() { refused++ }}
		var mu sync.Mutex
		var order []string
		var steps sync.WaitGroup
		step := func(backend, name string) {
			steps.Go(func() {
				done, err := turns.Take(t.Context(), backend, caller(name))
				if err != nil {
					t.Errorf("Take(%s, %s) = %v", backend, name, err)
					return
				}
				defer done()
				mu.Lock()
				order = append(order, name)
				mu.Unlock()
				time.Sleep(time.Second) // on synctest's clock
			})
			synctest.Wait()
		}
		for range 6 {
			step("db", "loops")
		}
		step("db", "a")
		step("kv", "other")
		step("db", "b")
		if _, err := turns.Take(t.Context(), "db", caller("loops")); broker.KindOf(err) != broker.OverLimit || refused != 1 {
			t.Errorf("a sixth waiting step = %v, %d counted; want over the limit, 1", err, refused)
		}
		if n := turns.Waiting(); n != 7 {
			t.Errorf("%d steps wait, want 7", n)
		}
		steps.Wait()
		if want := []string{"loops", "other", "loops", "a", "b", "loops", "loops", "loops", "loops"}; !slices.Equal(order, want) {
			t.Errorf("the steps ran as %v, want %v", order, want)
		}
		if n := turns.Waiting(); n != 0 || turns.Kept() != 0 {
			t.Errorf("%d steps wait at the end and %d records are kept, want none", n, turns.Kept())
		}
	})
}

// TestTurnGivenUp has steps whose requests end, or whose turn does not come, while they wait.
func TestTurnGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := volatile.Turns{AtOnce: 1, Longest: 10 * time.Second}
		done, err := turns.Take(t.Context(), "db", caller("a"))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var ended sync.WaitGroup
		for i := range 8 {
			ended.Go(func() {
				of := t.Context()
				if i%2 == 0 {
					of = ctx
				}
				if _, err := turns.Take(of, "db", caller(fmt.Sprint(i/4))); broker.KindOf(err) != broker.Unavailable {
					t.Errorf("a step that gave up = %v, want unavailable", err)
				}
			})
		}
		synctest.Wait()
		cancel()
		synctest.Wait()
		if n := turns.Waiting(); n != 4 {
			t.Errorf("%d steps wait after four gave up, want 4", n)
		}
		ended.Wait() // 10 s of synctest's clock
		if n := turns.Waiting(); n != 0 {
			t.Errorf("%d steps wait after the longest wait, want none", n)
		}
		done()
		if turns.Kept() != 0 {
			t.Errorf("%d records are kept, want none", turns.Kept())
		}
	})
}
