package engine_test

import (
	"errors"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// TestAdopt: what was in force last is remembered over restarts, each change and who stands for it is
// in the audit, and nothing comes into force that cannot be recorded.
func TestAdopt(t *testing.T) {
	w := newWorld(t)
	bundle := func(name string, version int64, digest string) broker.Adoption {
		return broker.Adoption{Name: name, Version: version, Digest: digest, Signers: []string{"k1", "k2"}}
	}
	back := func(a broker.Adoption) broker.Adoption { a.Back, a.By = true, "ana"; return a }
	for _, row := range []struct {
		what string
		a    broker.Adoption
		code broker.Code // of the refusal
		says string      // what the audit has; empty: no entry
	}{
		{"the first", bundle("shop", 3, "c"), "", "pawl: shop version 3; signed by k1, k2"},
		{"the same again", bundle("shop", 3, "c"), "", ""},
		{"newer", bundle("shop", 5, "e"), "", "pawl: shop version 5 follows shop version 3; signed by k1, k2"},
		{"older", bundle("shop", 3, "c"), broker.CodePolicyOlder, ""},
		{"the version with other content", bundle("shop", 5, "x"), broker.CodePolicyOlder, ""},
		{"the same, as a rollback", back(bundle("shop", 5, "x")), broker.CodePolicyOlder, ""},
		{"another name", bundle("other", 9, "o"), broker.CodePolicyOlder, ""},
		{"older, as a rollback", back(bundle("shop", 3, "c")), "", "ana: shop version 3 follows shop version 5, rolled back; signed by k1, k2"},
		{"between the two", bundle("shop", 4, "d"), "", "pawl: shop version 4 follows shop version 3; signed by k1, k2"},
		{"another name, as a rollback", back(bundle("other", 1, "p")), "", "ana: other version 1 follows shop version 4, rolled back; signed by k1, k2"},
	} {
		w.start(w.ledger) // another process
		before := len(w.recorded(broker.OpPolicy))
		err := w.Adopt(ctx, row.a)
		var e *broker.Error
		if (err != nil) != (row.code != "") || err != nil && (!errors.As(err, &e) || e.Code != row.code || e.Kind != broker.Conflict || e.Remedy == "") {
			t.Errorf("%s: Adopt = %v, want code %q", row.what, err, row.code)
		}
		added := w.recorded(broker.OpPolicy)[before:]
		if row.says == "" && len(added) > 0 || row.says != "" && (len(added) != 1 || added[0].Actor+": "+added[0].Detail != row.says || added[0].Bundle != row.a.Digest) {
			t.Errorf("%s: the audit gets %+v, want %q", row.what, added, row.says)
		}
	}
	w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault { return brokertest.NotCommitted })
	if err := w.Adopt(ctx, bundle("other", 2, "q")); !errors.Is(err, broker.Unavailable) {
		t.Errorf("Adopt without a ledger = %v, want unavailable", err)
	}
}

// recorded are the entries with an op, oldest first.
func (w *world) recorded(op broker.Op) (found []broker.Entry) {
	w.t.Helper()
	entries, err := w.ledger.Entries(ctx, 0, 1000)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		if e.Op == op {
			found = append(found, e)
		}
	}
	return found
}
