package engine_test

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// refuseMints makes Vault refuse every mint, for certain.
func (w *world) refuseMints() {
	w.vault.Fail(func(point string) error {
		if point == "mint" {
			return fmt.Errorf("429: %w", broker.ErrNotMinted)
		}
		return nil
	})
}

// usedUp reports whether a budget refuses one more step.
func (w *world) usedUp(holder string, d broker.Delegation) bool {
	w.t.Helper()
	_, err := w.Issue(ctx, as(holder), step(d, "db.read"))
	var refusal *broker.Error
	return errors.As(err, &refusal) && refusal.Code == broker.CodeBudgetExhausted
}

// TestNothingMadeGivesBack refuses ten steps for certain, under a budget of two steps of which the child has one. Each
// limit counts secrets that were made, in the child and in its parent, after a restart too.
func TestNothingMadeGivesBack(t *testing.T) {
	for name, fail := range map[string]func(string) error{
		"at the mint": func(point string) error {
			return map[bool]error{point == "mint": fmt.Errorf("429: %w", broker.ErrNotMinted)}[true]
		},
		"at the token": func(point string) error {
			return map[bool]error{point == "child": errors.New("sealed")}[true]
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				limits := broker.Budget{Steps: 2, Live: 2, Tools: map[broker.ToolName]int{"db.read": 2}}
				root := w.open("planner", broker.OpenRequest{Depth: 1, Budget: limits})
				leaf, err := w.Delegate(ctx, as("planner"), broker.DelegateRequest{From: root.ID, To: as("fetcher").ID,
					Rights: use("db.read"), Budget: broker.Budget{Steps: 1}})
				if err != nil {
					t.Fatal(err)
				}
				w.vault.Fail(fail)
				for i := range 10 {
					_, err := w.Issue(ctx, as("fetcher"), step(leaf, "db.read"))
					refused(t, "Issue", err, broker.Unavailable, broker.CodeVaultDown)
					pass(time.Second)
					v, err := w.Chain(ctx, root.Chain)
					if err != nil || len(v.Grants) != i+1 || v.Grants[i].State != broker.StateClosed {
						t.Fatalf("a second after refusal %d: %+v, %v, want CLOSED", i, v.Grants, err)
					}
				}
				w.vault.Fail(nil)
				w.Stop()
				w.start(w.ledger)
				w.issue("fetcher", step(leaf, "db.read"))
				if !w.usedUp("fetcher", leaf) {
					t.Error("a second step under a budget of one was taken")
				}
				w.issue("planner", step(root, "db.write"))
				if !w.usedUp("planner", root) {
					t.Error("a third step under a budget of two was taken")
				}
			})
		})
	}
}

// TestUnknownKeepsItsBudget holds that a mint whose answer was lost counts, however it ends.
func TestUnknownKeepsItsBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{Budget: broker.Budget{Steps: 1}})
		w.vault.Fail(func(point string) error {
			return map[bool]error{point == "mint created": errors.New("connection reset")}[true]
		})
		_, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
		refused(t, "Issue", err, broker.Unavailable, broker.CodeOutcomeUnknown)
		w.vault.Fail(nil)
		pass(time.Minute)
		w.wantAllClosed()
		if !w.usedUp("planner", root) {
			t.Error("the lost step was given back")
		}
	})
}

// TestNothingMadeRace lets a step come to nothing, and another one begin, while a third is decided. As many steps have
// begun as before, and the third is nevertheless decided again with the history of the moment.
func TestNothingMadeRace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{})
		refuse, refusedOne := make(chan struct{}), make(chan struct{})
		w.vault.Fail(func(point string) error {
			if point != "mint" {
				return nil
			}
			<-refuse
			return fmt.Errorf("429: %w", broker.ErrNotMinted)
		})
		go func() {
			_, _ = w.Issue(ctx, as("planner"), step(root, "db.read"))
			close(refusedOne)
		}()
		synctest.Wait()
		raced := false
		w.policy.Answer = func(q broker.Question) broker.Decision {
			if q.Tool.Name == "db.write" && !raced {
				raced = true
				close(refuse)
				<-refusedOne
				pass(time.Second)
				w.vault.Fail(nil)
				w.issue("planner", step(root, "deploy"))
			}
			return broker.Decision{Allow: q.Tool.Name != "db.write" || q.History["deploy"].Count == 0}
		}
		_, err := w.Issue(ctx, as("planner"), step(root, "db.write"))
		refused(t, "Issue of db.write after deploy", err, broker.Denied, broker.CodePolicyDenied)
	})
}

// TestNothingMadeFaults fails each commit of a refused step in turn, and restarts. The budget is given back at most
// once, and every grant is CLOSED.
func TestNothingMadeFaults(t *testing.T) {
	for _, fault := range []brokertest.Fault{brokertest.NotCommitted, brokertest.CommittedButFails} {
		for n := range 8 {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				root := w.open("planner", broker.OpenRequest{Budget: broker.Budget{Steps: 2}})
				w.issue("planner", step(root, "db.read"))
				w.refuseMints()
				commits := 0
				w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault {
					if commits++; commits == n+1 {
						return fault
					}
					return brokertest.None
				})
				_, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
				if !errors.Is(err, broker.Unavailable) {
					t.Fatalf("Issue = %v, want Unavailable", err)
				}
				pass(time.Minute)
				w.ledger.Fail(nil)
				w.vault.Fail(nil)
				w.Stop()
				w.start(w.ledger)
				pass(2 * time.Minute)
				w.wantAllClosed()
				for range 2 { // of the budget of two, one is spent
					_, _ = w.Issue(ctx, as("planner"), step(root, "db.read"))
				}
				if !w.usedUp("planner", root) {
					t.Errorf("fault %v at commit %d: more than two steps were taken", fault, n)
				}
			})
		}
	}
}

// TestRetryAfterPacesKills lets Vault refuse a kill by its quota for seven seconds. Vault is not asked again before, for
// any grant or chain, and everything is CLOSED soon after.
func TestRetryAfterPacesKills(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{})
		for range 20 {
			w.issue("planner", step(root, "db.read"))
		}
		begun := time.Now()
		var asked atomic.Int32
		w.vault.Fail(func(point string) error {
			if point != "kill" || time.Since(begun) > 7*time.Second {
				return nil
			}
			asked.Add(1)
			return broker.Errorf(broker.Unavailable, "vault", "a quota").With(broker.CodeVaultBusy).After(7*time.Second - time.Since(begun))
		})
		w.revoke("chain:%s", root.Chain)
		pass(6 * time.Second)
		if n := asked.Load(); n == 0 || n > 16 {
			t.Errorf("Vault was asked %d times in the time that it named, want at most those under way", n)
		}
		pass(3 * time.Second)
		w.wantAllClosed()
	})
}
