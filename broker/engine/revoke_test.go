package engine_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/selector"
)

func selecting(t *testing.T, format string, args ...any) selector.Selector {
	t.Helper()
	s, err := selector.Parse(fmt.Sprintf(format, args...))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var responder = broker.Operator{Name: "ana"}

func (w *world) revoke(format string, args ...any) broker.Revocation {
	w.t.Helper()
	rv, err := w.Revoke(ctx, responder, selector.Request{Selector: selecting(w.t, format, args...), Reason: "a test"})
	if err != nil {
		w.t.Fatalf("Revoke("+format+") = %v", append(args, err)...)
	}
	return rv
}

// tryRevoke is revoke, or a freeze, that may fail.
func (w *world) tryRevoke(freeze bool, format string, args ...any) (broker.Revocation, error) {
	w.t.Helper()
	return w.Revoke(ctx, responder, selector.Request{Selector: selecting(w.t, format, args...),
		Reason: "a test", Freeze: freeze})
}

func (w *world) wantClosure(rv broker.Revocation, want broker.Closure) broker.Revocation {
	w.t.Helper()
	got, err := w.Revocation(ctx, rv.ID)
	if err != nil || got.Closure != want {
		w.t.Fatalf("revocation %s = %+v, %v; want %s", rv.ID, got, err, want)
	}
	return got
}

// TestFenceCovers revokes a part of a chain, and holds that the fence stops the holders in it and no others.
func TestFenceCovers(t *testing.T) {
	all := []string{"root", "planner", "fetcher", "writer", "other"}
	for _, row := range []struct {
		name   string
		revoke string // %[1]s is the chain, %[2]s is planner's delegation, %[3]s is writer's
		fenced []string
	}{
		{"a leaf", "subtree:%[3]s", []string{"writer"}},
		{"a subtree", "subtree:%[2]s", []string{"planner", "fetcher", "writer"}},
		{"the chain", "chain:%[1]s", all},
		{"a caller", "spiffe:spiffe://example.org/planner", []string{"planner", "fetcher", "writer"}},
		{"two callers", "spiffe:spiffe://example.org/fetcher or spiffe:spiffe://example.org/other",
			[]string{"fetcher", "other"}},
		{"a tool", "tool:db.read", all},
		{"an unused tool", "tool:deploy", nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				d := w.draw("root -> {planner -> {fetcher, writer}, other}")
				secrets := map[string]broker.Issued{}
				for _, name := range all {
					secrets[name] = w.issue(name, step(d[name], "db.read"))
				}
				rv := w.revoke(row.revoke+"%.0[1]s%.0[2]s%.0[3]s", d["root"].Chain, d["planner"].ID, d["writer"].ID)
				fenced := map[string]bool{}
				for _, name := range row.fenced {
					fenced[name] = true
				}
				for _, name := range all {
					_, err := w.Issue(ctx, as(name), step(d[name], "db.read"))
					if got := errors.Is(err, broker.Revoked); got != fenced[name] {
						t.Errorf("Issue by %s = %v, want fenced %v", name, err, fenced[name])
					}
				}
				pass(100 * time.Millisecond)
				for _, name := range all {
					if works := w.target.Login(secrets[name].Secret.Reveal()); works == fenced[name] {
						t.Errorf("the secret of %s works: %v", name, works)
					}
				}
				got, want := w.wantClosure(rv, broker.ClosureClosed), len(row.fenced)
				if got.Dead != want || got.Grants != want {
					t.Errorf("revocation = %+v, want %d dead", got, want)
				}
			})
		})
	}
}

// TestClosureTellsTheTruth stops Vault and the target, starts them one after the other, and checks the closure each
// time.
func TestClosureTellsTheTruth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		secrets := []broker.Issued{w.issue("root", step(root, "db.read")), w.issue("root", step(root, "deploy"))}
		var vaultDown, targetDown atomic.Bool
		vaultDown.Store(true)
		targetDown.Store(true)
		down := func(is *atomic.Bool) func(string) error {
			return func(string) error {
				if is.Load() {
					return errors.New("connection refused")
				}
				return nil
			}
		}
		w.vault.Fail(down(&vaultDown))
		w.target.Fail(down(&targetDown))
		rv := w.revoke("chain:%s", root.Chain)
		pass(time.Second)
		got := w.wantClosure(rv, broker.ClosureUnknown)
		if got.Unknown != 2 || got.Dead != 0 || got.LatestEnd.Before(secrets[0].Grant.Expires) {
			t.Errorf("with Vault and the target down: %+v, want 2 unknown, and LatestEnd %v or later",
				got, secrets[0].Grant.Expires)
		}
		targetDown.Store(false)
		pass(20 * time.Second)
		got, err := w.Revocation(ctx, rv.ID)
		if err != nil || got.Closure == broker.ClosureClosed || got.Dead != 0 {
			t.Errorf("with Vault down: %+v, %v; want it not CLOSED, and none dead", got, err)
		}
		vaultDown.Store(false)
		pass(20 * time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		w.wantAllClosed()
	})
}

// TestClockCorrected sets the broker's clock an hour ahead and back. A retry that was scheduled some seconds later does
// not wait for an hour.
func TestClockCorrected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		w.target.Fail(func(string) error { return errors.New("connection refused") })
		w.skew.Store(int64(time.Hour))
		pass(3 * time.Minute)
		w.skew.Store(0)
		w.target.Fail(nil)
		pass(time.Minute)
		w.wantAllClosed()
	})
}

// TestClockCorrectedWhileSevering sets the broker's clock an hour ahead, so that a grant expires too early, and back
// before the worker reads the grant. The grant ends at its own time.
func TestClockCorrectedWhileSevering(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		first, second := w.issue("root", step(root, "db.read")), w.issue("root", step(root, "db.read"))
		severed := make(chan struct{})
		w.target.Fail(func(point string) error {
			if point == "sever" {
				<-severed
			}
			return nil
		})
		w.revoke("grant:%s", first.Grant.ID)
		pass(time.Millisecond)
		w.skew.Store(int64(time.Hour))
		pass(20 * time.Second)
		w.skew.Store(0)
		close(severed)
		pass(time.Until(second.Grant.Expires) + 5*time.Second)
		w.wantAllClosed()
	})
}

// TestRevocationContinuesAfterRestart holds that the next process reconciles the revocations of the process before.
func TestRevocationContinuesAfterRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		w.vault.Fail(func(string) error { return errors.New("sealed") })
		rv := w.revoke("chain:%s", root.Chain)
		w.Stop()
		w.vault = w.vault.Restarted()
		w.start(w.ledger)
		_, err := w.Issue(ctx, as("root"), step(root, "db.read"))
		refused(t, "Issue after the restart", err, broker.Revoked, broker.CodeFenced)
		pass(time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		w.wantAllClosed()
	})
}

// TestAwaited crashes the broker while the answer of one mint of many is lost, and revokes the chain. The revocation
// names the grant for which it waits, and until when: the last moment at which that mint can complete.
func TestAwaited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		for range 3 {
			w.issue("root", step(root, "db.read"))
		}
		w.vault.Fail(func(point string) error {
			if point == "mint created" {
				return errors.New("connection reset")
			}
			return nil
		})
		_, err := w.Issue(ctx, as("root"), step(root, "db.read"))
		refused(t, "Issue", err, broker.Unavailable, broker.CodeOutcomeUnknown)
		v, err := w.Chain(ctx, root.Chain)
		if err != nil {
			t.Fatal(err)
		}
		lost := v.Grants[slices.IndexFunc(v.Grants, func(g broker.Grant) bool { return g.State == broker.StateHandle })]
		w.Stop()
		w.vault = w.vault.Restarted()
		w.start(w.ledger)
		rv := w.revoke("chain:%s", root.Chain)
		pass(time.Second)
		w.wantClosure(rv, broker.ClosureUnknown)
		list, err := w.Awaited(ctx, rv.ID)
		if err != nil || len(list) != 1 || list[0].Grant != lost.ID || !list[0].Until.Equal(lost.MintDeadline) ||
			list[0].Tool != "db.read" || !strings.HasPrefix(list[0].Why, "ledger: a mint may still be on its way until ") {
			t.Errorf("Awaited() = %+v, %v, want grant %s until %v", list, err, lost.ID, lost.MintDeadline)
		}
		pass(time.Until(lost.MintDeadline) + 10*time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		if list, err = w.Awaited(ctx, rv.ID); err != nil || len(list) != 0 {
			t.Errorf("Awaited() after CLOSED = %+v, %v, want none", list, err)
		}
	})
}

// TestAwaitedIsBounded lets a target prove nothing. Of many awaited grants 20 are named, those that end last.
func TestAwaitedIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		var last broker.GrantID
		for range 25 {
			last = w.issue("root", step(root, "db.read")).Grant.ID
			pass(time.Second)
		}
		w.vault.Fail(func(point string) error {
			if point == "gone" {
				return errors.New("Vault does not answer")
			}
			return nil
		})
		rv := w.revoke("chain:%s", root.Chain)
		pass(time.Second)
		list, err := w.Awaited(ctx, rv.ID)
		if err != nil || len(list) != broker.MaxAwaited || list[0].Grant != last ||
			!list[0].Until.After(list[broker.MaxAwaited-1].Until) {
			t.Errorf("Awaited() = %d grants, %v, %+v, want %d, the last to end first", len(list), err, list,
				broker.MaxAwaited)
		}
	})
}

// TestNothingAfterTheAcknowledgement lets agents take steps as fast as they can while their chain is revoked. No Issue
// that begins after Revoke returned hands a secret over.
func TestNothingAfterTheAcknowledgement(t *testing.T) {
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			root := w.open("root", broker.OpenRequest{})
			acknowledged := make(chan struct{})
			var wg sync.WaitGroup
			for range 16 {
				wg.Go(func() {
					for range 20 {
						var after bool
						select {
						case <-acknowledged:
							after = true
						default:
						}
						if _, err := w.Issue(ctx, as("root"), step(root, "db.read")); err == nil && after {
							t.Error("a secret was handed over after the acknowledgement")
						}
					}
				})
			}
			wg.Go(func() {
				rv := w.revoke("chain:%s", root.Chain)
				close(acknowledged)
				_ = rv
			})
			wg.Wait()
			pass(10 * time.Second)
			w.wantAllClosed()
		})
	}
}

func TestFreezeAndUnfreeze(t *testing.T) {
	for _, format := range []string{"chain:%[1]s", "spiffe:spiffe://example.org/root%.0[1]s"} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			root := w.open("root", broker.OpenRequest{})
			got := w.issue("root", step(root, "db.read"))
			rv, err := w.tryRevoke(true, format, root.Chain)
			if err != nil {
				t.Fatal(err)
			}
			_, err = w.Issue(ctx, as("root"), step(root, "db.read"))
			refused(t, "Issue while frozen", err, broker.Revoked, broker.CodeFrozen)
			pass(time.Second)
			if !w.target.Login(got.Secret.Reveal()) {
				t.Fatal("the freeze ended a secret")
			}
			for range 2 {
				_, err = w.Unfreeze(ctx, responder, rv.ID)
				refused(t, "Unfreeze by one person", err, broker.Denied, broker.CodeSecondPerson)
			}
			if _, err = w.Unfreeze(ctx, broker.Operator{Name: "ben"}, rv.ID); err != nil {
				t.Fatal(err)
			}
			w.issue("root", step(root, "db.read"))
			_, err = w.Unfreeze(ctx, responder, rv.ID)
			refused(t, "Unfreeze again", err, broker.Conflict, "")
		})
	}
}

// TestUnfreezeCountsPeople asks twice to lift a freeze. The users of the local socket are one person.
func TestUnfreezeCountsPeople(t *testing.T) {
	for _, row := range []struct {
		first, second string
		lifted        bool
	}{
		{"local:uid=0", "local:uid=0", false},
		{"local:uid=1000", "local:uid=0", false}, // root can become the broker's user
		{"local:uid=0", "local:uid=1000", false},
		{"local:uid=0", "spiffe://example.org/ann", true},
		{"spiffe://example.org/ann", "local:uid=0", true},
		{"spiffe://example.org/ann", "spiffe://example.org/ann", false},
		{"spiffe://example.org/ann", "spiffe://example.org/ben", true},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			root := w.open("root", broker.OpenRequest{})
			rv, err := w.tryRevoke(true, "chain:%s", root.Chain)
			if err != nil {
				t.Fatal(err)
			}
			_, err = w.Unfreeze(ctx, broker.Operator{Name: row.first}, rv.ID)
			refused(t, "Unfreeze by "+row.first, err, broker.Denied, broker.CodeSecondPerson)
			if _, err = w.Unfreeze(ctx, broker.Operator{Name: row.second}, rv.ID); (err == nil) != row.lifted {
				t.Errorf("Unfreeze by %s and %s = %v, want lifted %v", row.first, row.second, err, row.lifted)
			}
		})
	}
}

// TestRevokingAFrozenNodeIsFinal holds that lifting a freeze does not lift a later revocation of the same node.
func TestRevokingAFrozenNodeIsFinal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		frozen, err := w.tryRevoke(true, "chain:%s", root.Chain)
		if err != nil {
			t.Fatal(err)
		}
		w.revoke("chain:%s", root.Chain)
		_, _ = w.Unfreeze(ctx, responder, frozen.ID)
		_, _ = w.Unfreeze(ctx, broker.Operator{Name: "ben"}, frozen.ID)
		_, err = w.Issue(ctx, as("root"), step(root, "db.read"))
		refused(t, "Issue", err, broker.Revoked, broker.CodeFenced)
	})
}

func TestPlan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.draw("root -> planner")
		w.issue("root", step(d["root"], "db.read"))
		w.issue("planner", step(d["planner"], "deploy"))
		s := selecting(t, "chain:%s", d["root"].Chain)
		plan, err := w.Plan(ctx, responder, s)
		if err != nil || plan.Grants != 2 || plan.Nodes != 2 || plan.Chains != 1 || plan.ByTool["deploy"] != 1 ||
			plan.ByCaller["spiffe://example.org/planner"] != 1 {
			t.Fatalf("Plan = %+v, %v; want 2 grants under 2 delegations", plan, err)
		}
		w.issue("planner", step(d["planner"], "deploy"))
		r := selector.Request{Selector: s, Reason: "a test", Plan: plan.Token}
		_, err = w.Revoke(ctx, responder, r)
		refused(t, "Revoke of a plan whose set has grown", err, broker.Conflict, broker.CodePlanStale)
		w.issue("planner", step(d["planner"], "db.read")) // the refused Revoke has fenced nothing
		r.IncludeNew = true
		if _, err = w.Revoke(ctx, responder, r); err != nil {
			t.Fatal(err)
		}
		_, err = w.Plan(ctx, responder, selecting(t, "tool:typo"))
		refused(t, "Plan of a selector that matches nothing", err, broker.NotFound, broker.CodeSelectorEmpty)
		_, err = w.Revoke(ctx, responder, selector.Request{Selector: s, Reason: "a test", Plan: "pl00"})
		refused(t, "Revoke with an unknown plan", err, broker.Conflict, broker.CodePlanUnknown)
	})
}

// TestViolationRevokesTheChain holds that a step with a forbidden tool fences the whole chain and ends its grants.
func TestViolationRevokesTheChain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.draw("root -> planner -> writer")
		for range 5 {
			w.issue("root", step(d["root"], "db.read"))
			w.issue("writer", step(d["writer"], "db.read"))
		}
		w.policy.Answer = func(q broker.Question) broker.Decision {
			if q.Tool.Name == "deploy" {
				return broker.Decision{Policies: []string{"no-deploy"}, Consequence: broker.ConsequenceRevokeChain}
			}
			return broker.Decision{Allow: true}
		}
		changed, cancel := w.Watch(d["root"].Chain)
		defer cancel()
		_, err := w.Issue(ctx, as("writer"), step(d["writer"], "deploy"))
		refused(t, "Issue of a forbidden tool", err, broker.Denied, broker.CodeViolation)
		var e *broker.Error
		errors.As(err, &e)
		<-changed
		for _, name := range []string{"root", "planner", "writer"} {
			_, err := w.Issue(ctx, as(name), step(d[name], "db.read"))
			refused(t, "Issue by "+name, err, broker.Revoked, broker.CodeFenced)
			s, err := w.Status(ctx, as(name), d[name].ID)
			if err != nil || s.Fence == nil {
				t.Errorf("Status of %s = %+v, %v; want it fenced", name, s, err)
			}
		}
		pass(time.Second)
		w.wantAllClosed()
		rv, err := w.Revocation(ctx, e.Revocation)
		if err != nil || rv.Closure != broker.ClosureClosed || rv.Dead != 10 {
			t.Errorf("revocation = %+v, %v; want CLOSED with 10 dead", rv, err)
		}
	})
}

func TestSweepEndsOrphans(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		got := w.issue("root", step(root, "db.read"))
		w.target.Plant("gr000000000000000000000000")
		s, err := w.Sweep(ctx)
		if err != nil || s.Logins != 1 {
			t.Fatalf("Sweep = %+v, %v; want 1 orphaned login", s, err)
		}
		if alive := w.target.Alive(); len(alive) != 1 || alive[0] != got.Grant.ID {
			t.Fatalf("alive after the sweep: %v, want only the login of the grant", alive)
		}
	})
}

// TestRevokeWithoutLedger holds that Revoke ends the grants that it can read although the ledger records nothing. The
// answer does not claim a fence.
func TestRevokeWithoutLedger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		got := w.issue("root", step(root, "db.read"))
		w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault { return brokertest.NotCommitted })
		_, err := w.tryRevoke(false, "chain:%s", root.Chain)
		refused(t, "Revoke", err, broker.Unavailable, broker.CodeLedgerDown)
		if w.target.Login(got.Secret.Reveal()) {
			t.Error("the secret still works, and its grant is in the ledger")
		}
		_, err = w.Issue(ctx, as("root"), step(root, "db.read"))
		refused(t, "Issue", err, broker.Unavailable, broker.CodeLedgerDown)
		w.ledger.Fail(nil)
		w.revoke("chain:%s", root.Chain)
		pass(10 * time.Second)
		w.wantAllClosed()
	})
}

// TestSpentRulesAreDeleted holds that a sweep deletes a rule once nothing can match it: every transaction reads the
// rules.
func TestSpentRulesAreDeleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.open("root", broker.OpenRequest{})
		w.revoke("tool:deploy")
		for _, row := range []struct {
			after time.Duration
			rules int
		}{{time.Hour, 1}, {broker.MaxChainTTL, 0}} {
			pass(row.after)
			if _, err := w.Sweep(ctx); err != nil {
				t.Fatal(err)
			}
			rules := 0
			_ = w.ledger.View(ctx, func(tx broker.Tx) error {
				return tx.Scan("f/", "", func(string, []byte) bool { rules++; return true })
			})
			if rules != row.rules {
				t.Errorf("%d rules after %v more, want %d", rules, row.after, row.rules)
			}
		}
	})
}

func TestActive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		want := func(when string, id broker.GrantID, want bool) {
			t.Helper()
			if got, err := w.Active(ctx, id); err != nil || got != want {
				t.Errorf("Active %s = %v, %v; want %v", when, got, err, want)
			}
		}
		closed, expired := w.issue("root", step(root, "db.read")), w.issue("root", step(root, "db.read"))
		want("of a live grant", closed.Grant.ID, true)
		if _, err := w.Close(ctx, as("root"), closed.Grant.ID); err != nil {
			t.Fatal(err)
		}
		want("after Close", closed.Grant.ID, false)
		pass(61 * time.Second)
		want("after its expiry", expired.Grant.ID, false)
		revoked := w.issue("root", step(root, "db.read"))
		w.revoke("tool:db.read")
		want("after a revocation", revoked.Grant.ID, false)
		want("of an unknown grant", "gr000000000000000000000000", false)
	})
}

// TestDeadNeedsEveryAnswer holds that a grant is not dead before Vault and the target have both shown it.
func TestDeadNeedsEveryAnswer(t *testing.T) {
	const accepts = "the target accepts the secret"
	for name, fail := range map[string]func(*world, broker.GrantID){
		"Vault does not confirm that it revoked the token": func(w *world, _ broker.GrantID) {
			w.vault.Fail(func(point string) error {
				if point == "kill done" {
					return errors.New("timeout")
				}
				return nil
			})
		},
		accepts: func(w *world, id broker.GrantID) {
			w.target.Fail(func(point string) error {
				if point == "prove" {
					w.target.Plant(id)
				}
				return nil
			})
		},
		"the target does not answer": func(w *world, _ broker.GrantID) {
			w.target.Fail(func(point string) error {
				if point == "prove" {
					return errors.New("connection refused")
				}
				return nil
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				root := w.open("root", broker.OpenRequest{})
				got := w.issue("root", step(root, "db.read"))
				fail(w, got.Grant.ID)
				rv := w.revoke("grant:%s", got.Grant.ID)
				pass(30 * time.Second)
				open, err := w.Revocation(ctx, rv.ID)
				if err != nil || open.Closure == broker.ClosureClosed || open.Dead != 0 {
					t.Errorf("revocation = %+v, %v; want it not CLOSED, and none dead", open, err)
				}
				w.vault.Fail(nil)
				w.target.Fail(nil)
				pass(30 * time.Second)
				w.wantClosure(rv, broker.ClosureClosed)
				if alive := w.target.Alive(); len(alive) > 0 && name != accepts {
					t.Errorf("alive: %v", alive)
				}
			})
		})
	}
}

func TestRecent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		old := w.issue("root", step(root, "db.read"))
		pass(90 * time.Second)
		since := time.Now()
		pass(time.Millisecond)
		closed, live := w.issue("root", step(root, "db.read")), w.issue("root", step(root, "db.read"))
		if _, err := w.Close(ctx, as("root"), closed.Grant.ID); err != nil {
			t.Fatal(err)
		}
		for _, row := range []struct {
			backend string
			since   time.Time
			want    []broker.GrantID
		}{
			{live.Grant.Backend, since, []broker.GrantID{closed.Grant.ID, live.Grant.ID}},
			{live.Grant.Backend, since.Add(-time.Hour), []broker.GrantID{old.Grant.ID, closed.Grant.ID, live.Grant.ID}},
			{live.Grant.Backend, time.Now().Add(time.Second), nil}, {"other", since.Add(-time.Hour), nil},
		} {
			got, err := w.Recent(ctx, row.backend, row.since)
			var ids []broker.GrantID
			for _, g := range got {
				ids = append(ids, g.ID)
			}
			slices.Sort(ids)
			slices.Sort(row.want)
			if err != nil || !slices.Equal(ids, row.want) {
				t.Errorf("Recent(%s, %v) = %v, %v; want %v", row.backend, row.since, ids, err, row.want)
			}
		}
	})
}

// TestRevokeLeaked holds that a leaked value selects its grant, and that revoking it ends this grant alone.
func TestRevokeLeaked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		leaked, other := w.issue("root", step(root, "db.read")), w.issue("root", step(root, "db.read"))
		var secret struct{ Password string }
		if err := json.Unmarshal(leaked.Secret.Reveal(), &secret); err != nil || secret.Password == "" {
			t.Fatalf("the secret has no password: %v", err)
		}
		s := selector.ForLeaked(secret.Password + "\n")
		plan, err := w.Plan(ctx, responder, s)
		if err != nil || plan.Grants != 1 || plan.Nodes != 0 || strings.Contains(fmt.Sprint(plan, s), secret.Password) {
			t.Fatalf("Plan(%v) = %+v, %v; want one grant", s, plan, err)
		}
		_, err = w.Plan(ctx, responder, selector.ForLeaked("something else"))
		refused(t, "Plan of a value of no grant", err, broker.NotFound, broker.CodeSelectorEmpty)
		rv, err := w.Revoke(ctx, responder, selector.Request{Selector: s, Reason: "found in a log", Plan: plan.Token})
		if err != nil {
			t.Fatal(err)
		}
		pass(time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		for id, want := range map[broker.GrantID]bool{leaked.Grant.ID: false, other.Grant.ID: true} {
			if got, err := w.Active(ctx, id); err != nil || got != want {
				t.Errorf("Active(%s) = %v, %v; want %v", id, got, err, want)
			}
		}
		w.issue("root", step(root, "db.read")) // the chain is not fenced
	})
}

// TestEndedTokenIsKilled revokes a delegation just before its token's end, while Vault refuses. The token counts as
// ended by itself only after EndTolerance: Vault's clock may be late.
func TestEndedTokenIsKilled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{TTL: 2 * time.Minute})
		w.issue("root", step(root, "db.read"))
		pass(2*time.Minute - time.Second)
		w.vault.Fail(func(point string) error {
			if point == "kill" {
				return errors.New("Vault does not answer")
			}
			return nil
		})
		rv := w.revoke("chain:%s", root.Chain)
		pass(6 * time.Second)
		if got, err := w.Revocation(ctx, rv.ID); err != nil || got.Tokens != 1 || !got.Settled.IsZero() {
			t.Errorf("5 s after the token's end: %+v, %v, want 1 token not confirmed", got, err)
		}
		pass(20 * time.Second)
		if got, err := w.Revocation(ctx, rv.ID); err != nil || got.Tokens != 0 {
			t.Errorf("25 s after the token's end: %+v, %v, want no token left", got, err)
		}
	})
}
