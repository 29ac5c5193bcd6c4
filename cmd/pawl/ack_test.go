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
