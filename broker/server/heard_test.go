package server_test

import (
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
)

func TestHeardRequest(t *testing.T) {
	const path = "/v1/delegations/" + string(delegationID) + "/heard"
	for _, row := range []struct {
		body   string
		status int
		asked  broker.RevocationID
	}{
		{`{}`, http.StatusOK, ""},
		{`{"revocation":"` + string(revocationID) + `"}`, http.StatusOK, revocationID},
		{`{"revocation":"rv1"}`, http.StatusBadRequest, ""},
		{`{"revocation":"` + string(grantID) + `"}`, http.StatusBadRequest, ""},
		{`{"grant":"` + string(grantID) + `"}`, http.StatusBadRequest, ""},
		{``, http.StatusBadRequest, ""},
	} {
		r := newRig(t)
		w := r.ask("agents", "POST", path, row.body)
		asked, _ := r.fake.asked.([]string)
		if w.Code != row.status || row.status == http.StatusOK && !slices.Equal(asked, []string{string(delegationID), string(row.asked)}) || row.status != http.StatusOK && asked != nil {
			t.Errorf("POST heard %s = %d and asked %q, want %d and %q", row.body, w.Code, asked, row.status, row.asked)
		}
	}
}

// TestAcknowledged: an operator who looks at one revocation sees who has heard of it.
func TestAcknowledged(t *testing.T) {
	rv := decoded[api.Revocation](t, newRig(t).ask("operators", "GET", "/v1/revocations/"+string(revocationID), ""))
	if a := rv.Acknowledged; a == nil || a.Agents != 2 || a.Heard != 1 || len(a.Silent) != 1 || a.Silent[0] != (api.Silent{Delegation: string(delegationID), Holder: agentID.String()}) {
		t.Errorf("acknowledged = %+v, want 1 of 2 and the other by name", a)
	}
}

// TestAgentsAcknowledge: the SDK says that it has heard, for a root and what was passed on, and
// whoever does not listen is named.
func TestAgentsAcknowledge(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	root, err := w.agent(t, "root").Open(ctx, agent.Chain{Task: "t", Depth: 1, Rights: []agent.Right{{Tool: "db", Use: true, Delegate: true}}})
	if err != nil {
		t.Fatal(err)
	}
	deaf, err := root.Delegate(ctx, "spiffe://example.org/deaf", agent.Share{Rights: []agent.Right{{Tool: "db", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := root.Begin(ctx, agent.Call{Tool: "db"}); err != nil {
		t.Fatal(err)
	}
	op := w.operator(t, "ann")
	rv, err := op.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + string(root.Info().Chain), Reason: "test"})
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.After(10 * time.Second)
	for {
		now, err := op.Revocation(ctx, rv.ID)
		if err != nil {
			t.Fatal(err)
		}
		if a := now.Acknowledged; a != nil && a.Heard == 1 {
			if a.Agents != 2 || len(a.Silent) != 1 || a.Silent[0].Delegation != string(deaf) {
				t.Errorf("acknowledged = %+v, want 1 of 2 and %s silent", a, deaf)
			}
			break
		}
		select {
		case <-time.After(time.Millisecond):
		case <-deadline:
			t.Fatalf("waited 10 s for the acknowledgement: %+v", now.Acknowledged)
		}
	}
}
