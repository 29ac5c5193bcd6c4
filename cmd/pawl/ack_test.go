package main

import (
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker/api"
)

func TestAckLine(t *testing.T) {
	silent := make([]api.Silent, 7)
	for i := range silent {
		silent[i] = api.Silent{Delegation: "dl" + string(rune('a'+i)), Holder: "spiffe://example.org/x"}
	}
	for _, row := range []struct {
		a    api.Acknowledged
		want string
	}{
		{api.Acknowledged{Agents: 3, Done: 3}, "3 of 3 agents acknowledged"},
		{api.Acknowledged{Agents: 3, Done: 2, Silent: silent[:1]},
			"2 of 3 agents acknowledged; not yet: spiffe://example.org/x (dla)"},
		{api.Acknowledged{Agents: 70, Silent: silent}, "(dld), spiffe://example.org/x (dle), and 65 more"},
	} {
		if got := ackLine(&row.a); !strings.HasSuffix(got, row.want) {
			t.Errorf("ackLine(%+v) = %q, want %q at its end", row.a, got, row.want)
		}
	}
}

// TestLeasesAreNotAlive holds that the line of a revocation names the leases that Vault has still to remove beside its
// closure, and counts none of them as alive or unknown.
func TestLeasesAreNotAlive(t *testing.T) {
	r := api.Revocation{Closure: "CLOSED", Grants: 7, Dead: 7, Leases: 3}
	const want = "CLOSED: 7 of 7 dead, 0 alive, 0 unknown; leases still being removed: 3"
	if got := revocationLine(r); !strings.HasSuffix(got, want) {
		t.Errorf("revocationLine(%+v) = %q, want %q at its end", r, got, want)
	}
	if r.Leases = 0; strings.Contains(revocationLine(r), "leases") {
		t.Errorf("revocationLine(%+v) = %q, want no word about leases", r, revocationLine(r))
	}
}
