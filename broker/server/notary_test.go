package server_test

import (
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/server"
)

// TestNoSigningKey checks that a report without a signing key is refused, with a problem that an operator can act on.
func TestNoSigningKey(t *testing.T) {
	r := newRig(t, func(c *server.Config) { c.Notary = nil })
	for _, path := range []string{"/v1/revocations/" + string(revocationID) + "/report", "/v1/audit/checkpoint"} {
		p := problem(t, r.ask("operators", "GET", path, ""))
		if p.Code != api.CodeNoSigningKey || p.Status != http.StatusServiceUnavailable || p.Retryable {
			t.Errorf("%s without a key = %+v, want no_signing_key, not retryable", path, p)
		}
	}
}

// TestSecurityEvents checks that the endpoint exists only if configured, and reads no more than its limit.
func TestSecurityEvents(t *testing.T) {
	read := -1
	r := newRig(t, func(c *server.Config) {
		c.Signals = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			body, err := io.ReadAll(req.Body)
			if read = len(body); err != nil {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			w.WriteHeader(http.StatusAccepted)
		})
	})
	const path = "/v1/security-events"
	if w := r.ask("agents", "POST", path, strings.Repeat("x", api.MaxSecurityEvent), "Test-Identity: "); w.Code != http.StatusAccepted || read != api.MaxSecurityEvent {
		t.Errorf("a token of the maximum size = %d with %d bytes read, want 202 and all of them", w.Code, read)
	}
	read = -1
	if w := r.ask("agents", "POST", path, strings.Repeat("x", api.MaxSecurityEvent+1)); w.Code != http.StatusRequestEntityTooLarge || read != -1 {
		t.Errorf("a larger token = %d with %d bytes read, want 413 and none", w.Code, read)
	}
	without := newRig(t, func(c *server.Config) { c.Signals = nil })
	if w := without.ask("agents", "POST", path, "x"); w.Code != http.StatusNotFound {
		t.Errorf("without transmitters = %d, want 404", w.Code)
	}
}

func TestIntrospect(t *testing.T) {
	r := newRig(t)
	const path = "/v1/introspect"
	form := "Content-Type: " + api.FormType
	for _, row := range []struct {
		name, body string
		headers    []string
		status     int
		prefix     string
	}{
		{"a good token", "token=good&token_type_hint=access_token", []string{form}, 200, `{"active":true,`},
		{"another", "token=bad", []string{form}, 200, `{"active":false}`},
		{"the check fails", "token=down", []string{form}, 503, ""},
		{"no identity", "token=good", []string{form, "Test-Identity: "}, 401, ""},
		{"no token", "", []string{form}, 400, ""},
		{"two tokens", "token=good&token=bad", []string{form}, 400, ""},
		{"not a form", `{"token":"good"}`, nil, 415, ""},
		{"too long", "token=" + strings.Repeat("x", api.MaxBody), []string{form}, 413, ""},
	} {
		w := r.ask("agents", "POST", path, row.body, row.headers...)
		if w.Code != row.status || !strings.HasPrefix(w.Body.String(), row.prefix) {
			t.Errorf("%s = %d %s, want %d %s", row.name, w.Code, w.Body, row.status, row.prefix)
		}
	}
	if want := []string{agentID.String() + " bad", agentID.String() + " down"}; !slices.Equal(r.fake.presented, want) {
		t.Errorf("Present received %q, want the tokens of authenticated callers that are not known to be active: %q", r.fake.presented, want)
	}
	without := newRig(t, func(c *server.Config) { c.Introspect = nil })
	if w := without.ask("agents", "POST", path, "token=good", form); w.Code != 404 {
		t.Errorf("without jwt backends = %d, want 404", w.Code)
	}
}

func TestStatusList(t *testing.T) {
	r := newRig(t)
	w := r.ask("agents", "GET", "/v1/status-lists/tokens", "", "Test-Identity: ")
	if w.Code != 200 || w.Body.String() != "a.signed.list" || w.Header().Get("Content-Type") != api.StatusListType || w.Header().Get("Cache-Control") != "no-store" {
		t.Errorf("GET = %d %s of type %q, want the list with no-store", w.Code, w.Body, w.Header().Get("Content-Type"))
	}
	if w := r.ask("agents", "GET", "/v1/status-lists/other", ""); w.Code != 404 {
		t.Errorf("of a backend without a list = %d, want 404", w.Code)
	}
	without := newRig(t, func(c *server.Config) { c.StatusList = nil })
	if w := without.ask("agents", "GET", "/v1/status-lists/tokens", ""); w.Code != 404 {
		t.Errorf("without lists = %d, want 404", w.Code)
	}
}
