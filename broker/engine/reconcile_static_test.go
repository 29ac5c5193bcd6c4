package engine_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// TestStaticSecretsOutliveTheirGrants: what can only be rotated counts as alive in every revocation that covers
// it, whether its grant was over before, and however many cover it.
func TestStaticSecretsOutliveTheirGrants(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{Rights: use("note", "db.read"), Depth: 1})
		child, err := w.Delegate(ctx, as("root"), broker.DelegateRequest{From: root.ID, To: as("child").ID, Rights: use("note")})
		if err != nil {
			t.Fatal(err)
		}
		closed := w.issue("root", step(root, "note"))
		if _, err := w.Close(ctx, as("root"), closed.Grant.ID); err != nil {
			t.Fatal(err)
		}
		w.issue("child", step(child, "note"))
		pass(2 * time.Minute) // both are over now
		w.issue("root", step(root, "db.read"))
		w.issue("child", step(child, "note"))
		subtree, rule, chain := w.revoke("subtree:%s", child.ID), w.revoke("tool:note"), w.revoke("chain:%s", root.Chain)
		check := func(when string) {
			t.Helper()
			for _, row := range []struct {
				name         string
				rv           broker.Revocation
				dead, static int
			}{{"subtree", subtree, 0, 2}, {"rule", rule, 0, 3}, {"chain", chain, 1, 3}} {
				got := w.wantClosure(row.rv, broker.ClosurePartial)
				if got.Static != row.static || got.Alive != row.static || got.Dead != row.dead || got.Grants != row.dead+row.static || got.Settled.IsZero() {
					t.Errorf("%s, %s: %+v; want %d dead and %d to be rotated", when, row.name, got, row.dead, row.static)
				}
			}
		}
		pass(time.Minute)
		check("pursued")
		pass(25 * time.Hour)
		if got := w.revoke("spiffe:spiffe://example.org/child"); got.Nothing {
			t.Errorf("a rule over a chain that is over = %+v, want it about the secrets that work on", got)
		}
	})
}
