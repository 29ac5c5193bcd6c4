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

// TestFenceCovers revokes one thing in a chain and says who may go on.
func TestFenceCovers(t *testing.T) {
	all := []string{"root", "planner", "fetcher", "writer", "other"}
	for _, row := range []struct {
		name   string
		what   func(map[string]broker.Delegation) string
		fenced []string
	}{
		{"a leaf", func(d map[string]broker.Delegation) string { return "subtree:" + string(d["writer"].ID) }, []string{"writer"}},
		{"a subtree", func(d map[string]broker.Delegation) string { return "subtree:" + string(d["planner"].ID) }, []string{"planner", "fetcher", "writer"}},
		{"the chain", func(d map[string]broker.Delegation) string { return "chain:" + string(d["root"].Chain) }, all},
		{"a caller", func(map[string]broker.Delegation) string { return "spiffe:spiffe://example.org/planner" }, []string{"planner", "fetcher", "writer"}},
		{"by query", func(map[string]broker.Delegation) string {
			return "spiffe:spiffe://example.org/fetcher or spiffe:spiffe://example.org/other"
		}, []string{"fetcher", "other"}},
		{"a tool", func(map[string]broker.Delegation) string { return "tool:db.read" }, all},
		{"another tool", func(map[string]broker.Delegation) string { return "tool:deploy" }, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				d := w.draw("root -> {planner -> {fetcher, writer}, other}")
				secrets := map[string]broker.Issued{}
				for _, name := range all {
					secrets[name] = w.issue(name, step(d[name], "db.read"))
				}
				rv := w.revoke("%s", row.what(d))
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
				if got := w.wantClosure(rv, broker.ClosureClosed); got.Dead != len(row.fenced) || got.Grants != len(row.fenced) {
					t.Errorf("revocation = %+v, want %d dead", got, len(row.fenced))
				}
			})
		})
	}
}

// TestClosureTellsTheTruth stops parts one after the other and looks at what is claimed.
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
			t.Errorf("everything down: %+v, want 2 unknown that end at %v or later", got, secrets[0].Grant.Expires)
		}
		targetDown.Store(false)
		pass(20 * time.Second)
		if alive := w.target.Alive(); len(alive) != 2 {
			// Severing is tried once at once; after that Vault and the probe decide.
			t.Logf("alive at the target: %v", alive)
		}
		if got := w.wantClosure(rv, w.closureNotClosed(rv)); got.Dead != 0 {
			t.Errorf("Vault down: %+v, want none called dead", got)
		}
		vaultDown.Store(false)
		pass(20 * time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
		w.wantAllClosed()
	})
}

// TestClockCorrected: what a clock that was an hour ahead put off for some seconds does not wait for an
// hour once it is right.
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

// TestClockCorrectedWhileSevering: a grant that a clock an hour ahead called over, and that is looked at when the
// clock is right again, is ended in its time all the same.
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

func (w *world) closureNotClosed(rv broker.Revocation) broker.Closure {
	got, _ := w.Revocation(ctx, rv.ID)
	if got.Closure == broker.ClosureClosed {
		w.t.Errorf("CLOSED while Vault does not answer: %+v", got)
	}
	return got.Closure
}

// TestRevocationContinuesAfterRestart: what a fence began, the next process finishes.
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

// TestNothingAfterTheAcknowledgement: agents ask as fast as they can while the chain is
// revoked; no secret is handed over by an Issue that began to answer after Revoke returned.
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
	for _, what := range []string{"chain:%[1]s", "spiffe:spiffe://example.org/root"} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			root := w.open("root", broker.OpenRequest{})
			got := w.issue("root", step(root, "db.read"))
			text := what
			if what == "chain:%[1]s" {
				text = fmt.Sprintf(what, root.Chain)
			}
			rv, err := w.Revoke(ctx, responder, selector.Request{Selector: selecting(t, "%s", text), Reason: "a look", Freeze: true})
			if err != nil {
				t.Fatal(err)
			}
			_, err = w.Issue(ctx, as("root"), step(root, "db.read"))
			refused(t, "Issue while frozen", err, broker.Revoked, broker.CodeFrozen)
			pass(time.Second)
			if !w.target.Login(got.Secret.Reveal()) {
				t.Fatal("freezing cut a secret")
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

// TestRevokingAFrozenNodeIsFinal: a lifted freeze must not lift a revocation.
func TestRevokingAFrozenNodeIsFinal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		s := selecting(t, "chain:%s", root.Chain)
		frozen, err := w.Revoke(ctx, responder, selector.Request{Selector: s, Reason: "a look", Freeze: true})
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
		refused(t, "Revoke of a set that has grown", err, broker.Conflict, broker.CodePlanStale)
		w.issue("planner", step(d["planner"], "db.read")) // nothing was fenced
		r.IncludeNew = true
		if _, err = w.Revoke(ctx, responder, r); err != nil {
			t.Fatal(err)
		}
		_, err = w.Plan(ctx, responder, selecting(t, "tool:typo"))
		refused(t, "Plan of nothing", err, broker.NotFound, broker.CodeSelectorEmpty)
		_, err = w.Revoke(ctx, responder, selector.Request{Selector: s, Reason: "a test", Plan: "pl00"})
		refused(t, "Revoke by an unknown plan", err, broker.Conflict, broker.CodePlanUnknown)
	})
}

// TestViolationRevokesTheChain: a forbidden tool ends everything that the chain holds.
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
				t.Errorf("Standing of %s = %+v, %v; want fenced", name, s, err)
			}
		}
		pass(time.Second)
		w.wantAllClosed()
		if rv, err := w.Revocation(ctx, e.Revocation); err != nil || rv.Closure != broker.ClosureClosed || rv.Dead != 10 {
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
			t.Fatalf("Sweep = %+v, %v; want 1 login that nobody asked for", s, err)
		}
		if alive := w.target.Alive(); len(alive) != 1 || alive[0] != got.Grant.ID {
			t.Fatalf("alive after the sweep: %v, want the one that the ledger knows", alive)
		}
	})
}

// TestRevokeWithoutLedger: what is known is cut although nothing can be recorded, and the
// answer does not claim a fence.
func TestRevokeWithoutLedger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		got := w.issue("root", step(root, "db.read"))
		w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault { return brokertest.NotCommitted })
		_, err := w.Revoke(ctx, responder, selector.Request{Selector: selecting(t, "chain:%s", root.Chain), Reason: "a test"})
		refused(t, "Revoke", err, broker.Unavailable, broker.CodeLedgerDown)
		if w.target.Login(got.Secret.Reveal()) {
			t.Error("the secret works although it was known")
		}
		_, err = w.Issue(ctx, as("root"), step(root, "db.read"))
		refused(t, "Issue", err, broker.Unavailable, broker.CodeLedgerDown)
		w.ledger.Fail(nil)
		w.revoke("chain:%s", root.Chain)
		pass(10 * time.Second)
		w.wantAllClosed()
	})
}

// TestSpentRulesAreDeleted: a rule is read in every transaction, so it goes when nothing can fall under it.
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
		closed, expired, revoked := w.issue("root", step(root, "db.read")), w.issue("root", step(root, "db.read")), broker.Issued{}
		want("of a live grant", closed.Grant.ID, true)
		if _, err := w.Close(ctx, as("root"), closed.Grant.ID); err != nil {
			t.Fatal(err)
		}
		want("after Close", closed.Grant.ID, false)
		pass(61 * time.Second)
		want("after its time", expired.Grant.ID, false)
		revoked = w.issue("root", step(root, "db.read"))
		w.revoke("tool:db.read")
		want("after a revocation", revoked.Grant.ID, false)
		want("of nothing", "gr000000000000000000000000", false)
	})
}

// TestDeadNeedsEveryAnswer: as long as one part that could know better does not say dead,
// nothing is called dead.
func TestDeadNeedsEveryAnswer(t *testing.T) {
	for name, fail := range map[string]func(*world, broker.GrantID){
		"Vault does not confirm that the token is revoked": func(w *world, _ broker.GrantID) {
			w.vault.Fail(func(point string) error {
				if point == "kill done" {
					return errors.New("timeout")
				}
				return nil
			})
		},
		"the target still lets it in": func(w *world, id broker.GrantID) {
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
				if now, err := w.Revocation(ctx, rv.ID); err != nil || now.Closure == broker.ClosureClosed || now.Dead != 0 {
					t.Errorf("revocation = %+v, %v; want it open", now, err)
				}
				w.vault.Fail(nil)
				w.target.Fail(nil)
				pass(30 * time.Second)
				w.wantClosure(rv, broker.ClosureClosed)
				if alive := w.target.Alive(); len(alive) > 0 && name != "the target still lets it in" {
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

// TestRevokeLeaked: whoever finds a value finds its grant by it, and ends that one alone.
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
			t.Fatalf("Plan(%v) = %+v, %v; want the one grant", s, plan, err)
		}
		_, err = w.Plan(ctx, responder, selector.ForLeaked("something else"))
		refused(t, "Plan of a value that nobody was given", err, broker.NotFound, broker.CodeSelectorEmpty)
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
		w.issue("root", step(root, "db.read")) // the chain goes on
	})
}
