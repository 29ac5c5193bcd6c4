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

// breachRow is one way to break policy in the chain "root -> worker", by worker or by a caller without rights.
type breachRow struct {
	code broker.ViolationCode
	do   func(s *breachScene) error

	kind    broker.Kind // of the answer when there is no consequence
	refusal broker.Code // of that answer; empty with silent

	keepsCode       bool // the answer has that code with a consequence too
	hidesRevocation bool // the answer does not name the revocation
	stranger        bool // the answer says nothing of the violation, and freeze-caller stops the violator alone
	silent          bool // there is no answer, and the broker retries when it cannot record the violation
	report          bool // a report, which is not refused

	always bool // the audit log has a violation also when policy attaches no consequence
	step   bool // the breach is one step's, and its secret is alive
	node   bool // the breach is no step's: revoke-step ends every grant under worker
	root   bool // the breach is the whole chain's
	frozen string
}

var breachRows = map[string]breachRow{
	"a forbidden tool": {code: broker.ViolationForbidden, frozen: "worker",
		kind: broker.Denied, refusal: broker.CodePolicyDenied,
		do: func(s *breachScene) error { return s.issue("worker", "deploy") }},
	"a tool outside the scope": {code: broker.ViolationScope, frozen: "worker",
		kind: broker.Denied, refusal: broker.CodeToolNotDelegated,
		do: func(s *breachScene) error { return s.issue("worker", "note") }},
	"a step over the budget": {code: broker.ViolationBudget, frozen: "worker",
		kind: broker.Denied, refusal: broker.CodeBudgetExhausted,
		do: func(s *breachScene) error { return s.issue("worker", "db.write") }},
	"another holder's delegation": {code: broker.ViolationHolder, always: true, stranger: true, frozen: "thief",
		kind: broker.NotFound, refusal: broker.CodeDelegationUnknown,
		do: func(s *breachScene) error { return s.issue("thief", "db.read") }},
	"a used idempotency key with other arguments": {code: broker.ViolationReplay, frozen: "worker",
		kind: broker.Conflict, refusal: broker.CodeKeyOtherArguments,
		do: func(s *breachScene) error {
			r := step(s.worker, "db.read")
			r.Key, r.Args = "key", must(args.New(map[string]args.Value{"table": args.String("other")}))
			_, err := s.w.Issue(ctx, as("worker"), r)
			return err
		}},
	"a second collection": {code: broker.ViolationSecondUse, always: true, step: true, frozen: "worker",
		kind: broker.Conflict, refusal: broker.CodeAlreadyCollected, keepsCode: true,
		do: func(s *breachScene) error { _, _, err := s.w.Collect(ctx, as("worker"), s.grant); return err }},
	"a canary tool": {code: broker.ViolationCanary, always: true, frozen: "worker",
		kind: broker.Denied, refusal: broker.CodePolicyDenied, keepsCode: true, hidesRevocation: true,
		do: func(s *breachScene) error { return s.issue("worker", "bait") }},
	"a canary value": {code: broker.ViolationCanary, silent: true, always: true, node: true, root: true, frozen: "root",
		do: func(s *breachScene) error { s.w.Present(ctx, as("thief"), s.canary); return nil }},
	"a missed heartbeat": {code: broker.ViolationHeartbeat, silent: true, always: true, node: true, frozen: "worker",
		do: func(*breachScene) error { pass(2 * time.Second); return nil }},
	"a report about a step": {code: "odd", report: true, always: true, step: true, frozen: "worker",
		do: func(s *breachScene) error {
			_, err := s.w.Report(ctx, as("root"), broker.ReportRequest{Delegation: s.worker.ID, Grant: s.grant,
				Violation: "odd"})
			return err
		}},
	"a report about a delegation": {code: "reported", report: true, always: true, node: true,
		frozen: "worker",
		do: func(s *breachScene) error {
			_, err := s.w.Report(ctx, as("root"), broker.ReportRequest{Delegation: s.worker.ID,
				Violation: "reported"})
			return err
		}},
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// breachScene is the chain "root -> worker" with live secrets.
type breachScene struct {
	w            *world
	worker       broker.Delegation
	canary       string
	above, other broker.GrantID // one of root's, and one of worker's; no breach is theirs
	grant        broker.GrantID // another of worker's; a breach may be its own
}

func (s *breachScene) issue(caller string, tool broker.ToolName) error {
	_, err := s.w.Issue(ctx, as(caller), step(s.worker, tool))
	return err
}

func newBreachScene(t *testing.T, row breachRow, consequence broker.Consequence) *breachScene {
	w := newWorld(t)
	w.policy.Tools["bait"] = broker.Tool{Name: "bait", Backend: "target", Canary: true}
	var heartbeat time.Duration
	if row.code == broker.ViolationHeartbeat {
		heartbeat = time.Second
	}
	root := w.open("root", broker.OpenRequest{Depth: 1, Rights: use("db.read", "db.write", "deploy", "note"),
		Budget: broker.Budget{Tools: map[broker.ToolName]int{"db.write": 1}}})
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
	w.issue("worker", step(s.worker, "db.write")) // spends the budget
	_, s.canary = w.plant(broker.PlantRequest{Chain: root.Chain})
	w.policy.Answer = func(q broker.Question) broker.Decision {
		report := q.Action == broker.ActionReport
		if q.Action == broker.ActionUse && q.Tool.Name == "deploy" || report && q.Violation == row.code {
			return broker.Decision{Consequence: consequence, Allow: report, Policies: []string{"the-policy"}}
		}
		return broker.Decision{Allow: !report}
	}
	return s
}

// TestBreaches makes each breach with each consequence. The audit log must have the violation with the policies that
// decided, and the broker must apply the consequence. It must do so too when the ledger reports a failure of an update
// that it has committed: the fenced grants are dead in the usual time, without a restart.
func TestBreaches(t *testing.T) {
	faults := map[brokertest.Fault]string{brokertest.None: "commits", brokertest.NotCommitted: "fails",
		brokertest.CommittedButFails: "commits and fails"}
	for name, row := range breachRows {
		for consequence := broker.ConsequenceDeny; consequence <= broker.ConsequenceFreezeCaller; consequence++ {
			for fault, ledger := range faults {
				t.Run(name+"/"+consequence.String()+"/"+ledger, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { testBreach(t, row, consequence, fault) })
				})
			}
		}
	}
}

func testBreach(t *testing.T, row breachRow, consequence broker.Consequence, fault brokertest.Fault) {
	s := newBreachScene(t, row, consequence)
	var faults atomic.Int32
	s.w.ledger.Fail(func(_ int, entries []broker.Entry) brokertest.Fault {
		violation := slices.ContainsFunc(entries, func(e broker.Entry) bool { return e.Op == broker.OpViolation })
		if faults.Load() > 0 || fault == brokertest.None || !violation {
			return brokertest.None
		}
		faults.Add(1)
		return fault
	})
	err := row.do(s)
	recorded := consequence > broker.ConsequenceDeny || row.always // as a violation, and not as a denial
	if hit := recorded && fault != brokertest.None; !row.silent && hit != (faults.Load() == 1) {
		t.Fatalf("the ledger failed %d times, want once: %v", faults.Load(), hit)
	}
	row.checkAnswer(t, err, consequence, faults.Load() > 0)

	applied := recorded && (fault != brokertest.NotCommitted || row.silent) // a silent breach is recorded in a retry
	pass(5 * time.Second)
	s.checkAudit(t, row, applied, faults.Load() > 0)
	ended := row.ended(s, consequence, applied)
	for id, name := range map[broker.GrantID]string{s.above: "root's secret", s.other: "worker's other secret",
		s.grant: "the step's secret"} {
		if alive, want := slices.Contains(s.w.target.Alive(), id), !slices.Contains(ended, id); alive != want {
			t.Errorf("%s is alive: %v, want %v", name, alive, want)
		}
	}
	revoked := false
	all := must(s.w.Revocations(ctx))
	for _, rv := range all {
		revoked = revoked || !rv.Freeze
		if !rv.Freeze && rv.Closure != broker.ClosureClosed {
			t.Errorf("revocation %s is %s, want CLOSED", rv.Selector, rv.Closure)
		}
	}
	if want := len(ended) > 0; revoked != want {
		t.Errorf("revocations = %+v, want one: %v", all, want)
	}
	frozen := applied && consequence == broker.ConsequenceFreezeCaller
	_, err = s.w.Open(ctx, as(row.frozen), broker.OpenRequest{Task: "another", Rights: use("db.read")})
	if got := broker.KindOf(err) == broker.Revoked; got != frozen || !frozen && err != nil {
		t.Errorf("Open by %s = %v, want it frozen: %v", row.frozen, err, frozen)
	}
}

// checkAnswer checks the answer to the request that broke policy.
func (row breachRow) checkAnswer(t *testing.T, err error, consequence broker.Consequence, failed bool) {
	t.Helper()
	switch {
	case row.silent:
	case row.stranger:
		refused(t, "the request", err, row.kind, row.refusal)
		if e := err.(*broker.Error); e.Revocation != "" {
			t.Errorf("the answer names the revocation %q", e.Revocation)
		}
	case row.report && !failed:
		if err != nil {
			t.Errorf("Report = %v, want it accepted", err)
		}
	case failed && (row.report || consequence > broker.ConsequenceDeny):
		refused(t, "the request", err, broker.Unavailable, broker.CodeLedgerDown)
	default:
		code := row.refusal
		if consequence > broker.ConsequenceDeny && !row.keepsCode {
			code = broker.CodeViolation
		}
		refused(t, "the request", err, row.kind, code)
		want := !row.hidesRevocation && row.revokes(consequence)
		if e := err.(*broker.Error); !failed && (e.Revocation != "") != want {
			t.Errorf("the answer names the revocation %q, want one: %v", e.Revocation, want)
		}
	}
}

func (row breachRow) revokes(consequence broker.Consequence) bool {
	if row.stranger && consequence == broker.ConsequenceFreezeCaller {
		return false
	}
	return consequence > broker.ConsequenceRevokeStep ||
		consequence == broker.ConsequenceRevokeStep && (row.step || row.node)
}

// ended returns the grants that the consequence ends.
func (row breachRow) ended(s *breachScene, consequence broker.Consequence, applied bool) []broker.GrantID {
	switch {
	case !applied || !row.revokes(consequence):
		return nil
	case consequence >= broker.ConsequenceRevokeChain || row.root:
		return []broker.GrantID{s.above, s.other, s.grant}
	case consequence == broker.ConsequenceRevokeStep && row.step:
		return []broker.GrantID{s.grant}
	}
	return []broker.GrantID{s.other, s.grant}
}

func (s *breachScene) checkAudit(t *testing.T, row breachRow, applied, failed bool) {
	t.Helper()
	found := s.w.recorded(broker.OpViolation)
	// The retry of a silent breach records a second violation when the first was committed although the ledger failed.
	if n := len(found); applied != (n > 0) || n > 1 && !(row.silent && failed && n == 2) {
		t.Fatalf("the audit log has %d violations, want one: %v", n, applied)
	}
	for _, e := range found {
		if e.Code != broker.Code(row.code) || !slices.Equal(e.Policies, []string{"the-policy"}) ||
			e.Chain != s.worker.Chain {
			t.Errorf("the audit log has %+v, want %s in the chain by the-policy", e, row.code)
		}
	}
}
