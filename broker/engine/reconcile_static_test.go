package engine_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// TestStaticSecretsOutliveTheirGrants holds that every revocation counts the static secrets that it covers as alive.
// It counts those of grants that were closed before, and each of several revocations counts the same secret.
func TestStaticSecretsOutliveTheirGrants(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{Rights: use("note", "db.read"), Depth: 1})
		child, err := w.Delegate(ctx, as("root"), broker.DelegateRequest{From: root.ID, To: as("child").ID,
			Rights: use("note")})
		if err != nil {
			t.Fatal(err)
		}
		closed := w.issue("root", step(root, "note"))
		if _, err := w.Close(ctx, as("root"), closed.Grant.ID); err != nil {
			t.Fatal(err)
		}
		w.issue("child", step(child, "note"))
		pass(2 * time.Minute) // both grants are closed now
		w.issue("root", step(root, "db.read"))
		w.issue("child", step(child, "note"))
		subtree := w.revoke("subtree:%s", child.ID)
		rule := w.revoke("tool:note")
		chain := w.revoke("chain:%s", root.Chain)
		pass(time.Minute)
		for _, row := range []struct {
			name         string
			rv           broker.Revocation
			dead, static int
		}{{"subtree", subtree, 0, 2}, {"rule", rule, 0, 3}, {"chain", chain, 1, 3}} {
			got := w.wantClosure(row.rv, broker.ClosurePartial)
			if got.Static != row.static || got.Alive != row.static || got.Dead != row.dead ||
				got.Grants != row.dead+row.static || got.Settled.IsZero() {
				t.Errorf("the revocation of the %s = %+v; want %d dead and %d static secrets to rotate",
					row.name, got, row.dead, row.static)
			}
		}
		pass(25 * time.Hour)
		if got := w.revoke("spiffe:spiffe://example.org/child"); got.Nothing {
			t.Errorf("a rule over an expired chain = %+v, want it to cover the static secrets that still work", got)
		}
	})
}
