package server_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
)

// document is the part of the OpenAPI document that the tests read.
type document struct {
	Paths      map[string]map[string]operation `json:"paths"`
	Components struct {
		Schemas map[string]schema `json:"schemas"`
	} `json:"components"`
}

type operation struct {
	Listener    string `json:"x-listener"`
	RequestBody *struct {
		Content map[string]media `json:"content"`
	} `json:"requestBody"`
	Responses map[string]struct {
		Content map[string]media `json:"content"`
	} `json:"responses"`
	Parameters []struct {
		Name string `json:"name"`
		In   string `json:"in"`
	} `json:"parameters"`
	Security []map[string][]string `json:"security"`
}

type media struct {
	Schema schema `json:"schema"`
}

type schema struct {
	Ref        string            `json:"$ref"`
	Type       string            `json:"type"`
	Properties map[string]schema `json:"properties"`
	Required   []string          `json:"required"`
	Items      *schema           `json:"items"`
	Additional jsontext.Value    `json:"additionalProperties"`
}

func openAPI(t *testing.T) (doc document) {
	t.Helper()
	if err := json.Unmarshal(api.OpenAPI, &doc); err != nil {
		t.Fatal(err)
	}
	return doc
}

// operations calls f for each operation, once for each listener that has it.
func operations(t *testing.T, f func(listener, method, path string, op operation)) {
	t.Helper()
	for path, methods := range openAPI(t).Paths {
		for method, op := range methods {
			for _, listener := range []string{"agents", "operators"} {
				if op.Listener == listener || op.Listener == "both" {
					f(listener, strings.ToUpper(method), path, op)
				}
			}
		}
	}
}

// TestDocumentedRoutes checks that the document and the handlers have the same endpoints.
func TestDocumentedRoutes(t *testing.T) {
	r := newRig(t)
	documented := map[string][]string{}
	operations(t, func(listener, method, path string, _ operation) {
		documented[listener] = append(documented[listener], method+" "+path)
	})
	for _, listener := range []string{"agents", "operators"} {
		routed := r.Routes(listener)
		slices.Sort(routed)
		slices.Sort(documented[listener])
		if !slices.Equal(routed, documented[listener]) {
			t.Errorf("the %s' listener routes\n%v\nand the document has\n%v", listener, routed, documented[listener])
		}
	}
}

// TestUnknownQuery has each operation refused for a query parameter that it does not have.
func TestUnknownQuery(t *testing.T) {
	r := newRig(t)
	operations(t, func(listener, method, path string, _ operation) {
		path = strings.NewReplacer("{id}", "dl"+strings.Repeat("0", 24), "{backend}", "tokens").Replace(path)
		if w := r.ask(listener, method, path+"?no=such", ""); w.Code != http.StatusBadRequest {
			t.Errorf("%s %s?no=such = %d %s, want 400", method, path, w.Code, w.Body)
		}
	})
}

// matrix has a row for each endpoint: its status without an identity, and the status of the same request on the other
// listener. It is reviewed by hand. TestMatrix refuses an endpoint that is not listed.
var matrix = map[string]struct{ anonymous, elsewhere int }{
	"agents POST /v1/chains":                       {401, 405},
	"agents GET /v1/delegations/{id}":              {401, 404},
	"agents POST /v1/delegations/{id}/delegate":    {401, 404},
	"agents POST /v1/delegations/{id}/steps":       {401, 404},
	"agents GET /v1/delegations/{id}/events":       {401, 404},
	"agents POST /v1/delegations/{id}/heartbeat":   {401, 404},
	"agents POST /v1/delegations/{id}/acknowledge": {401, 404},
	"agents POST /v1/grants/{id}/close":            {401, 404},
	"agents POST /v1/grants/{id}/collect":          {401, 404},
	"agents GET /v1/grants/{id}/hold":              {401, 404},
	"agents POST /v1/violations":                   {401, 404},
	"agents POST /v1/introspect":                   {401, 404},
	"agents POST /v1/security-events":              {202, 404},
	"agents GET /v1/status-lists/{backend}":        {200, 404},
	"agents GET /v1/openapi.json":                  {200, 200},
	"agents GET /livez":                            {200, 200},
	"agents GET /readyz":                           {200, 200},
	"agents GET /healthz":                          {200, 200},
	"operators GET /v1/chains":                     {401, 405},
	"operators GET /v1/chains/{id}":                {401, 404},
	"operators GET /v1/chains/{id}/audit":          {401, 404},
	"operators POST /v1/plans":                     {401, 404},
	"operators POST /v1/revocations":               {401, 404},
	"operators GET /v1/revocations":                {401, 404},
	"operators GET /v1/revocations/{id}":           {401, 404},
	"operators GET /v1/revocations/{id}/events":    {401, 404},
	"operators POST /v1/revocations/{id}/unfreeze": {401, 404},
	"operators POST /v1/canaries":                  {401, 404},
	"operators GET /v1/canaries":                   {401, 404},
	"operators POST /v1/canaries/{id}/pull":        {401, 404},
	"operators GET /v1/audit":                      {401, 404},
	"operators GET /v1/audit/checkpoint":           {401, 404},
	"operators GET /v1/revocations/{id}/report":    {401, 404},
	"operators GET /metrics":                       {401, 404},
	"operators GET /v1/openapi.json":               {200, 200},
	"operators GET /livez":                         {200, 200},
	"operators GET /readyz":                        {200, 200},
	"operators GET /healthz":                       {200, 200},
}

func TestMatrix(t *testing.T) {
	seen := 0
	operations(t, func(listener, method, path string, op operation) {
		name := listener + " " + method + " " + path
		want, ok := matrix[name]
		if !ok {
			t.Errorf("endpoint %q has no row in the authorization matrix", name)
			return
		}
		seen++
		other := map[string]string{"agents": "operators", "operators": "agents"}[listener]
		url, body := request(path, op)
		r := newRig(t)
		r.Close() // ends a stream that opens unexpectedly
		if w := r.ask(listener, method, url, body, contentType(op), "Test-Identity: "); w.Code != want.anonymous {
			t.Errorf("%s without an identity = %d, want %d", name, w.Code, want.anonymous)
		}
		if open := want.anonymous != http.StatusUnauthorized; open != (len(op.Security) == 0) {
			t.Errorf("%s without an identity = %d, but the document gives its security as %v", name, want.anonymous, op.Security)
		}
		if w := r.ask(other, method, url, body, contentType(op)); w.Code != want.elsewhere {
			t.Errorf("%s on the %s' listener = %d, want %d", name, other, w.Code, want.elsewhere)
		}
		if want.anonymous == http.StatusUnauthorized && r.fake.asked != nil {
			t.Errorf("%s: the broker was asked %v", name, r.fake.asked)
		}
	})
	if seen != len(matrix) {
		t.Errorf("the matrix has %d rows and the document %d endpoints", len(matrix), seen)
	}
}

// request returns a valid request for an operation.
func request(path string, op operation) (url, body string) {
	id := string(delegationID)
	switch {
	case strings.HasPrefix(path, "/v1/chains"):
		id = string(chainID)
	case strings.HasPrefix(path, "/v1/grants"):
		id = string(grantID)
	case strings.HasPrefix(path, "/v1/revocations"):
		id = string(revocationID)
	case strings.HasPrefix(path, "/v1/canaries"):
		id = string(canaryID)
	}
	if contentType(op) == "Content-Type: "+api.FormType {
		body = "token=good"
	} else if op.RequestBody != nil {
		body = map[string]string{
			"OpenRequest":        `{"task":"t","rights":[{"tool":"postgres","use":true}]}`,
			"DelegateRequest":    `{"to":"spiffe://example.org/b","rights":[{"tool":"postgres","use":true}]}`,
			"StepRequest":        `{"tool":"postgres"}`,
			"AcknowledgeRequest": `{"revocation":"` + string(revocationID) + `"}`,
			"ReportRequest":      `{"delegation":"` + string(delegationID) + `","violation":"canary"}`,
			"PlanRequest":        `{"selector":"chain:` + string(chainID) + `"}`,
			"RevokeRequest":      `{"selector":"chain:` + string(chainID) + `","reason":"r"}`,
			"PlantRequest":       `{"chain":"` + string(chainID) + `","note":"n"}`,
			"Nothing":            `{}`,
		}[name(op.RequestBody.Content["application/json"].Schema)]
	}
	return strings.NewReplacer("{id}", id, "{backend}", "tokens").Replace(path), body
}

// contentType returns the header that the body of an operation needs.
func contentType(op operation) string {
	if op.RequestBody != nil {
		if _, form := op.RequestBody.Content[api.FormType]; form {
			return "Content-Type: " + api.FormType
		}
	}
	return "Content-Type: application/json"
}

func name(s schema) string { return strings.TrimPrefix(s.Ref, "#/components/schemas/") }

// TestDocumentedAnswers checks that each endpoint gives an authenticated caller the status and body in the document.
// "Not yours" and "does not exist" must be the same answer.
func TestDocumentedAnswers(t *testing.T) {
	doc := openAPI(t)
	operations(t, func(listener, method, path string, op operation) {
		url, body := request(path, op)
		r := newRig(t)
		r.Close() // streams end after their first event
		w := r.ask(listener, method, url, body, contentType(op))
		promised, ok := op.Responses[fmt.Sprint(w.Code)]
		if !ok || w.Code >= 300 {
			t.Errorf("%s %s = %d %s, which is not documented", method, path, w.Code, w.Body)
			return
		}
		for kind, m := range promised.Content {
			if got := w.Header().Get("Content-Type"); got != kind {
				t.Errorf("%s %s has type %q, want %q", method, path, got, kind)
			}
			if kind == "application/json" && m.Schema.Ref != "" {
				for _, fault := range doc.check(m.Schema, w.Body.Bytes(), name(m.Schema)) {
					t.Errorf("%s %s: %s", method, path, fault)
				}
			}
		}
		if !strings.Contains(path, "{id}") && !strings.Contains(path, "violations") {
			return
		}
		r.fake.err = broker.Errorf(broker.NotFound, "op", "no such thing, or it is not yours")
		p := problem(t, r.ask(listener, method, url, body))
		for _, fault := range doc.check(schema{Ref: "#/components/schemas/Problem"}, mustJSON(t, p), "Problem") {
			t.Errorf("%s %s: %s", method, path, fault)
		}
		if p.Status != http.StatusNotFound {
			t.Errorf("%s %s for a missing object = %d, want 404", method, path, p.Status)
		}
	})
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// check lists the differences between raw and the schema: a missing member, an undeclared one, a value of another
// type. The fake fills every member, so a member that the handlers forget is found too.
func (d document) check(s schema, raw jsontext.Value, at string) (faults []string) {
	if s.Ref != "" {
		s = d.Components.Schemas[name(s)]
	}
	kinds := map[string]string{"object": "{", "array": "[", "string": `"`, "integer": "0", "boolean": "tf"}
	if !strings.Contains(kinds[s.Type], string(raw.Kind())) {
		return []string{fmt.Sprintf("%s is %s, want %s", at, raw, s.Type)}
	}
	switch s.Type {
	case "object":
		var members map[string]jsontext.Value
		_ = json.Unmarshal(raw, &members) // it is an object
		for _, must := range s.Required {
			if members[must] == nil {
				faults = append(faults, at+" lacks "+must)
			}
		}
		for member, value := range members {
			if inner, ok := s.Properties[member]; ok {
				faults = append(faults, d.check(inner, value, at+"."+member)...)
			} else if s.Properties != nil {
				faults = append(faults, at+" has the undocumented "+member)
			}
		}
		for member := range s.Properties {
			if members[member] == nil && !absent[at+"."+member] {
				faults = append(faults, at+" was expected to have "+member)
			}
		}
	case "array":
		var items []jsontext.Value
		_ = json.Unmarshal(raw, &items) // it is an array
		for _, item := range items {
			faults = append(faults, d.check(*s.Items, item, at)...)
		}
	}
	return faults
}

// absent lists the members that the objects of the fake do not have.
var absent = map[string]bool{
	"Revocation.lifted_alone": true, "Revocation.uncounted": true, "Revocation.warning": true,
	"Revocations.revocations.lifted_alone": true, "Revocations.revocations.uncounted": true, "Revocations.revocations.warning": true,
	"Problem.conditions": true, "Health.conditions": true, // TestHealthNamesConditions
	"Standing.fence": true, "Issued.repeated": true, "Revocation.freeze": true, "Revocation.lifted": true, "Revocation.settled": true,
	"Revocation.acknowledged": true, "Revocations.revocations.acknowledged": true, // only in a single revocation: TestAcknowledged
	"Revocations.revocations.waiting": true, "Revocation.waiting": true,
	"Revocations.revocations.freeze": true, "Revocations.revocations.lifted": true, "Revocations.revocations.settled": true,
	"Problem.policies": true, "Problem.missing": true, "Problem.remedy": true, "Problem.retry_after_ms": true, "Problem.revocation": true,
}
