package engine_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// heard fails unless exactly the named holders were to hear of a revocation, those of said with a time.
func (w *world) wantAcknowledgements(rv broker.Revocation, d map[string]broker.Delegation, toHear, said []string) {
	w.t.Helper()
	list, err := w.Acknowledgements(ctx, rv.ID)
	if err != nil {
		w.t.Fatal(err)
	}
	got := map[broker.DelegationID]broker.Acknowledgement{}
	for _, a := range list {
		got[a.Delegation] = a
	}
	if len(got) != len(toHear) || len(list) != len(toHear) {
		w.t.Errorf("%d were to hear of %s (%+v), want %v", len(list), rv.Selector, list, toHear)
	}
	want := map[string]bool{}
	for _, name := range said {
		want[name] = true
	}
	for _, name := range toHear {
		if a, ok := got[d[name].ID]; !ok || a.Holder != d[name].Holder || a.Chain != d[name].Chain || a.At.IsZero() == want[name] {
			w.t.Errorf("%s stands as %+v (%v), want acknowledged: %v", name, a, ok, want[name])
		}
	}
}

func (w *world) countEntries(op broker.Op) (n int) {
	w.t.Helper()
	all, err := w.Entries(ctx, 0, 10000)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range all {
		if e.Op == op {
			n++
		}
	}
	return n
}

// TestAcknowledgements: holders of what was open when it was fenced are to hear, each is recorded
// once, and the closure does not wait for them.
func TestAcknowledgements(t *testing.T) {
	for name, what := range map[string]func(map[string]broker.Delegation) string{
		"a subtree": func(d map[string]broker.Delegation) string { return "subtree:" + string(d["planner"].ID) },
		"a rule":    func(map[string]broker.Delegation) string { return "spiffe:spiffe://example.org/planner" },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				d := w.draw("root -> {planner -> {fetcher, writer, gone}, other}")
				w.revoke("subtree:%s", d["gone"].ID) // was over before
				pass(time.Second)
				short, err := w.Delegate(ctx, as("planner"), broker.DelegateRequest{From: d["planner"].ID, To: as("late").ID,
					Rights: use("db.read"), TTL: time.Minute})
				if err != nil {
					t.Fatal(err)
				}
				pass(time.Until(short.Expires))
				w.issue("writer", step(d["writer"], "db.read"))
				rv := w.revoke("%s", what(d))
				toHear := []string{"planner", "fetcher", "writer"}
				w.wantAcknowledgements(rv, d, toHear, nil)
				pass(time.Second)
				w.wantClosure(rv, broker.ClosureClosed)
				for range 2 {
					if err := w.Acknowledge(ctx, as("writer"), d["writer"].ID, rv.ID); err != nil {
						t.Fatalf("Heard under a fence = %v, want nil", err)
					}
				}
				w.wantAcknowledgements(rv, d, toHear, []string{"writer"})
				if n := w.countEntries(broker.OpAcknowledged); n != 1 {
					t.Errorf("%d entries for one acknowledgement, want 1", n)
				}
				w.Stop()
				w.start(w.ledger)
				if err := w.Acknowledge(ctx, as("planner"), d["planner"].ID, rv.ID); err != nil {
					t.Fatal(err)
				}
				w.wantAcknowledgements(rv, d, toHear, []string{"writer", "planner"})
			})
		})
	}
}

// TestAcknowledgeRefuses: nobody acknowledges for another, nor what does not concern it.
func TestAcknowledgeRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.draw("root -> {one, two}")
		rv := w.revoke("subtree:%s", d["one"].ID)
		frozen, err := w.Revoke(ctx, responder, selector.Request{Selector: selecting(t, "subtree:%s", d["two"].ID), Reason: "a look", Freeze: true})
		if err != nil {
			t.Fatal(err)
		}
		for what, row := range map[string]struct {
			who  string
			on   string
			rv   broker.RevocationID
			kind broker.Kind
			code broker.Code
		}{
			"by another":        {"two", "one", rv.ID, broker.NotFound, broker.CodeDelegationUnknown},
			"of another's":      {"two", "two", rv.ID, broker.NotFound, broker.CodeRevocationUnknown},
			"of a freeze":       {"two", "two", frozen.ID, broker.NotFound, broker.CodeRevocationUnknown},
			"of nothing":        {"one", "one", "rv000000000000000000000000", broker.NotFound, broker.CodeRevocationUnknown},
			"a heartbeat of it": {"one", "one", "", broker.Revoked, broker.CodeFenced},
		} {
			err := w.Acknowledge(ctx, as(row.who), d[row.on].ID, row.rv)
			if row.rv == "" {
				err = w.Heartbeat(ctx, as(row.who), d[row.on].ID)
			}
			refused(t, "an acknowledgement "+what, err, row.kind, row.code)
		}
		if n := w.countEntries(broker.OpAcknowledged); n != 0 {
			t.Errorf("%d acknowledgements were recorded, want none", n)
		}
		w.wantAcknowledgements(rv, d, []string{"one"}, nil)
		w.wantAcknowledgements(frozen, d, nil, nil)
		if err := w.Heartbeat(ctx, as("root"), d["root"].ID); err != nil {
			t.Errorf("a sign of life of the root = %v, want nil", err)
		}
		_, err = w.Acknowledgements(ctx, "rv000000000000000000000000")
		refused(t, "Acknowledgements of nothing", err, broker.NotFound, broker.CodeRevocationUnknown)
	})
}

// TestAcknowledgeOneOfTwo: whoever stopped for one revocation stopped for the other over it, too.
func TestAcknowledgeOneOfTwo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.draw("root -> sub")
		first, second := w.revoke("subtree:%s", d["sub"].ID), w.revoke("chain:%s", d["root"].Chain)
		w.wantAcknowledgements(first, d, []string{"sub"}, nil)
		w.wantAcknowledgements(second, d, []string{"root"}, nil)
		if err := w.Acknowledge(ctx, as("sub"), d["sub"].ID, second.ID); err != nil {
			t.Fatal(err)
		}
		w.wantAcknowledgements(first, d, []string{"sub"}, []string{"sub"})
	})
}
