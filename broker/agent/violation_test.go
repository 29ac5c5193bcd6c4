package agent_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
)

// TestReport: a report has the delegation and the step, and its answer the consequence.
func TestReport(t *testing.T) {
	full := agent.Violation{Code: "odd", Delegation: child, Grant: agent.GrantID(grant(1)), Detail: "seen in a page"}
	revoke := api.Reported{Consequence: "revoke-chain", Revocation: revocation}
	for _, row := range []struct {
		violation agent.Violation
		body      string // of the request
		status    int
		answer    any
		want      agent.Reported
		kind      error
	}{
		{full, `{"delegation":"` + child + `","grant":"` + grant(1) + `","violation":"odd","detail":"seen in a page"}`,
			200, revoke, agent.Reported{Consequence: "revoke-chain", Revocation: revocation}, nil},
		{agent.Violation{Code: "odd", Delegation: root}, `{"delegation":"` + root + `","violation":"odd"}`,
			200, api.Reported{Consequence: "deny"}, agent.Reported{Consequence: "deny"}, nil},
		{full, "", 200, api.Reported{Revocation: "rv1"}, agent.Reported{}, agent.ErrUnavailable},
		{full, "", 404, api.NewProblem(api.KindNotFound, "", ""), agent.Reported{}, agent.ErrNotFound},
	} {
		var path, body string
		h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			raw, _ := io.ReadAll(r.Body) // the test compares it
			path, body = r.URL.Path, string(raw)
			reply(w, row.status, row.answer)
		}))
		c, err := agent.New(agent.Config{Address: h.URL, HTTPClient: h.Client()})
		if err != nil {
			t.Fatal(err)
		}
		got, err := c.Report(t.Context(), row.violation)
		if got != row.want || !errors.Is(err, row.kind) || row.kind == nil && err != nil {
			t.Errorf("Report(%+v) = %+v, %v, want %+v, %v", row.violation, got, err, row.want, row.kind)
		}
		if path != "/v1/violations" || row.body != "" && body != row.body {
			t.Errorf("Report(%+v) sent %s to %s, want %s", row.violation, body, path, row.body)
		}
		_ = c.Close() // nil for a client that New made
		h.Close()
	}
}
