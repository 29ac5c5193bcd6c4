package engine_test

import (
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// breachRow is one way to break policy, by the worker or by a thief, in the chain "root -> worker".
type breachRow struct {
	code broker.ViolationCode
	do   func(s *breachScene) error

	kind            broker.Kind // of the answer that follows no consequence
	refusal         broker.Code // likewise; empty with silent
	keepsCode       bool        // the answer keeps that code when a consequence follows
	hidesRevocation bool        // and does not name the revocation
	silent          bool        // the broker noticed it by itself, or answers nothing, and tries again when it cannot record it
	report          bool        // the answer of a report, which is no refusal

	always bool // it is a violation in the audit even when policy attaches no consequence
	step   bool // one step is the breach, and its secret is alive
	node   bool // no step is the breach: revoke-step ends everything below the worker
	root   bool // the whole chain is where it happened
	frozen string
}

var breachRows = map[string]breachRow{
	"a forbidden tool": {code: broker.ViolationForbidden, kind: broker.Denied, refusal: broker.CodePolicyDenied, frozen: "worker",
		do: func(s *breachScene) error {
			_, err := s.w.Issue(ctx, as("worker"), step(s.worker, "deploy"))
			return err
		}},
	"a tool outside the scope": {code: broker.ViolationScope, kind: broker.Denied, refusal: broker.CodeToolNotDelegated, frozen: "worker",
		do: func(s *breachScene) error { _, err := s.w.Issue(ctx, as("worker"), step(s.worker, "note")); return err }},
	"a step over the budget": {code: broker.ViolationBudget, kind: broker.Denied, refusal: broker.CodeBudgetExhausted, frozen: "worker",
		do: func(s *breachScene) error {
			_, err := s.w.Issue(ctx, as("worker"), step(s.worker, "db.write"))
			return err
		}},
	"the delegation of another": {code: broker.ViolationHolder, kind: broker.NotFound, refusal: broker.CodeDelegationUnknown, always: true, frozen: "thief",
		do: func(s *breachScene) error {
			_, err := s.w.Issue(ctx, as("thief"), step(s.worker, "db.read"))
			return err
		}},
	"an idempotency key used again": {code: broker.ViolationReplay, kind: broker.Conflict, refusal: broker.CodeKeyOtherArguments, frozen: "worker",
		do: func(s *breachScene) error {
			r := step(s.worker, "db.read")
			r.Key, r.Args = "key", must(args.New(map[string]args.Value{"table": args.String("other")}))
			_, err := s.w.Issue(ctx, as("worker"), r)
			return err
		}},
	"a secret collected twice": {code: broker.ViolationSecondUse, kind: broker.Conflict, refusal: broker.CodeAlreadyCollected, keepsCode: true, always: true, step: true, frozen: "worker",
		do: func(s *breachScene) error { _, _, err := s.w.Collect(ctx, as("worker"), s.grant); return err }},
	"a canary tool": {code: broker.ViolationCanary, kind: broker.Denied, refusal: broker.CodePolicyDenied, keepsCode: true, hidesRevocation: true, always: true, frozen: "worker",
		do: func(s *breachScene) error { _, err := s.w.Issue(ctx, as("worker"), step(s.worker, "bait")); return err }},
	"a canary value": {code: broker.ViolationCanary, silent: true, always: true, node: true, root: true, frozen: "root",
		do: func(s *breachScene) error { s.w.Present(ctx, as("thief"), s.canary); return nil }},
	"a lost heartbeat": {code: broker.ViolationHeartbeat, silent: true, always: true, node: true, frozen: "worker",
		do: func(s *breachScene) error { pass(2 * time.Second); return nil }},
	"a report about a step": {code: "odd", report: true, always: true, step: true, frozen: "worker",
		do: func(s *breachScene) error {
			_, err := s.w.Report(ctx, as("root"), broker.ReportRequest{Delegation: s.worker.ID, Grant: s.grant, Violation: "odd"})
			return err
		}},
	"a report about a delegation": {code: broker.ViolationReported, report: true, always: true, node: true, frozen: "worker",
		do: func(s *breachScene) error {
			_, err := s.w.Report(ctx, as("root"), broker.ReportRequest{Delegation: s.worker.ID, Violation: broker.ViolationReported})
			return err
		}},
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// breachScene is the chain "root -> worker" with three secrets alive: one of root's, and two of worker's.
type breachScene struct {
	w            *world
	worker       broker.Delegation
	canary       string
	above, other broker.GrantID // root's, and worker's that no breach is about
	grant        broker.GrantID // worker's that a breach may be about
}

func newBreachScene(t *testing.T, row breachRow, what broker.Consequence) *breachScene {
	w := newWorld(t)
	w.policy.Tools["bait"] = broker.Tool{Name: "bait", Backend: "target", Canary: true}
	var heartbeat time.Duration
	if row.code == broker.ViolationHeartbeat {
		heartbeat = time.Second
	}
	root := w.open("root", broker.OpenRequest{Depth: 1, Rights: use("db.read", "db.write", "deploy", "note"), Budget: broker.Budget{Tools: map[broker.ToolName]int{"db.write": 1}}})
	s := &breachScene{w: w}
	var err error
	if s.worker, err = w.Delegate(ctx, as("root"), broker.DelegateRequest{From: root.ID, To: as("worker").ID,
		Rights: use("db.read", "db.write", "deploy"), Heartbeat: heartbeat}); err != nil {
		t.Fatal(err)
	}
	s.above = w.issue("root", step(root, "db.read")).Grant.ID
	keyed := step(s.worker, "db.read")
	keyed.Key = "key"
	s.other = w.issue("worker", keyed).Grant.ID
	s.grant = w.issue("worker", sealed(s.worker, "")).Grant.ID
	if _, _, err := w.Collect(ctx, as("worker"), s.grant); err != nil {
		t.Fatal(err)
	}
	w.issue("worker", step(s.worker, "db.write")) // the budget's only one
	_, s.canary = w.plant(broker.PlantRequest{Chain: root.Chain})
	w.policy.Answer = func(q broker.Question) broker.Decision {
		if q.Action == broker.ActionUse && q.Tool.Name == "deploy" || q.Action == broker.ActionReport && q.Violation == row.code {
			return broker.Decision{Consequence: what, Allow: q.Action == broker.ActionReport, Policies: []string{"the-policy"}}
		}
		return broker.Decision{Allow: q.Action != broker.ActionReport}
	}
	return s
}

// TestBreaches: whatever was broken, and whatever policy attaches to it, the violation is in the audit with the
// policies that decided, and the consequence is carried out. So it is when the ledger reports a failure of a commit that it
// made: then what the fence covers is dead in the usual time, without a restart.
func TestBreaches(t *testing.T) {
	for name, row := range breachRows {
		for what := broker.ConsequenceDeny; what <= broker.ConsequenceFreezeCaller; what++ {
			for _, fault := range []brokertest.Fault{brokertest.None, brokertest.NotCommitted, brokertest.CommittedButFails} {
				t.Run(name+"/"+what.String()+"/"+map[brokertest.Fault]string{brokertest.None: "commits", brokertest.NotCommitted: "fails", brokertest.CommittedButFails: "fails and is applied"}[fault], func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { testBreach(t, row, what, fault) })
				})
			}
		}
	}
}

func testBreach(t *testing.T, row breachRow, what broker.Consequence, fault brokertest.Fault) {
	s := newBreachScene(t, row, what)
	var faults atomic.Int32
	s.w.ledger.Fail(func(_ int, entries []broker.Entry) brokertest.Fault {
		if faults.Load() > 0 || fault == brokertest.None || !slices.ContainsFunc(entries, func(e broker.Entry) bool { return e.Op == broker.OpViolation }) {
			return brokertest.None
		}
		faults.Add(1)
		return fault
	})
	err := row.do(s)
	recorded := what > broker.ConsequenceDeny || row.always // as a violation, and not as a denial
	if hit := recorded && fault != brokertest.None && !row.silent; hit != (faults.Load() == 1) && !row.silent {
		t.Fatalf("the ledger failed %d times, want once: %v", faults.Load(), hit)
	}
	row.checkAnswer(t, err, what, faults.Load() > 0)

	applied := recorded && (fault != brokertest.NotCommitted || row.silent) // what is silent is tried again
	pass(5 * time.Second)
	s.checkAudit(t, row, applied, faults.Load() > 0)
	ended := row.ended(s, what, applied)
	for id, what := range map[broker.GrantID]string{s.above: "root's secret", s.other: "worker's other secret", s.grant: "the step's secret"} {
		if alive, want := slices.Contains(s.w.target.Alive(), id), !slices.Contains(ended, id); alive != want {
			t.Errorf("%s is alive: %v, want %v", what, alive, want)
		}
	}
	all := must(s.w.Revocations(ctx))
	for _, rv := range all {
		if !rv.Freeze && rv.Closure != broker.ClosureClosed {
			t.Errorf("revocation %s is %s, want CLOSED", rv.Selector, rv.Closure)
		}
	}
	if fenced := len(ended) > 0; fenced != slices.ContainsFunc(all, func(rv broker.Revocation) bool { return !rv.Freeze }) {
		t.Errorf("revocations %+v, want one: %v", all, fenced)
	}
	frozen := applied && what == broker.ConsequenceFreezeCaller
	_, err = s.w.Open(ctx, as(row.frozen), broker.OpenRequest{Task: "another", Rights: use("db.read")})
	if got := broker.KindOf(err) == broker.Revoked; got != frozen || !frozen && err != nil {
		t.Errorf("another chain of %s = %v, want it frozen: %v", row.frozen, err, frozen)
	}
}

// answered checks the answer to the request that broke policy.
func (row breachRow) checkAnswer(t *testing.T, err error, what broker.Consequence, failed bool) {
	t.Helper()
	switch {
	case row.silent:
	case row.report && !failed:
		if err != nil {
			t.Errorf("the report = %v, want it taken", err)
		}
	case failed && (row.report || what > broker.ConsequenceDeny):
		refused(t, "the request", err, broker.Unavailable, broker.CodeLedgerDown)
	default:
		code := row.refusal
		if what > broker.ConsequenceDeny && !row.keepsCode {
			code = broker.CodeViolation
		}
		refused(t, "the request", err, row.kind, code)
		if e := err.(*broker.Error); !failed && (e.Revocation != "") != (!row.hidesRevocation && row.revokes(what)) {
			t.Errorf("the answer names the revocation %q, want one: %v", e.Revocation, !row.hidesRevocation && row.revokes(what))
		}
	}
}

func (row breachRow) revokes(what broker.Consequence) bool {
	return what > broker.ConsequenceRevokeStep || what == broker.ConsequenceRevokeStep && (row.step || row.node)
}

// ended are the grants that the consequence ends.
func (row breachRow) ended(s *breachScene, what broker.Consequence, applied bool) []broker.GrantID {
	switch {
	case !applied || !row.revokes(what):
		return nil
	case what >= broker.ConsequenceRevokeChain || row.root:
		return []broker.GrantID{s.above, s.other, s.grant}
	case what == broker.ConsequenceRevokeStep && row.step:
		return []broker.GrantID{s.grant}
	}
	return []broker.GrantID{s.other, s.grant}
}

func (s *breachScene) checkAudit(t *testing.T, row breachRow, applied, failed bool) {
	t.Helper()
	found := s.w.recorded(broker.OpViolation)
	// What is silent and was applied although the ledger reported a failure may be recorded once more.
	if n := len(found); applied != (n > 0) || n > 1 && !(row.silent && failed && n == 2) {
		t.Fatalf("%d violations in the audit, want one: %v", n, applied)
	}
	for _, e := range found {
		if e.Code != broker.Code(row.code) || !slices.Equal(e.Policies, []string{"the-policy"}) || e.Chain != s.worker.Chain {
			t.Errorf("the audit has %+v, want %s in the chain by the-policy", e, row.code)
		}
	}
}
