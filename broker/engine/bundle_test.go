package engine_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// TestAdopt holds that the bundle in force survives restarts, and that each change is in the audit log with its actor
// and signers. A bundle does not come into force when the ledger cannot record it.
func TestAdopt(t *testing.T) {
	w := newWorld(t)
	bundle := func(name string, version int64, digest string) broker.Adoption {
		return broker.Adoption{Name: name, Version: version, Digest: digest, Signers: []string{"k1", "k2"}}
	}
	back := func(a broker.Adoption) broker.Adoption { a.Back, a.By = true, "ana"; return a }
	for _, row := range []struct {
		name  string
		a     broker.Adoption
		code  broker.Code // of the refusal; empty: it is adopted
		entry string      // actor and detail in the audit log, without the signers; empty: no entry
	}{
		{"the first", bundle("shop", 3, "c"), "", "pawl: shop version 3"},
		{"the same again", bundle("shop", 3, "c"), "", ""},
		{"newer", bundle("shop", 5, "e"), "", "pawl: shop version 5 follows shop version 3"},
		{"older", bundle("shop", 3, "c"), broker.CodePolicyOlder, ""},
		{"the same version with other content", bundle("shop", 5, "x"), broker.CodePolicyOlder, ""},
		{"the same version rolled back", back(bundle("shop", 5, "x")), broker.CodePolicyOlder, ""},
		{"another name", bundle("other", 9, "o"), broker.CodePolicyOlder, ""},
		{"older, rolled back", back(bundle("shop", 3, "c")), "",
			"ana: shop version 3 follows shop version 5, rolled back"},
		{"between the two", bundle("shop", 4, "d"), "", "pawl: shop version 4 follows shop version 3"},
		{"another name, rolled back", back(bundle("other", 1, "p")), "",
			"ana: other version 1 follows shop version 4, rolled back"},
	} {
		w.start(w.ledger) // another process
		before := len(w.recorded(broker.OpPolicy))
		err := w.Adopt(ctx, row.a)
		if row.code != "" {
			refused(t, row.name, err, broker.Conflict, row.code)
			var e *broker.Error
			if errors.As(err, &e); e.Remedy == "" {
				t.Errorf("%s: Adopt = %v, want a remedy", row.name, err)
			}
		} else if err != nil {
			t.Errorf("%s: Adopt = %v, want it adopted", row.name, err)
		}
		var got, want []string
		for _, e := range w.recorded(broker.OpPolicy)[before:] {
			got = append(got, e.Actor+": "+e.Detail+" "+e.Bundle)
		}
		if row.entry != "" {
			want = append(want, row.entry+"; signed by k1, k2 "+row.a.Digest)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: the audit log gets %q, want %q", row.name, got, want)
		}
	}
	w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault { return brokertest.NotCommitted })
	if err := w.Adopt(ctx, bundle("other", 2, "q")); !errors.Is(err, broker.Unavailable) {
		t.Errorf("Adopt while the ledger fails = %v, want Unavailable", err)
	}
}

// recorded returns the audit log's entries with an op, the oldest first.
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
