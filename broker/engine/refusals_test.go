package engine_test

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// entriesOf counts the entries of an actor with an op.
func (w *world) entriesOf(actor string, op broker.Op) (n int) {
	for _, e := range w.recorded(op) {
		if e.Actor == as(actor).ID.String() {
			n++
		}
	}
	return n
}

// TestRefusalsAreSummed has one caller refused two hundred times in a minute, over two chains. Sixty are recorded one by
// one, and the rest in one entry. A violation of another kind or chain is recorded beside them, and a consequence takes
// effect.
func TestRefusalsAreSummed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		consequence := broker.ConsequenceDeny
		w.policy.Answer = func(q broker.Question) broker.Decision {
			if q.Action == broker.ActionReport {
				return broker.Decision{Consequence: consequence}
			}
			return broker.Decision{Allow: true}
		}
		loud := []broker.Delegation{w.open("loud", broker.OpenRequest{Rights: use("db.read")}),
			w.open("loud", broker.OpenRequest{Rights: use("db.read")})}
		others := []broker.Delegation{w.open("other", broker.OpenRequest{Rights: use("db.read")}),
			w.open("other", broker.OpenRequest{Rights: use("db.read")})}
		for i := range 200 {
			if _, err := w.Issue(ctx, as("loud"), step(loud[i%2], "deploy")); !errors.Is(err, broker.Denied) {
				t.Fatalf("Issue = %v, want denied", err)
			}
		}
		if n := w.entriesOf("loud", broker.OpDenied); n != 60 {
			t.Errorf("%d refusals are recorded one by one, want 60", n)
		}
		for i := range 80 {
			if _, err := w.Issue(ctx, as("loud"), step(others[i%2], "db.read")); !errors.Is(err, broker.NotFound) {
				t.Fatalf("Issue under another's delegation = %v, want not found", err)
			}
		}
		if n := w.entriesOf("loud", broker.OpViolation); n != 2 {
			t.Errorf("%d violations are recorded, want the first against each of two delegations", n)
		}
		if _, err := w.Issue(ctx, as("other"), step(others[0], "deploy")); !errors.Is(err, broker.Denied) ||
			w.entriesOf("other", broker.OpDenied) != 1 {
			t.Errorf("Issue by another caller = %v, want denied and recorded", err)
		}
		pass(70 * time.Second)
		sums := w.recorded(broker.OpSummed)
		if len(sums) != 1 || sums[0].Actor != as("loud").ID.String() ||
			!strings.HasSuffix(sums[0].Detail, ": 140 more, tool_not_delegated 140") {
			t.Errorf("the sums are %+v, want one of 140", sums)
		}
		var more []string
		for _, e := range w.recorded(broker.OpViolation) {
			if strings.HasPrefix(e.Detail, "39 more like it") && e.Code == broker.Code(broker.ViolationHolder) {
				more = append(more, string(e.Chain))
			}
		}
		if len(more) != 2 || more[0] == more[1] {
			t.Errorf("the violations beyond the limit are summed under %q, want each of two chains", more)
		}
	})
}

// TestConsequencesBeyondTheLimit has a caller that has used its recorded refusals up. A consequence takes effect and is
// recorded, the same one again is not, and a report without one is refused.
func TestConsequencesBeyondTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		consequence := broker.ConsequenceDeny
		w.policy.Answer = func(q broker.Question) broker.Decision {
			if q.Action == broker.ActionReport {
				return broker.Decision{Consequence: consequence}
			}
			return broker.Decision{Allow: true}
		}
		d := w.open("loud", broker.OpenRequest{Rights: use("db.read")})
		other := w.open("other", broker.OpenRequest{Rights: use("db.read")})
		report := broker.ReportRequest{Delegation: d.ID, Violation: "odd"}
		for i := range 60 {
			if _, err := w.Report(ctx, as("loud"), report); err != nil {
				t.Fatalf("report %d = %v", i, err)
			}
		}
		var refusal *broker.Error
		if _, err := w.Report(ctx, as("loud"), report); !errors.As(err, &refusal) || refusal.Kind != broker.OverLimit ||
			refusal.Code != broker.CodeTooManyReports || refusal.RetryAfter == 0 {
			t.Errorf("a report beyond the limit = %v, want too_many_reports", err)
		}
		consequence = broker.ConsequenceFreezeCaller
		for range 5 {
			pass(time.Millisecond)
			if _, err := w.Issue(ctx, as("loud"), step(other, "db.read")); !errors.Is(err, broker.NotFound) {
				t.Errorf("Issue under another's delegation = %v, want not found", err)
			}
		}
		if n := len(w.recorded(broker.OpFreeze)); n == 0 {
			t.Error("the caller is not frozen")
		}
		thefts := 0
		for _, e := range w.recorded(broker.OpViolation) {
			if e.Code == broker.Code(broker.ViolationHolder) {
				thefts++
			}
		}
		if thefts != 1 {
			t.Errorf("%d violations are recorded, want one: the others have no new effect", thefts)
		}
		own := w.open("loud2", broker.OpenRequest{Rights: use("db.read")})
		for range 61 {
			_, _ = w.Report(ctx, as("loud2"), broker.ReportRequest{Delegation: own.ID, Violation: "odd"})
		}
		consequence = broker.ConsequenceRevokeChain
		rep, err := w.Report(ctx, as("loud2"), broker.ReportRequest{Delegation: own.ID, Violation: "odd"})
		if err != nil || rep.Revocation == "" {
			t.Errorf("a report with a consequence beyond the limit = %+v, %v, want a revocation", rep, err)
		}
	})
}
