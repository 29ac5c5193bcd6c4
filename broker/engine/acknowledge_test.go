package engine_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// wantAcknowledgements fails the test unless exactly the named holders must acknowledge a revocation, and exactly those
// of done have.
func (w *world) wantAcknowledgements(rv broker.Revocation, d map[string]broker.Delegation, asked, done []string) {
	w.t.Helper()
	list, err := w.Acknowledgements(ctx, rv.ID)
	if err != nil {
		w.t.Fatal(err)
	}
	got := map[broker.DelegationID]broker.Acknowledgement{}
	for _, a := range list {
		got[a.Delegation] = a
	}
	if len(got) != len(asked) || len(list) != len(asked) {
		w.t.Errorf("%d holders must acknowledge %s (%+v), want %v", len(list), rv.Selector, list, asked)
	}
	for _, name := range asked {
		want := slices.Contains(done, name)
		a, ok := got[d[name].ID]
		if !ok || a.Holder != d[name].Holder || a.Chain != d[name].Chain || a.At.IsZero() == want {
			w.t.Errorf("the acknowledgement of %s = %+v (listed: %v), want it acknowledged: %v", name, a, ok, want)
		}
	}
}

// countEntries counts the audit log's entries with an op.
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

// TestAcknowledgements holds that the holders of the delegations that were open at the fence must acknowledge it. Each
// acknowledgement is recorded once, and the closure does not wait for them.
func TestAcknowledgements(t *testing.T) {
	for name, revoked := range map[string]func(map[string]broker.Delegation) string{
		"a subtree": func(d map[string]broker.Delegation) string { return "subtree:" + string(d["planner"].ID) },
		"a rule":    func(map[string]broker.Delegation) string { return "spiffe:spiffe://example.org/planner" },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				d := w.draw("root -> {planner -> {fetcher, writer, gone}, other}")
				w.revoke("subtree:%s", d["gone"].ID) // fenced before
				pass(time.Second)
				short, err := w.Delegate(ctx, as("planner"), broker.DelegateRequest{From: d["planner"].ID,
					To: as("late").ID, Rights: use("db.read"), TTL: time.Minute})
				if err != nil {
					t.Fatal(err)
				}
				pass(time.Until(short.Expires)) // expired before
				w.issue("writer", step(d["writer"], "db.read"))
				rv := w.revoke("%s", revoked(d))
				asked := []string{"planner", "fetcher", "writer"}
				w.wantAcknowledgements(rv, d, asked, nil)
				pass(time.Second)
				w.wantClosure(rv, broker.ClosureClosed)
				for range 2 {
					if err := w.Acknowledge(ctx, as("writer"), d["writer"].ID, rv.ID); err != nil {
						t.Fatalf("Acknowledge under a fence = %v, want nil", err)
					}
				}
				w.wantAcknowledgements(rv, d, asked, []string{"writer"})
				if n := w.countEntries(broker.OpAcknowledged); n != 1 {
					t.Errorf("%d entries for one acknowledgement, want 1", n)
				}
				w.Stop()
				w.start(w.ledger)
				if err := w.Acknowledge(ctx, as("planner"), d["planner"].ID, rv.ID); err != nil {
					t.Fatal(err)
				}
				w.wantAcknowledgements(rv, d, asked, []string{"writer", "planner"})
			})
		})
	}
}

// TestAcknowledgeRefuses holds that a holder acknowledges for no other holder. Nor can it acknowledge a revocation that
// does not cover its delegation.
func TestAcknowledgeRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.draw("root -> {one, two}")
		rv := w.revoke("subtree:%s", d["one"].ID)
		freeze, err := w.tryRevoke(true, "subtree:%s", d["two"].ID)
		if err != nil {
			t.Fatal(err)
		}
		const unknown broker.RevocationID = "rv000000000000000000000000"
		for name, row := range map[string]struct {
			caller, on string
			rv         broker.RevocationID
			kind       broker.Kind
			code       broker.Code
		}{
			"as another caller":          {"two", "one", rv.ID, broker.NotFound, broker.CodeDelegationUnknown},
			"another delegation's fence": {"two", "two", rv.ID, broker.NotFound, broker.CodeRevocationUnknown},
			"a freeze":                   {"two", "two", freeze.ID, broker.NotFound, broker.CodeRevocationUnknown},
			"an unknown revocation":      {"one", "one", unknown, broker.NotFound, broker.CodeRevocationUnknown},
			"by a heartbeat":             {"one", "one", "", broker.Revoked, broker.CodeFenced},
		} {
			err := w.Acknowledge(ctx, as(row.caller), d[row.on].ID, row.rv)
			if row.rv == "" {
				err = w.Heartbeat(ctx, as(row.caller), d[row.on].ID)
			}
			refused(t, "acknowledging "+name, err, row.kind, row.code)
		}
		if n := w.countEntries(broker.OpAcknowledged); n != 0 {
			t.Errorf("%d acknowledgements were recorded, want none", n)
		}
		w.wantAcknowledgements(rv, d, []string{"one"}, nil)
		w.wantAcknowledgements(freeze, d, nil, nil)
		if err := w.Heartbeat(ctx, as("root"), d["root"].ID); err != nil {
			t.Errorf("a heartbeat of the root = %v, want nil", err)
		}
		_, err = w.Acknowledgements(ctx, unknown)
		refused(t, "Acknowledgements of an unknown revocation", err, broker.NotFound, broker.CodeRevocationUnknown)
	})
}

// TestAcknowledgeOneOfTwo holds that a holder who acknowledges one revocation acknowledges every other revocation over
// its delegation.
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
