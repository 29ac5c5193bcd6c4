package engine_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
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

// TestArgsDigest: one digest for one set of arguments however it was spelled, the same
// in every state.
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
				t.Errorf("%s: digest %q when issued, %q when closed, grants in the ledger %+v; want %s", raw, issued.ArgsDigest, closed.ArgsDigest, v.Grants, want)
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
			t.Fatalf("%d secrets alive after 21 s, want only the one of a minute", n)
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
			name   string
			caller broker.Caller
			chain  time.Duration
			asked  time.Duration
			policy time.Duration
			want   time.Duration
		}{
			{"the tool's", as("planner"), time.Hour, 0, 0, time.Minute},
			{"the request's", as("planner"), time.Hour, 30 * time.Second, 0, 30 * time.Second},
			{"the policy's", as("planner"), time.Hour, 30 * time.Second, 5 * time.Second, 5 * time.Second},
			{"the delegation's", as("planner"), 15 * time.Second, 0, 0, 15 * time.Second},
			{"the identity's", short, time.Hour, 0, 0, 10 * time.Second},
			{"no more than asked", as("planner"), time.Hour, time.Hour, 0, time.Minute},
		} {
			w.policy.Answer = func(broker.Question) broker.Decision { return broker.Decision{Allow: true, TTL: row.policy} }
			root := w.open("planner", broker.OpenRequest{TTL: row.chain})
			got, err := w.Issue(ctx, row.caller, broker.StepRequest{Delegation: root.ID, Tool: "db.read", TTL: row.asked})
			if err != nil || got.Grant.Expires.Sub(got.Grant.Created) != row.want {
				t.Errorf("%s: life = %v, %v; want %v", row.name, got.Grant.Expires.Sub(got.Grant.Created), err, row.want)
			}
		}
	})
}

func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{Depth: 2, Rights: []broker.Right{
			{Tool: "db.read", Use: true, Delegate: true, Args: map[string]args.Constraint{"table": args.OneOf("orders")}},
			{Tool: "deploy", Delegate: true},
		}})
		orders, _ := args.New(map[string]args.Value{"table": args.String("orders")})
		people, _ := args.New(map[string]args.Value{"table": args.String("people")})
		other, _ := args.New(map[string]args.Value{"shard": args.Int(1)})
		expired := as("planner")
		expired.NotAfter = time.Now()
		for _, row := range []struct {
			name   string
			caller broker.Caller
			r      broker.StepRequest
			kind   broker.Kind
			code   broker.Code
		}{
			{"nobody", broker.Caller{}, step(root, "db.read"), broker.Unauthenticated, ""},
			{"expired", expired, step(root, "db.read"), broker.Unauthenticated, broker.CodeExpired},
			{"not the holder", as("writer"), step(root, "db.read"), broker.NotFound, broker.CodeDelegationUnknown},
			{"no such delegation", as("planner"), broker.StepRequest{Delegation: "dl000000000000000000000000", Tool: "db.read"}, broker.NotFound, broker.CodeDelegationUnknown},
			{"no such tool", as("planner"), step(root, "rm"), broker.Denied, broker.CodeToolUnknown},
			{"not delegated", as("planner"), step(root, "db.write"), broker.Denied, broker.CodeToolNotDelegated},
			{"only to pass on", as("planner"), step(root, "deploy"), broker.Denied, broker.CodeToolNotDelegated},
			{"argument left out", as("planner"), step(root, "db.read"), broker.Denied, broker.CodeArgumentOutside},
			{"argument outside", as("planner"), broker.StepRequest{Delegation: root.ID, Tool: "db.read", Args: people}, broker.Denied, broker.CodeArgumentOutside},
			{"argument unknown", as("planner"), broker.StepRequest{Delegation: root.ID, Tool: "db.read", Args: other}, broker.Denied, broker.CodeArgumentOutside},
			{"key too long", as("planner"), broker.StepRequest{Delegation: root.ID, Tool: "db.read", Key: string(make([]byte, 129))}, broker.Malformed, ""},
		} {
			_, err := w.Issue(ctx, row.caller, row.r)
			refused(t, row.name, err, row.kind, row.code)
		}
		w.issue("planner", broker.StepRequest{Delegation: root.ID, Tool: "db.read", Args: orders})
		w.policy.Answer = func(broker.Question) broker.Decision { return broker.Decision{Allow: true, Failed: true} }
		_, err := w.Issue(ctx, as("planner"), broker.StepRequest{Delegation: root.ID, Tool: "db.read", Args: orders})
		refused(t, "a decision that failed to evaluate", err, broker.Denied, broker.CodePolicyDenied)
	})
}

func TestDelegationOnlyNarrows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{Depth: 2, TTL: 30 * time.Minute, Budget: broker.Budget{Steps: 10}, Rights: []broker.Right{
			{Tool: "db.read", Use: true, Delegate: true, Args: map[string]args.Constraint{"table": args.OneOf("orders", "items")}},
			{Tool: "db.write", Use: true},
			{Tool: "deploy", Delegate: true},
		}})
		orders := map[string]args.Constraint{"table": args.OneOf("orders")}
		wide := map[string]args.Constraint{"table": args.OneOf("orders", "people")}
		pass(time.Minute)
		for _, row := range []struct {
			name string
			r    broker.DelegateRequest
			code broker.Code
		}{
			{"narrower", broker.DelegateRequest{Rights: []broker.Right{{Tool: "db.read", Use: true, Args: orders}}}, ""},
			{"what it may only pass on", broker.DelegateRequest{Rights: use("deploy")}, ""},
			{"an argument wider", broker.DelegateRequest{Rights: []broker.Right{{Tool: "db.read", Use: true, Args: wide}}}, broker.CodeDelegationWider},
			{"an argument left open", broker.DelegateRequest{Rights: use("db.read")}, broker.CodeDelegationWider},
			{"what it may only use", broker.DelegateRequest{Rights: use("db.write")}, broker.CodeDelegationWider},
			{"more budget", broker.DelegateRequest{Rights: use("deploy"), Budget: broker.Budget{Steps: 11}}, broker.CodeDelegationWider},
			{"as long as the parent's whole life, a while later", broker.DelegateRequest{Rights: use("deploy"), TTL: 30 * time.Minute}, ""},
			{"longer than that", broker.DelegateRequest{Rights: use("deploy"), TTL: 30*time.Minute + time.Second}, broker.CodeDelegationWider},
			{"as much depth", broker.DelegateRequest{Rights: use("deploy"), Depth: 2}, broker.CodeDelegationWider},
		} {
			row.r.From, row.r.To = root.ID, as("writer").ID
			d, err := w.Delegate(ctx, as("planner"), row.r)
			if row.code != "" {
				refused(t, row.name, err, broker.Denied, row.code)
			} else if err != nil || d.Holder != as("writer").ID || d.Budget.Steps != 10 || d.Expires.After(root.Expires) {
				t.Errorf("%s: Delegate = %+v, %v; want a child with the parent's budget", row.name, d, err)
			}
		}
		last, err := w.Delegate(ctx, as("planner"), broker.DelegateRequest{From: root.ID, To: as("writer").ID, Rights: use("deploy")})
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.Delegate(ctx, as("writer"), broker.DelegateRequest{From: last.ID, To: as("helper").ID, Rights: use("deploy")})
		refused(t, "past the depth", err, broker.Denied, broker.CodeDelegationDepth)
		_, err = w.Delegate(ctx, as("thief"), broker.DelegateRequest{From: root.ID, To: as("thief").ID, Rights: use("deploy")})
		refused(t, "by somebody else", err, broker.NotFound, broker.CodeDelegationUnknown)
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
			t.Fatalf("the key again = %+v, want the same grant and no secret", second)
		}
		r.Tool = "deploy"
		_, err := w.Issue(ctx, as("planner"), r)
		refused(t, "the key for another tool", err, broker.Conflict, broker.CodeKeyOtherTool)
		r.Tool = "db.read"
		r.Args, _ = args.New(map[string]args.Value{"table": args.String("orders")})
		_, err = w.Issue(ctx, as("planner"), r)
		refused(t, "the key for other arguments", err, broker.Conflict, broker.CodeKeyOtherArguments)
		_, err = w.Issue(ctx, as("writer"), r)
		refused(t, "the key from another caller", err, broker.NotFound, broker.CodeDelegationUnknown)
		if n := len(w.target.Alive()); n != 1 {
			t.Fatalf("%d secrets were made, want 1", n)
		}
	})
}

// budgetsOfTen are one for each thing that a budget counts.
var budgetsOfTen = map[string]broker.Budget{
	"steps": {Steps: 10}, "live": {Live: 10}, "per minute": {PerMinute: 10},
	"tool": {Tools: map[broker.ToolName]int{"db.read": 10}},
}

// TestBudgetCountsStepsInFlight: fifty agents at once against a budget of ten, and exactly ten get through,
// whatever the budget counts.
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

// TestBudgetOnBolt is TestBudgetCountsStepsInFlight on the embedded ledger: many agents' transactions
// share one commit there. Each run is a chain of its own.
func TestBudgetOnBolt(t *testing.T) {
	at := time.Now()
	pawl := newBoltBroker(t, func() time.Time { return at }) // no minute begins in between
	for name, budget := range budgetsOfTen {
		t.Run(name, func(t *testing.T) {
			for range 25 { // four budgets: a hundred runs
				tenOfFifty(t, pawl, budget)
			}
		})
	}
}

// tenOfFifty fails unless ten of fifty that ask at once get a secret and all others are denied.
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
		t.Fatalf("%d of 50 got a secret, want 10", got.Load())
	}
}

// TestHistoryIsExact: a rule over the chain's history must hold when its steps race.
func TestHistoryIsExact(t *testing.T) {
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.policy.Answer = func(q broker.Question) broker.Decision { // never db.read and deploy in one chain
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
				t.Fatalf("%d reads and %d deploys, want one of them alone", reads.Load(), deploys.Load())
			}
		})
	}
}

// dead makes everything that a process could still do fail, from the nth act on.
type crash struct {
	mu   sync.Mutex
	left int
	at   string // what the process was about to do, or had just done
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

// TestCrashAnywhere kills the broker before and after each thing that issue and close do to the
// ledger, to Vault and at the target, starts it again, and finds nothing alive that is not meant to be.
// A second step of a delegation has its token made while its intent is committed, in either order.
func TestCrashAnywhere(t *testing.T) {
	points := map[string]bool{}
	for _, steps := range []int{0, 1} {
		crashAtEachAct(t, points, steps)
	}
	for _, want := range []string{"ledger", "ledger committed", "branch", "branch done", "child", "child done", "mint", "mint created", "mint done", "kill", "sever", "prove"} {
		if !points[want] {
			t.Errorf("the walk never died at %q: %v", want, points)
		}
	}
}

// crashAtEachAct takes some steps, and dies at each act of one more.
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
			finished = err == nil && d.at == ""
			points[d.at] = true
			w.Stop()

			w.ledger.Fail(nil)
			w.target.Fail(nil)
			w.vault = w.vault.Restarted()
			w.start(w.ledger)
			if got.Grant.ID != "" && d.at != "" {
				pass(time.Second)
			}
			pass(2 * time.Minute)
			w.wantAllClosed()
			w.issue("planner", step(root, "db.read")) // and it still works
		})
		if t.Failed() {
			t.Fatalf("after %d steps and dying at act %d", steps, n)
		}
		if finished {
			return
		}
	}
}

// TestSingleFaults lets one act fail and the rest go on, at every act in turn: an error
// is answered, nothing is handed out that the ledger does not know, and all of it ends.
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
					t.Fatalf("fault %v at act %d: handed out a secret that does not work", fault, n)
				}
				pass(2 * time.Minute)
				w.wantAllClosed()
			})
		}
	}
}

// TestUnknownIsAState: while a mint may still complete, the grant is not called over.
func TestUnknownIsAState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{})
		w.vault.Fail(func(point string) error {
			if point == "mint created" {
				return errors.New("the connection was cut")
			}
			return nil
		})
		_, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
		refused(t, "Issue", err, broker.Unavailable, broker.CodeOutcomeUnknown)
		w.vault.Fail(nil)
		pass(time.Second)
		if alive := w.target.Alive(); len(alive) != 0 {
			t.Fatalf("alive a second later: %v", alive)
		}
		v, _ := w.Chain(ctx, root.Chain)
		if g := v.Grants[0]; g.State == broker.StateClosed {
			t.Fatalf("the grant is CLOSED (%v) while a mint may be on its way", g.Evidence)
		}
		pass(10 * time.Second) // past MintTimeout and MintBound
		w.wantAllClosed()
	})
}
