package engine_test

import (
	"context"
	"crypto/sha256"
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
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/args/argstest"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
)

func TestIssueAndClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{})
		got := w.issue("planner", step(root, "db.read"))
		if !w.target.Login(got.Secret.Reveal()) {
			t.Fatal("the secret does not work at its target")
		}
		if got.Grant.State != broker.StateIssued || got.Grant.Lease.ID == "" || got.Grant.Token.Accessor == "" {
			t.Fatalf("grant = %+v, want ISSUED with its lease and token", got.Grant)
		}
		g, err := w.Close(ctx, as("planner"), got.Grant.ID)
		if err != nil || g.State != broker.StateClosed || g.Outcome != broker.OutcomeDead || len(g.Evidence) == 0 {
			t.Fatalf("Close = %+v, %v; want CLOSED, dead, with evidence", g, err)
		}
		if w.target.Login(got.Secret.Reveal()) {
			t.Fatal("the secret works after Close")
		}
		w.wantAllClosed()
	})
}

// TestArgsDigest holds that equal arguments have equal digests, however they were spelled, and that a grant keeps its
// digest in every state.
func TestArgsDigest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{})
		for raw, canonical := range map[string]string{
			`{}`:                           `{}`,
			`{"table":"orders"}`:           `{"table":"orders"}`,
			` { "table": "\u006frders" } `: `{"table":"orders"}`,
			`{"table":"Orders"}`:           `{"table":"Orders"}`,
		} {
			args, err := args.Parse([]byte(raw))
			if err != nil {
				t.Fatal(err)
			}
			want := fmt.Sprintf("%x", sha256.Sum256([]byte(canonical)))
			issued := w.issue("planner", broker.StepRequest{Delegation: root.ID, Tool: "db.read", Args: args}).Grant
			closed, err := w.Close(ctx, as("planner"), issued.ID)
			if err != nil {
				t.Fatal(err)
			}
			v, err := w.Chain(ctx, root.Chain)
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(v.Grants, func(g broker.Grant) bool { return g.ID == issued.ID })
			if i < 0 || issued.ArgsDigest != want || closed.ArgsDigest != want || v.Grants[i].ArgsDigest != want {
				t.Errorf("%s: the digest is %q when issued and %q when closed, the ledger has %+v; want %s",
					raw, issued.ArgsDigest, closed.ArgsDigest, v.Grants, want)
			}
		}
	})
}

func TestSecretExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{TTL: time.Hour})
		w.issue("planner", broker.StepRequest{Delegation: root.ID, Tool: "db.read", TTL: 20 * time.Second})
		w.issue("planner", step(root, "db.write"))
		pass(21 * time.Second)
		if n := len(w.target.Alive()); n != 1 {
			t.Fatalf("%d secrets are alive after 21 s, want only the one of a minute", n)
		}
		pass(time.Minute)
		w.wantAllClosed()
	})
}

func TestTTLIsTheMinimum(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		short := as("planner")
		short.NotAfter = time.Now().Add(10 * time.Second)
		for _, row := range []struct {
			name      string
			caller    broker.Caller
			chain     time.Duration
			requested time.Duration
			policy    time.Duration
			want      time.Duration
		}{
			{"the tool's", as("planner"), time.Hour, 0, 0, time.Minute},
			{"the request's", as("planner"), time.Hour, 30 * time.Second, 0, 30 * time.Second},
			{"the policy's", as("planner"), time.Hour, 30 * time.Second, 5 * time.Second, 5 * time.Second},
			{"the delegation's", as("planner"), 15 * time.Second, 0, 0, 15 * time.Second},
			{"the identity's", short, time.Hour, 0, 0, 10 * time.Second},
			{"the tool's, below the request's", as("planner"), time.Hour, time.Hour, 0, time.Minute},
		} {
			w.policy.Answer = func(broker.Question) broker.Decision {
				return broker.Decision{Allow: true, TTL: row.policy}
			}
			root := w.open("planner", broker.OpenRequest{TTL: row.chain})
			r := step(root, "db.read")
			r.TTL = row.requested
			got, err := w.Issue(ctx, row.caller, r)
			if ttl := got.Grant.Expires.Sub(got.Grant.Created); err != nil || ttl != row.want {
				t.Errorf("%s: the grant's TTL = %v, %v; want %v", row.name, ttl, err, row.want)
			}
		}
	})
}

func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{Depth: 2, Rights: []broker.Right{
			{Tool: "db.read", Use: true, Delegate: true,
				Args: map[string]args.Constraint{"table": argstest.Parse(`{"one_of":["orders"]}`)}},
			{Tool: "deploy", Delegate: true},
		}})
		reads := func(a args.Args) broker.StepRequest {
			return broker.StepRequest{Delegation: root.ID, Tool: "db.read", Args: a}
		}
		orders := reads(table("orders"))
		unknown, long := step(root, "db.read"), step(root, "db.read")
		unknown.Delegation, long.Key = "dl000000000000000000000000", string(make([]byte, 129))
		expired := as("planner")
		expired.NotAfter = time.Now()
		for _, row := range []struct {
			name   string
			caller broker.Caller
			r      broker.StepRequest
			kind   broker.Kind
			code   broker.Code
		}{
			{"no identity", broker.Caller{}, step(root, "db.read"), broker.Unauthenticated, ""},
			{"an expired identity", expired, step(root, "db.read"), broker.Unauthenticated, broker.CodeExpired},
			{"not the holder", as("writer"), step(root, "db.read"), broker.NotFound, broker.CodeDelegationUnknown},
			{"no such delegation", as("planner"), unknown, broker.NotFound, broker.CodeDelegationUnknown},
			{"no such tool", as("planner"), step(root, "rm"), broker.Denied, broker.CodeToolUnknown},
			{"not in the scope", as("planner"), step(root, "db.write"), broker.Denied, broker.CodeToolNotDelegated},
			{"delegate only", as("planner"), step(root, "deploy"), broker.Denied, broker.CodeToolNotDelegated},
			{"argument missing", as("planner"), step(root, "db.read"), broker.Denied, broker.CodeArgumentOutside},
			{"argument outside", as("planner"), reads(table("people")), broker.Denied, broker.CodeArgumentOutside},
			{"argument unknown", as("planner"), reads(argsOf(map[string]args.Value{"shard": args.Int(1)})),
				broker.Denied, broker.CodeArgumentOutside},
			{"key too long", as("planner"), long, broker.Malformed, ""},
		} {
			_, err := w.Issue(ctx, row.caller, row.r)
			refused(t, row.name, err, row.kind, row.code)
		}
		w.issue("planner", orders)
		w.policy.Answer = func(broker.Question) broker.Decision { return broker.Decision{Allow: true, Failed: true} }
		_, err := w.Issue(ctx, as("planner"), orders)
		refused(t, "Issue with a decision that failed to evaluate", err, broker.Denied, broker.CodePolicyDenied)
	})
}

func TestDelegationOnlyNarrows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		reads := func(tables ...string) broker.Right {
			return broker.Right{Tool: "db.read", Use: true,
				Args: map[string]args.Constraint{"table": argstest.Parse(`{"one_of":["` + strings.Join(tables, `","`) + `"]}`)}}
		}
		both := reads("orders", "items")
		both.Delegate = true
		root := w.open("planner", broker.OpenRequest{Depth: 2, TTL: 30 * time.Minute,
			Budget: broker.Budget{Steps: 10},
			Rights: []broker.Right{both, {Tool: "db.write", Use: true}, {Tool: "deploy", Delegate: true}}})
		pass(time.Minute)
		for _, row := range []struct {
			name string
			r    broker.DelegateRequest
			code broker.Code
		}{
			{"a narrower argument", broker.DelegateRequest{Rights: []broker.Right{reads("orders")}}, ""},
			{"a tool that it may only delegate", broker.DelegateRequest{Rights: use("deploy")}, ""},
			{"a wider argument", broker.DelegateRequest{Rights: []broker.Right{reads("orders", "people")}},
				broker.CodeDelegationWider},
			{"an unconstrained argument", broker.DelegateRequest{Rights: use("db.read")}, broker.CodeDelegationWider},
			{"a tool that it may only use", broker.DelegateRequest{Rights: use("db.write")},
				broker.CodeDelegationWider},
			{"a larger budget", broker.DelegateRequest{Rights: use("deploy"), Budget: broker.Budget{Steps: 11}},
				broker.CodeDelegationWider},
			{"the TTL that the parent began with", broker.DelegateRequest{Rights: use("deploy"), TTL: 30 * time.Minute},
				""},
			{"a longer TTL", broker.DelegateRequest{Rights: use("deploy"), TTL: 30*time.Minute + time.Second},
				broker.CodeDelegationWider},
			{"the same depth", broker.DelegateRequest{Rights: use("deploy"), Depth: 2}, broker.CodeDelegationWider},
		} {
			row.r.From, row.r.To = root.ID, as("writer").ID
			d, err := w.Delegate(ctx, as("planner"), row.r)
			if row.code != "" {
				refused(t, row.name, err, broker.Denied, row.code)
				continue
			}
			if err != nil || d.Holder != as("writer").ID || d.Budget.Steps != 10 || d.Expires.After(root.Expires) {
				t.Errorf("%s: Delegate = %+v, %v; want a child with the parent's budget", row.name, d, err)
			}
		}
		delegate := func(from string, parent broker.Delegation, to string) (broker.Delegation, error) {
			return w.Delegate(ctx, as(from), broker.DelegateRequest{From: parent.ID, To: as(to).ID,
				Rights: use("deploy")})
		}
		last, err := delegate("planner", root, "writer")
		if err != nil {
			t.Fatal(err)
		}
		_, err = delegate("planner", root, "planner")
		refused(t, "Delegate to itself, for a use it lacks", err, broker.Denied, broker.CodeDelegationWider)
		if _, err := w.Delegate(ctx, as("planner"), broker.DelegateRequest{From: root.ID, To: as("planner").ID,
			Rights: []broker.Right{reads("orders")}}); err != nil {
			t.Errorf("Delegate to itself, for a use it has = %v, want nil", err)
		}
		middle, err := w.Delegate(ctx, as("planner"), broker.DelegateRequest{From: root.ID, To: as("writer").ID, Depth: 1,
			Rights: []broker.Right{{Tool: "deploy", Use: true, Delegate: true}}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = delegate("writer", middle, "planner")
		refused(t, "Delegate back, for a use that its delegator lacks", err, broker.Denied, broker.CodeDelegationWider)
		_, err = delegate("writer", last, "helper")
		refused(t, "Delegate below the depth", err, broker.Denied, broker.CodeDelegationDepth)
		_, err = delegate("thief", root, "thief")
		refused(t, "Delegate by another caller", err, broker.NotFound, broker.CodeDelegationUnknown)
	})
}

func TestIdempotencyKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{})
		r := broker.StepRequest{Delegation: root.ID, Tool: "db.read", Key: "step-1"}
		first := w.issue("planner", r)
		second := w.issue("planner", r)
		if !second.Repeated || second.Grant.ID != first.Grant.ID || !second.Secret.Empty() {
			t.Fatalf("Issue with a used key = %+v, want the same grant and no secret", second)
		}
		r.Tool = "deploy"
		_, err := w.Issue(ctx, as("planner"), r)
		refused(t, "Issue with a used key for another tool", err, broker.Conflict, broker.CodeKeyOtherTool)
		r.Tool = "db.read"
		r.Args = table("orders")
		_, err = w.Issue(ctx, as("planner"), r)
		refused(t, "Issue with a used key for other arguments", err, broker.Conflict, broker.CodeKeyOtherArguments)
		_, err = w.Issue(ctx, as("writer"), r)
		refused(t, "Issue with a used key by another caller", err, broker.NotFound, broker.CodeDelegationUnknown)
		if n := len(w.target.Alive()); n != 1 {
			t.Fatalf("%d secrets were minted, want 1", n)
		}
	})
}

// budgetsOfTen has a budget of ten for each of a budget's limits.
var budgetsOfTen = map[string]broker.Budget{
	"steps": {Steps: 10}, "live": {Live: 10}, "per minute": {PerMinute: 10},
	"tool": {Tools: map[broker.ToolName]int{"db.read": 10}},
}

// TestBudgetCountsStepsInFlight holds that exactly ten of fifty concurrent steps get a secret under a budget of ten.
func TestBudgetCountsStepsInFlight(t *testing.T) {
	for name, budget := range budgetsOfTen {
		t.Run(name, func(t *testing.T) {
			for range 100 {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					tenOfFifty(t, w.Engine, budget)
				})
			}
		})
	}
}

// TestBudgetOnBolt is TestBudgetCountsStepsInFlight on the embedded ledger, where concurrent transactions share one
// commit. Each run has its own chain.
func TestBudgetOnBolt(t *testing.T) {
	at := time.Now()
	pawl := newBoltBroker(t, func() time.Time { return at }) // the clock stands still: no new minute begins
	for name, budget := range budgetsOfTen {
		t.Run(name, func(t *testing.T) {
			for range 25 { // four budgets: a hundred runs
				tenOfFifty(t, pawl, budget)
			}
		})
	}
}

// tenOfFifty fails the test unless ten of fifty concurrent steps get a secret and all others are denied.
func tenOfFifty(t *testing.T, b *engine.Engine, budget broker.Budget) {
	t.Helper()
	root, err := b.Open(ctx, as("planner"), broker.OpenRequest{Task: "a task", Rights: use("db.read"), Budget: budget})
	if err != nil {
		t.Fatal(err)
	}
	var got atomic.Int32
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, err := b.Issue(ctx, as("planner"), step(root, "db.read")); err == nil {
				got.Add(1)
			} else if !errors.Is(err, broker.Denied) {
				t.Errorf("Issue = %v, want Denied", err)
			}
		})
	}
	wg.Wait()
	if got.Load() != 10 {
		t.Fatalf("%d of 50 steps got a secret, want 10", got.Load())
	}
}

// TestHistoryIsExact holds that a policy over a chain's history decides on the exact history when steps race.
func TestHistoryIsExact(t *testing.T) {
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			// The policy never allows db.read and deploy in one chain.
			w.policy.Answer = func(q broker.Question) broker.Decision {
				other := map[broker.ToolName]broker.ToolName{"db.read": "deploy", "deploy": "db.read"}[q.Tool.Name]
				return broker.Decision{Allow: q.Action != broker.ActionUse || q.History[other].Count == 0}
			}
			root := w.open("planner", broker.OpenRequest{})
			var reads, deploys atomic.Int32
			var wg sync.WaitGroup
			for i := range 10 {
				wg.Go(func() {
					tool, n := broker.ToolName("db.read"), &reads
					if i%2 == 0 {
						tool, n = "deploy", &deploys
					}
					if _, err := w.Issue(ctx, as("planner"), step(root, tool)); err == nil {
						n.Add(1)
					}
				})
			}
			wg.Wait()
			if reads.Load() > 0 && deploys.Load() > 0 || reads.Load()+deploys.Load() == 0 {
				t.Fatalf("%d reads and %d deploys got a secret, want only reads or only deploys",
					reads.Load(), deploys.Load())
			}
		})
	}
}

// crash fails every act of a process from the nth on.
type crash struct {
	mu   sync.Mutex // guards left and at
	left int
	at   string // the point before or after the first act that failed
}

var errCrashed = errors.New("the process is dead")

func (d *crash) act(point string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.left--; d.left <= 0 {
		if d.at == "" {
			d.at = point
		}
		return errCrashed
	}
	return nil
}

// point returns the point of the crash; empty: the process lives.
func (d *crash) point() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.at
}

// TestCrashAnywhere crashes the broker before and after each act of Issue and Close on the ledger, Vault and the
// target. After a restart, every secret of the process before must end. A delegation's second step is tested too: its
// token is made while its intent is committed, in either order.
func TestCrashAnywhere(t *testing.T) {
	points := map[string]bool{}
	for _, steps := range []int{0, 1} {
		crashAtEachAct(t, points, steps)
	}
	for _, want := range []string{"ledger", "ledger committed", "branch", "branch done", "child", "child done",
		"mint", "mint created", "mint done", "kill", "sever", "prove"} {
		if !points[want] {
			t.Errorf("no crash came at %q: %v", want, points)
		}
	}
}

// crashAtEachAct takes some steps, and crashes the broker at each act of one more.
func crashAtEachAct(t *testing.T, points map[string]bool, steps int) {
	for n := 1; ; n++ {
		finished := false
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			root := w.open("planner", broker.OpenRequest{})
			for range steps {
				w.issue("planner", step(root, "db.read"))
			}
			d := &crash{left: n}
			w.ledger.Fail(func(_ int, entries []broker.Entry) brokertest.Fault {
				if d.act("ledger") != nil {
					return brokertest.NotCommitted
				}
				if d.act("ledger committed") != nil {
					return brokertest.CommittedButFails
				}
				return brokertest.None
			})
			w.vault.Fail(d.act)
			w.target.Fail(d.act)
			got, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
			if err == nil {
				ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
				defer cancel()
				_, err = w.Close(ctx, as("planner"), got.Grant.ID)
			}
			finished = err == nil && d.point() == ""
			points[d.point()] = true
			w.Stop()

			w.ledger.Fail(nil)
			w.target.Fail(nil)
			w.vault, w.ledger = w.vault.Restarted(), w.ledger.Crash()
			w.start(w.ledger)
			if got.Grant.ID != "" && d.point() != "" {
				pass(time.Second)
			}
			pass(2 * time.Minute)
			w.wantAllClosed()
			w.issue("planner", step(root, "db.read")) // the chain is still usable
		})
		if t.Failed() {
			t.Fatalf("after %d steps and a crash at act %d", steps, n)
		}
		if finished {
			return
		}
	}
}

// TestSingleFaults fails one act of Issue, each in turn, and lets the process continue. Issue returns a secret that
// works, or Unavailable, and every secret ends.
func TestSingleFaults(t *testing.T) {
	for _, fault := range []brokertest.Fault{brokertest.NotCommitted, brokertest.CommittedButFails} {
		for n := 1; n <= 24; n++ {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				root := w.open("planner", broker.OpenRequest{})
				var acts atomic.Int32
				fail := func(string) error {
					if acts.Add(1) == int32(n) {
						return fmt.Errorf("fault at act %d", n)
					}
					return nil
				}
				w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault {
					if fail("") != nil {
						return fault
					}
					return brokertest.None
				})
				w.vault.Fail(fail)
				w.target.Fail(fail)
				got, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
				if err != nil && !errors.Is(err, broker.Unavailable) {
					t.Fatalf("fault %v at act %d: Issue = %v, want a secret or Unavailable", fault, n, err)
				}
				if err == nil && !w.target.Login(got.Secret.Reveal()) {
					t.Fatalf("fault %v at act %d: Issue returned a secret that does not work", fault, n)
				}
				pass(2 * time.Minute)
				w.wantAllClosed()
			})
		}
	}
}

// TestUnknownIsAState holds that a grant is not CLOSED while Vault may still complete its mint.
func TestUnknownIsAState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{})
		w.vault.Fail(func(point string) error {
			if point == "mint created" {
				return errors.New("connection reset")
			}
			return nil
		})
		_, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
		refused(t, "Issue", err, broker.Unavailable, broker.CodeOutcomeUnknown)
		w.vault.Fail(nil)
		pass(time.Second)
		if alive := w.target.Alive(); len(alive) != 0 {
			t.Fatalf("alive after a second: %v, want none", alive)
		}
		v, _ := w.Chain(ctx, root.Chain)
		if g := v.Grants[0]; g.State == broker.StateClosed {
			t.Fatalf("the grant is CLOSED (%v) while its mint may be under way", g.Evidence)
		}
		pass(10 * time.Second) // past MintTimeout and MintBound
		w.wantAllClosed()
	})
}
