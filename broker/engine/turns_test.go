package engine_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// slowMints is a Vault of which each mint takes a second.
type slowMints struct{ broker.Vault }

func (v slowMints) Mint(ctx context.Context, h broker.Handle, m broker.Mint) (broker.Lease, broker.Secret, error) {
	time.Sleep(time.Second) // on synctest's clock
	return v.Vault.Mint(ctx, h, m)
}

// TestManyStepsOfOneCaller begins two hundred steps of one caller, over two chains. Some are refused by name, and a
// step of another caller waits for one mint, while a revocation waits for none.
func TestManyStepsOfOneCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.brokerVault = slowMints{w.vault}
		w.start(w.ledger)
		many := []broker.Delegation{w.open("many", broker.OpenRequest{Rights: use("db.read")}),
			w.open("many", broker.OpenRequest{Rights: use("db.read")})}
		other := w.open("other", broker.OpenRequest{Rights: use("db.read", "note")})
		var mu sync.Mutex // guards issued, refused
		var issued, refused int
		var steps sync.WaitGroup
		defer steps.Wait()
		for i := range 200 {
			steps.Go(func() {
				_, err := w.Issue(ctx, as("many"), broker.StepRequest{Delegation: many[i%2].ID, Tool: "db.read"})
				mu.Lock()
				defer mu.Unlock()
				switch broker.KindOf(err) {
				case broker.OverLimit:
					refused++
				default:
					issued++
				}
			})
		}
		synctest.Wait()
		if refused != 200-64-64 {
			t.Errorf("%d steps were refused, want all but 64 that run and 64 that wait", refused)
		}
		step := func(tool broker.ToolName) (waited time.Duration) {
			began := time.Now()
			if _, err := w.Issue(ctx, as("other"), broker.StepRequest{Delegation: other.ID, Tool: tool}); err != nil {
				t.Errorf("Issue of %s by another caller = %v", tool, err)
			}
			return time.Since(began)
		}
		if waited := step("note"); waited != time.Second {
			t.Errorf("a step at another backend took %v, want its own mint's second", waited)
		}
		began := time.Now()
		sel, err := selector.Parse("chain:" + string(many[0].Chain))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Revoke(ctx, broker.Operator{Name: "ann"}, selector.Request{Selector: sel, Reason: "r"}); err != nil ||
			time.Since(began) > 0 {
			t.Errorf("Revoke = %v after %v, want at once", err, time.Since(began))
		}
		if waited := step("db.read"); waited > 2*time.Second {
			t.Errorf("another caller's step took %v, want one mint and its own", waited)
		}
	})
}
