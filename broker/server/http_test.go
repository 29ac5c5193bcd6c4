package server_test

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/broker/server"
)

const steps = "/v1/delegations/" + string(delegationID) + "/steps"

// TestBadRequests lists bad requests with the answer to each.
func TestBadRequests(t *testing.T) {
	long := strings.Repeat("x", api.MaxBody)
	for name, row := range map[string]struct {
		listener, method, path, body, header string
		status                               int
		code                                 api.Code
		detail                               string
	}{
		"too big":            {"agents", "POST", steps, `{"tool":"` + long + `"}`, "", 413, "too_large", ""},
		"nested":             {"agents", "POST", steps, `{"args":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`, "", 400, "malformed", "nested more than 32 deep"},
		"duplicated":         {"agents", "POST", steps, `{"tool":"a","tool":"b"}`, "", 400, "malformed", `"/tool" is given twice`},
		"misspelt in case":   {"agents", "POST", steps, `{"Tool":"a"}`, "", 400, "malformed", `unknown member "/Tool"`},
		"followed by more":   {"agents", "POST", steps, `{"tool":"a"}{"tool":"b"}`, "", 400, "malformed", "trailing data"},
		"null":               {"agents", "POST", steps, `null`, "", 400, "malformed", "must be a JSON object"},
		"unknown member":     {"agents", "POST", steps, `{"tool":"a","agent":"b"}`, "", 400, "malformed", `unknown member "/agent"`},
		"empty body":         {"agents", "POST", steps, ``, "", 400, "malformed", "the body is empty"},
		"form":               {"agents", "POST", steps, `tool=a`, "Content-Type: application/x-www-form-urlencoded", 415, "media_type", ""},
		"with a charset":     {"agents", "POST", steps, `{"tool":"a"}`, "Content-Type: application/json; charset=utf-8", 415, "media_type", ""},
		"no type":            {"agents", "POST", steps, `{"tool":"a"}`, "Content-Type: ", 415, "media_type", ""},
		"body on a GET":      {"agents", "GET", "/v1/delegations/" + string(delegationID), `{}`, "", 400, "malformed", "takes no body"},
		"tool upper case":    {"agents", "POST", steps, `{"tool":"Postgres"}`, "", 400, "malformed", "tool name"},
		"tool with a path":   {"agents", "POST", steps, `{"tool":"a/../b"}`, "", 400, "malformed", "tool name"},
		"args no object":     {"agents", "POST", steps, `{"tool":"a","args":[]}`, "", 400, "malformed", "must be a JSON object"},
		"args nested":        {"agents", "POST", steps, `{"tool":"a","args":{"x":{"y":"z"}}}`, "", 400, "malformed", "argument"},
		"args fraction":      {"agents", "POST", steps, `{"tool":"a","args":{"x":1.0}}`, "", 400, "malformed", "argument"},
		"empty key":          {"agents", "POST", steps, `{"tool":"a"}`, "Idempotency-Key: (empty)", 400, "malformed", "Idempotency-Key"},
		"negative ttl":       {"agents", "POST", steps, `{"tool":"a","ttl_seconds":-1}`, "", 400, "malformed", "ttl_seconds"},
		"ttl that overflows": {"agents", "POST", steps, `{"tool":"a","ttl_seconds":9223372036854775807}`, "", 400, "malformed", "ttl_seconds"},
		"malformed id":       {"agents", "POST", "/v1/delegations/dl1/steps", `{"tool":"a"}`, "", 400, "malformed", "delegation id"},
		"id of a grant":      {"agents", "GET", "/v1/delegations/" + string(grantID), ``, "", 400, "malformed", "delegation id"},
		"id in upper case":   {"agents", "GET", "/v1/delegations/DL0123456789ABCDEFGHJKMNPQ", ``, "", 400, "malformed", "delegation id"},
		"escaped slash":      {"agents", "GET", "/v1/delegations/x%2f..", ``, "", 404, "no_such_endpoint", ""},
		"dots":               {"agents", "GET", "/v1/../healthz", ``, "", 404, "no_such_endpoint", ""},
		"double slash":       {"agents", "GET", "/v1//openapi.json", ``, "", 404, "no_such_endpoint", ""},
		"trailing slash":     {"agents", "POST", "/v1/chains/", `{}`, "", 404, "no_such_endpoint", ""},
		"unknown path":       {"agents", "GET", "/v2/chains?x=y", ``, "", 404, "no_such_endpoint", ""},
		"wrong method":       {"agents", "DELETE", "/v1/chains", ``, "", 405, "method_not_allowed", ""},
		"HEAD":               {"agents", "HEAD", "/v1/delegations/" + string(delegationID) + "/events", ``, "", 405, "method_not_allowed", ""},
		"unknown parameter":  {"operators", "GET", "/v1/audit?limt=5", ``, "", 400, "malformed", `query parameter "limt"`},
		"parameter twice":    {"operators", "GET", "/v1/audit?limit=5&limit=6", ``, "", 400, "malformed", "twice"},
		"broken query":       {"operators", "GET", "/v1/audit?limit=%zz", ``, "", 400, "malformed", "query"},
		"limit 0":            {"operators", "GET", "/v1/audit?limit=0", ``, "", 400, "malformed", "1 to 1000"},
		"limit 1001":         {"operators", "GET", "/v1/audit?limit=1001", ``, "", 400, "malformed", "1 to 1000"},
		"negative after":     {"operators", "GET", "/v1/audit?after=-1", ``, "", 400, "malformed", "after"},
		"invalid all":        {"operators", "GET", "/v1/chains?all=yes", ``, "", 400, "malformed", "true or false"},
		"foreign receiver":   {"agents", "POST", "/v1/delegations/" + string(delegationID) + "/delegate", `{"to":"https://example.org/a","rights":[]}`, "", 400, "malformed", "SPIFFE ID"},
		"long receiver":      {"agents", "POST", "/v1/delegations/" + string(delegationID) + "/delegate", `{"to":"spiffe://example.org/` + strings.Repeat("a", 2028) + `","rights":[]}`, "", 400, "malformed", "2048"},
		"bad constraint":     {"agents", "POST", "/v1/chains", `{"task":"t","rights":[{"tool":"a","use":true,"args":{"x":7}}]}`, "", 400, "malformed", `argument "x"`},
		"grant in a report":  {"agents", "POST", "/v1/violations", `{"delegation":"` + string(delegationID) + `","violation":"canary","grant":"gr1"}`, "", 400, "malformed", "grant id"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			w := r.ask(row.listener, row.method, row.path, row.body, nonEmpty(row.header)...)
			if row.method == "HEAD" {
				if w.Code != row.status {
					t.Errorf("HEAD = %d, want %d", w.Code, row.status)
				}
				return
			}
			p := problem(t, w)
			if w.Code != row.status || p.Code != row.code || !strings.Contains(p.Detail, row.detail) {
				t.Errorf("%s %s = %d %s %q, want %d %s …%q…", row.method, row.path, w.Code, p.Code, p.Detail, row.status, row.code, row.detail)
			}
			if r.fake.asked != nil {
				t.Errorf("the broker was asked %v", r.fake.asked)
			}
		})
	}
}

func nonEmpty(s string) []string {
	if s == "" {
		return nil
	}
	return []string{s}
}

// TestUndeclaredLength checks that a body without a declared length is also limited.
func TestUndeclaredLength(t *testing.T) {
	for size, want := range map[int]api.Code{api.MaxBody: "malformed", api.MaxBody + 1: "too_large"} {
		r := newRig(t)
		req := httptest.NewRequest("POST", steps, struct{ *strings.Reader }{strings.NewReader(strings.Repeat(" ", size))})
		req.ContentLength = -1
		req.Header.Set("Test-Identity", "yes")
		req.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		r.Agents().ServeHTTP(w, req)
		if p := problem(t, w); p.Code != want {
			t.Errorf("a body of %d bytes = %s, want %s", size, p.Code, want)
		}
	}
}

// TestErrors checks that each kind of broker error has its status, and that internal text is not sent.
func TestErrors(t *testing.T) {
	inside := errors.New("inside-marker")
	for name, row := range map[string]struct {
		err    error
		status int
		code   api.Code
		kind   api.Kind
		retry  string
	}{
		"malformed":       {broker.Errorf(broker.Malformed, "op", "shown").Because(inside), 400, "malformed", api.KindMalformed, ""},
		"unauthenticated": {broker.Errorf(broker.Unauthenticated, "op", "shown").With(broker.CodeExpired).Because(inside), 401, "expired", api.KindUnauthenticated, ""},
		"denied":          {broker.Errorf(broker.Denied, "op", "shown").With(broker.CodePolicyDenied).Because(inside), 403, "policy_denied", api.KindDenied, ""},
		"too fast":        {broker.Errorf(broker.Denied, "op", "shown").With(broker.CodeTooFast).After(1500 * time.Millisecond), 429, "too_fast", api.KindDenied, "2"},
		"not found":       {broker.Errorf(broker.NotFound, "op", "shown").With(broker.CodeGrantUnknown).Because(inside), 404, "grant_unknown", api.KindNotFound, ""},
		"no code":         {broker.Errorf(broker.NotFound, "op", "shown"), 404, "not_found", api.KindNotFound, ""},
		"revoked":         {broker.Errorf(broker.Revoked, "op", "shown").With(broker.CodeFenced), 409, "fenced", api.KindRevoked, ""},
		"expired":         {broker.Errorf(broker.Expired, "op", "shown").With(broker.CodeExpired), 410, "expired", api.KindExpired, ""},
		"conflict":        {broker.Errorf(broker.Conflict, "op", "shown").With(broker.CodeKeyOtherTool), 409, "key_other_tool", api.KindConflict, ""},
		"unavailable":     {broker.Errorf(broker.Unavailable, "op", "shown").With(broker.CodeVaultDown).After(time.Second).Because(inside), 503, "vault_unavailable", api.KindUnavailable, "1"},
		"wrapped":         {fmt.Errorf("inside-marker: %w", broker.Errorf(broker.Denied, "op", "shown")), 403, "denied", api.KindDenied, ""},
		"internal":        {broker.Errorf(broker.Internal, "op", "inside-marker").With(broker.CodeFenced).Because(inside), 500, "internal", api.KindInternal, ""},
		"no kind":         {inside, 500, "internal", api.KindInternal, ""},
		"unknown kind":    {broker.Errorf(broker.Kind(200), "op", "inside-marker"), 500, "internal", api.KindInternal, ""},
		"timed out":       {fmt.Errorf("inside-marker: %w", context.DeadlineExceeded), 503, "unavailable", api.KindUnavailable, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.fake.err = row.err
			w := r.ask("agents", "POST", steps, `{"tool":"postgres"}`)
			p := problem(t, w)
			if w.Code != row.status || p.Code != row.code || p.Kind != row.kind || w.Header().Get("Retry-After") != row.retry {
				t.Errorf("%v = %d %s %s Retry-After %q, want %+v", row.err, w.Code, p.Code, p.Kind, w.Header().Get("Retry-After"), row)
			}
			if strings.Contains(w.Body.String(), "inside-marker") {
				t.Errorf("%v: the answer %s has internal text", row.err, w.Body)
			}
			if !strings.Contains(r.log.String(), p.Request) {
				t.Errorf("the log does not name request %s", p.Request)
			}
		})
	}
}

func TestErrorDetails(t *testing.T) {
	r := newRig(t)
	e := broker.Errorf(broker.Denied, "issue", "no").With(broker.CodeViolation).Decided([]string{"p1"}).Lacks("ask", "tool:deploy")
	e.Revocation = revocationID
	r.fake.err = e
	p := problem(t, r.ask("agents", "POST", steps, `{"tool":"postgres"}`))
	p.Request = ""
	want := api.Problem{Type: api.Problems + "violation", Title: "Policy forbids it, with a consequence", Status: 403, Detail: "no",
		Code: "violation", Kind: "denied", Policies: []string{"p1"}, Missing: []string{"tool:deploy"}, Remedy: "ask", Revocation: string(revocationID)}
	if !reflect.DeepEqual(p, want) {
		t.Errorf("problem = %+v, want %+v", p, want)
	}
}

// TestCodes checks that every code of the broker is explained to agents.
func TestCodes(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "../errors.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(spec.Names[0].Name, "Code") {
			return true
		}
		code, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		found++
		if _, ok := api.ReasonFor(api.Code(code)); !ok {
			t.Errorf("api.Reasons() does not have the broker's code %q", code)
		}
		return true
	})
	if found < 20 {
		t.Errorf("found %d codes in ../errors.go, want all of them", found)
	}
}

func TestStep(t *testing.T) {
	r := newRig(t)
	w := r.ask("agents", "POST", steps, `{"tool":"postgres","args":{"table":"orders"},"purpose":"reading","ttl_seconds":30}`, "Idempotency-Key: k1")
	issued := decoded[api.Issued](t, w)
	if w.Code != http.StatusCreated || string(issued.Secret) != `{"password":"`+marker+`"}` || issued.Repeated {
		t.Errorf("step = %d, want 201 with the secret", w.Code)
	}
	if got := w.Header().Get("Cache-Control"); got != "no-store" {
		t.Errorf("Cache-Control = %q, want no-store", got)
	}
	if want := noon.Add(30 * time.Second); !issued.Grant.Expires.Equal(want) || issued.Grant.Expires.Location() != time.UTC {
		t.Errorf("grant expires %v, want %v in UTC: the end of the lease, which is earlier", issued.Grant.Expires, want)
	}
	args, _ := args.Parse([]byte(`{"table":"orders"}`))
	want := broker.StepRequest{Delegation: delegationID, Tool: "postgres", Args: args, Purpose: "reading", Key: "k1", TTL: 30 * time.Second}
	if !reflect.DeepEqual(r.fake.asked, want) {
		t.Errorf("the broker was asked %+v, want %+v", r.fake.asked, want)
	}
	if strings.Trim(string(r.fake.secret), "\x00") != "" {
		t.Error("the secret was not wiped after it was sent")
	}
	if strings.Contains(r.log.String(), marker) || strings.Contains(r.log.String(), "orders") {
		t.Error("the log has the secret or the body")
	}
	for _, part := range []string{`"caller":"spiffe://example.org/agent"`, string(chainID), string(grantID), `"tool":"postgres"`, `"policies":["p1"]`, `"decision":"allow"`, `"took":`} {
		if !strings.Contains(r.log.String(), part) {
			t.Errorf("the log %s lacks %s", r.log, part)
		}
	}
	for _, hidden := range []string{"accessor-marker", "database/creds/x"} {
		if strings.Contains(w.Body.String(), hidden) {
			t.Errorf("the agent's answer has %q", hidden)
		}
	}
}

func TestRepeatedStep(t *testing.T) {
	r := newRig(t)
	r.fake.repeated = true
	w := r.ask("agents", "POST", steps, `{"tool":"postgres"}`, "Idempotency-Key: k1")
	if issued := decoded[api.Issued](t, w); w.Code != http.StatusOK || issued.Secret != nil || !issued.Repeated {
		t.Errorf("repeated step = %d %s, want 200 without a secret", w.Code, w.Body)
	}
}

// TestUndelivered checks that the grant of an undelivered secret is closed.
func TestUndelivered(t *testing.T) {
	t.Run("the client disconnects", func(t *testing.T) {
		r := newRig(t)
		ctx, cancel := context.WithCancel(t.Context())
		r.fake.onIssue = cancel
		req := httptest.NewRequestWithContext(ctx, "POST", steps, strings.NewReader(`{"tool":"postgres"}`))
		req.Header.Set("Test-Identity", "yes")
		req.Header.Set("Content-Type", "application/json")
		r.Agents().ServeHTTP(httptest.NewRecorder(), req)
		wantClosed(t, r)
	})
	t.Run("the secret is not JSON", func(t *testing.T) {
		r := newRig(t)
		r.fake.secret = []byte(`{"password":"` + marker)
		w := r.ask("agents", "POST", steps, `{"tool":"postgres"}`)
		if p := problem(t, w); p.Code != "internal" || strings.Contains(w.Body.String()+r.log.String(), marker) {
			t.Errorf("answer = %+v, want internal, without the secret anywhere", p)
		}
		wantClosed(t, r)
	})
	t.Run("the connection breaks", func(t *testing.T) {
		r := newRig(t)
		req := httptest.NewRequest("POST", steps, strings.NewReader(`{"tool":"postgres"}`))
		req.Header.Set("Test-Identity", "yes")
		req.Header.Set("Content-Type", "application/json")
		r.Agents().ServeHTTP(brokenWriter{httptest.NewRecorder()}, req)
		wantClosed(t, r)
	})
}

type brokenWriter struct{ *httptest.ResponseRecorder }

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func wantClosed(t *testing.T, r rig) {
	t.Helper()
	if want := []broker.GrantID{grantID}; !reflect.DeepEqual(r.fake.closed, want) {
		t.Errorf("closed grants = %v, want %v", r.fake.closed, want)
	}
	if strings.Trim(string(r.fake.secret), "\x00") != "" {
		t.Error("the secret was not wiped")
	}
}

// TestPanic checks that a panic fails one request and that its value is not disclosed.
func TestPanic(t *testing.T) {
	for _, value := range []any{"inside-marker", errors.New("inside-marker"), struct{ s string }{"inside-marker"}} {
		r := newRig(t)
		r.fake.panics = value
		w := r.ask("agents", "POST", steps, `{"tool":"postgres"}`)
		if p := problem(t, w); p.Code != "internal" {
			t.Errorf("panic(%T) = %+v, want internal", value, p)
		}
		if both := w.Body.String() + r.log.String(); strings.Contains(both, "inside-marker") || !strings.Contains(both, "panic") {
			t.Errorf("panic(%T): its value leaked, or the log has no panic", value)
		}
	}
}

func TestConversions(t *testing.T) {
	r := newRig(t)
	c, _ := args.ParseConstraint([]byte(`{"one_of":["orders"]}`))
	rights := []broker.Right{{Tool: "postgres", Use: true, Args: map[string]args.Constraint{"table": c}}}
	budget := broker.Budget{Steps: 1, Live: 2, PerMinute: 3, Tools: map[broker.ToolName]int{"postgres": 4}}
	const shared = `"rights":[{"tool":"postgres","use":true,"args":{"table":{"one_of":["orders"]}}}],"budget":{"steps":1,"live":2,"per_minute":3,"tools":{"postgres":4}},"depth":2,"ttl_seconds":60`
	for _, row := range []struct {
		listener, path, body string
		status               int
		want                 any
	}{
		{"agents", "/v1/chains", `{"task":"t","labels":{"env":"prod"},"envelope":"a.b.c",` + shared + `}`, 201,
			broker.OpenRequest{Task: "t", Rights: rights, Budget: budget, Depth: 2, TTL: time.Minute, Labels: map[string]string{"env": "prod"},
				Envelope: "a.b.c"}},
		{"agents", "/v1/delegations/" + string(delegationID) + "/delegate", `{"to":"spiffe://example.org/agent",` + shared + `}`, 201,
			broker.DelegateRequest{From: delegationID, To: agentID, Rights: rights, Budget: budget, Depth: 2, TTL: time.Minute}},
		{"agents", "/v1/violations", `{"delegation":"` + string(delegationID) + `","grant":"` + string(grantID) + `","violation":"canary","detail":"d"}`, 200,
			broker.ReportRequest{Delegation: delegationID, Grant: grantID, Violation: "canary", Detail: "d"}},
		{"agents", "/v1/grants/" + string(grantID) + "/close", `{}`, 200, grantID},
		{"operators", "/v1/revocations/" + string(revocationID) + "/unfreeze", `{}`, 200, revocationID},
		{"operators", "/v1/canaries", `{"chain":"` + string(chainID) + `","note":"n","like":"github"}`, 201,
			broker.PlantRequest{Chain: chainID, Note: "n", Like: broker.CanaryGitHubToken}},
		{"operators", "/v1/canaries", `{}`, 201, broker.PlantRequest{}},
		{"operators", "/v1/canaries/" + string(canaryID) + "/pull", `{}`, 200, canaryID},
	} {
		w := r.ask(row.listener, "POST", row.path, row.body)
		if w.Code != row.status || !reflect.DeepEqual(r.fake.asked, row.want) {
			t.Errorf("POST %s = %d and the broker was asked %+v, want %d and %+v", row.path, w.Code, r.fake.asked, row.status, row.want)
		}
	}
	w := r.ask("operators", "POST", "/v1/revocations", `{"selector":"chain:`+string(chainID)+`","reason":"r","plan":"pl","include_new":true,"freeze":true}`)
	got, _ := r.fake.asked.(selector.Request)
	if w.Code != http.StatusAccepted || got.Selector.String() == "" || got.Reason != "r" || got.Plan != "pl" || !got.IncludeNew || !got.Freeze {
		t.Errorf("POST /v1/revocations = %d and the broker was asked %+v", w.Code, got)
	}
}

func TestPages(t *testing.T) {
	for query, want := range map[string][2]int{"": {0, 100}, "?after=7": {7, 100}, "?limit=1": {0, 1}, "?after=7&limit=1000": {7, 1000}} {
		r := newRig(t)
		page := decoded[api.Entries](t, r.ask("operators", "GET", "/v1/audit"+query, ""))
		if r.fake.asked != broker.Revision(want[0]) || r.fake.limit != want[1] || page.Next != 9 || len(page.Entries) != 1 {
			t.Errorf("GET /v1/audit%s asked after %v for %d, want %v; next %d", query, r.fake.asked, r.fake.limit, want, page.Next)
		}
	}
}

func TestNew(t *testing.T) {
	if _, err := server.New(server.Config{}); err == nil {
		t.Error("New(Config{}) = nil, want an error that names the missing field")
	}
}

func TestHealthAndMetrics(t *testing.T) {
	r := newRig(t, func(c *server.Config) { c.Metrics = nil })
	for _, path := range []string{"/livez", "/readyz", "/healthz"} {
		if w := r.ask("agents", "GET", path, "", "Test-Identity: "); w.Code != http.StatusOK || w.Body.String() != `{"status":"ok"}` {
			t.Errorf("GET %s = %d %s, want 200", path, w.Code, w.Body)
		}
	}
	if w := r.ask("operators", "GET", "/metrics", ""); w.Code != http.StatusNotFound {
		t.Errorf("GET /metrics without Config.Metrics = %d, want 404", w.Code)
	}
	r = newRig(t, func(c *server.Config) {
		c.Metrics = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "pawl_up 1") })
	})
	if w := r.ask("operators", "GET", "/metrics", ""); w.Body.String() != "pawl_up 1" {
		t.Errorf("GET /metrics = %q, want the handler's answer", w.Body)
	}
	if w := r.ask("operators", "GET", "/metrics", "", "Test-Identity: "); w.Code != http.StatusUnauthorized {
		t.Errorf("GET /metrics without identity = %d, want 401", w.Code)
	}
}

// TestHealthNamesConditions asks each health endpoint of a broker with conditions, with an identity and without one. The
// details are for operators.
func TestHealthNamesConditions(t *testing.T) {
	for _, row := range []struct {
		blocks               bool
		listener, path, with string
		status               int
		named, detailed      bool
	}{
		{true, "operators", "/readyz", "x", 503, true, true},
		{true, "operators", "/healthz", "x", 503, true, true},
		{true, "operators", "/livez", "x", 200, true, true},
		{true, "operators", "/readyz", "", 503, true, false},
		{true, "agents", "/readyz", "x", 503, true, false},
		{true, "agents", "/readyz", "", 503, true, false},
		{true, "agents", "/livez", "", 200, true, false},
		{false, "operators", "/readyz", "x", 200, true, true},
		{false, "agents", "/readyz", "", 200, true, false},
	} {
		r := newRig(t, func(c *server.Config) {
			c.Conditions = func() []broker.Condition {
				return []broker.Condition{{Part: "vault", Code: "vault_sealed", Text: "inside-marker", Blocks: row.blocks}}
			}
		})
		var headers []string
		if row.with == "" {
			headers = append(headers, "Test-Identity: ")
		}
		w := r.ask(row.listener, "GET", row.path, "", headers...)
		body := w.Body.String()
		if w.Code != row.status || strings.Contains(body, "vault_sealed") != row.named ||
			strings.Contains(body, "inside-marker") != row.detailed {
			t.Errorf("%+v = %d %s", row, w.Code, body)
		}
		if row.status == http.StatusServiceUnavailable {
			if p := problem(t, w); p.Code != "issuing_stopped" || len(p.Conditions) != 1 || !p.Conditions[0].Blocks {
				t.Errorf("%+v: %+v, want issuing_stopped with the condition", row, p)
			}
		}
	}
}
