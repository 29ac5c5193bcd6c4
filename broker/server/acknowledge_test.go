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

func TestHeartbeatAndAcknowledge(t *testing.T) {
	const path = "/v1/delegations/" + string(delegationID)
	for _, row := range []struct {
		path, body string
		status     int
		asked      broker.RevocationID
	}{
		{"/heartbeat", `{}`, http.StatusOK, ""},
		{"/heartbeat", ``, http.StatusBadRequest, ""},
		{"/heartbeat", `{"revocation":"` + string(revocationID) + `"}`, http.StatusBadRequest, ""},
		{"/acknowledge", `{"revocation":"` + string(revocationID) + `"}`, http.StatusOK, revocationID},
		{"/acknowledge", `{}`, http.StatusBadRequest, ""},
		{"/acknowledge", `{"revocation":"rv1"}`, http.StatusBadRequest, ""},
		{"/acknowledge", `{"revocation":"` + string(grantID) + `"}`, http.StatusBadRequest, ""},
		{"/acknowledge", `{"grant":"` + string(grantID) + `"}`, http.StatusBadRequest, ""},
		{"/acknowledge", ``, http.StatusBadRequest, ""},
	} {
		r := newRig(t)
		w := r.ask("agents", "POST", path+row.path, row.body)
		asked, _ := r.fake.asked.([]string)
		ok := row.status == http.StatusOK
		if w.Code != row.status || ok && !slices.Equal(asked, []string{string(delegationID), string(row.asked)}) || !ok && asked != nil {
			t.Errorf("POST %s %s = %d and asked %q, want %d and %q", row.path, row.body, w.Code, asked, row.status, row.asked)
		}
	}
}

// TestAcknowledged checks that reading one revocation shows its acknowledgements.
func TestAcknowledged(t *testing.T) {
	rv := decoded[api.Revocation](t, newRig(t).ask("operators", "GET", "/v1/revocations/"+string(revocationID), ""))
	if a := rv.Acknowledged; a == nil || a.Agents != 2 || a.Done != 1 || len(a.Silent) != 1 || a.Silent[0] != (api.Silent{Delegation: string(delegationID), Holder: agentID.String()}) {
		t.Errorf("acknowledged = %+v, want 1 of 2, and the other one named", a)
	}
}

// TestWaiting checks that reading one revocation names the grants for which it waits.
func TestWaiting(t *testing.T) {
	rv := decoded[api.Revocation](t, newRig(t).ask("operators", "GET", "/v1/revocations/"+string(revocationID), ""))
	want := api.Awaited{Grant: string(grantID), Chain: string(chainID), Tool: "postgres", Backend: "db",
		Why: "ledger: a mint", Until: noon.UTC()}
	if w := rv.Waiting; w == nil || len(w.Grants) != 1 || w.Grants[0] != want {
		t.Errorf("waiting = %+v, want %+v", w, want)
	}
}

// TestAgentsAcknowledge checks that the SDK acknowledges a revocation for a root delegation, and that a silent holder
// of a child is named.
func TestAgentsAcknowledge(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	root, err := w.agent(t, "root").Open(ctx, agent.Chain{Task: "t", Depth: 1, Rights: []agent.Right{{Tool: "db", Use: true, Delegate: true}}})
	if err != nil {
		t.Fatal(err)
	}
	silent, err := root.Delegate(ctx, "spiffe://example.org/silent", agent.Share{Rights: []agent.Right{{Tool: "db", Use: true}}})
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
		if a := now.Acknowledged; a != nil && a.Done == 1 {
			if a.Agents != 2 || len(a.Silent) != 1 || a.Silent[0].Delegation != string(silent) {
				t.Errorf("acknowledged = %+v, want 1 of 2 and %s silent", a, silent)
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
