package engine_test

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// dump returns everything that the ledger holds, as text.
func (w *world) dump() string {
	var b strings.Builder
	if err := w.ledger.View(ctx, func(tx broker.Tx) error {
		return tx.Scan("", "", func(key string, value []byte) bool { fmt.Fprintf(&b, "%s %q\n", key, value); return true })
	}); err != nil {
		w.t.Fatal(err)
	}
	entries, err := w.ledger.Entries(ctx, 0, 1000)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		fmt.Fprintf(&b, "%s %s %q\n", e.Op, e.Code, e.Detail)
	}
	return b.String()
}

// TestEnvelope checks that a chain carries the content of its envelope, over a restart too, that it does not outlive
// it, and that the token is nowhere.
func TestEnvelope(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		const token = "header.payload.signature"
		sealed := broker.Envelope{Issuer: "https://desk.example", ID: "j-1", Digest: "sha256:00", Task: "ticket 17",
			Labels: map[string]string{"team": "payments"}, Behalf: "ana", Issued: time.Now().UTC(), Expires: time.Now().Add(10 * time.Minute).UTC()}
		w.policy.Envelopes = map[string]broker.Envelope{token: sealed}
		var seen []broker.Question
		w.policy.Answer = func(q broker.Question) broker.Decision {
			if q.Action != broker.ActionReport {
				seen = append(seen, q)
			}
			return broker.Decision{Allow: true}
		}
		root := w.open("planner", broker.OpenRequest{Task: "urgent", Depth: 1, Envelope: token, Labels: map[string]string{"team": "mine"}})
		if !root.Expires.Equal(sealed.Expires) {
			t.Errorf("the chain ends at %v, want the envelope's %v", root.Expires, sealed.Expires)
		}
		w.Stop()
		w.vault = w.vault.Restarted()
		w.start(w.ledger)
		w.issue("planner", step(root, "db.read"))
		child, err := w.Delegate(ctx, as("planner"), broker.DelegateRequest{From: root.ID, To: as("worker").ID, Rights: use("db.read")})
		if err != nil {
			t.Fatal(err)
		}
		w.issue("worker", step(child, "db.read"))
		for _, q := range seen {
			if q.Chain.Envelope == nil || !reflect.DeepEqual(*q.Chain.Envelope, sealed) || q.Chain.Task != "urgent" {
				t.Errorf("%s: policy sees %+v, want the envelope %+v", q.Action, q.Chain, sealed)
			}
		}
		if len(seen) != 6 { // three tools of the chain, a step, a delegation, a step
			t.Errorf("policy was asked %d questions, want 6", len(seen))
		}
		for _, text := range []string{"label.team:payments", "label.team:mine", `task:"ticket 17"`, "task:urgent"} {
			s, err := selector.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			plan, err := w.Plan(ctx, broker.Operator{Name: "op"}, s)
			if err != nil || plan.Chains != 1 {
				t.Errorf("Plan(%s) = %d chains, %v, want the chain: selectors select by claims and by envelopes", text, plan.Chains, err)
			}
			if len(plan.Tasks) == 1 && (plan.Tasks[0].SignedTask != "ticket 17" || plan.Tasks[0].Behalf != "ana") {
				t.Errorf("Plan(%s) shows %+v, want the statements of the envelope", text, plan.Tasks[0])
			}
		}
		if dump := w.dump(); strings.Contains(dump, token) || !strings.Contains(dump, `envelope \"j-1\" of https://desk.example, on behalf of \"ana\"`) {
			t.Errorf("the ledger has the token, or no entry that names the envelope:\n%s", dump)
		}
	})
}

func TestEnvelopeRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.policy.Envelopes = map[string]broker.Envelope{"late": {Expires: time.Now()}}
		for _, token := range []string{"late", "no such"} {
			_, err := w.Open(ctx, as("planner"), broker.OpenRequest{Task: "t", Rights: use("db.read"), Envelope: token})
			var refusal *broker.Error
			if !errors.As(err, &refusal) || refusal.Code != broker.CodeEnvelopeRefused || refusal.Kind != broker.Denied || strings.Contains(err.Error(), token) {
				t.Errorf("Open with %q = %v, want it refused without a part of the token", token, err)
			}
		}
		if !strings.Contains(w.dump(), string(broker.CodeEnvelopeRefused)) {
			t.Error("the audit has no entry of the refusals")
		}
	})
}
