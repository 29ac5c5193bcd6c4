package api_test

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/pawlsec/pawl/broker/api"
)

var update = flag.Bool("update", false, "write openapi.json and problems.md")

// operation is one endpoint, as the document describes it. A test in broker/server compares the document with the
// handlers.
type operation struct {
	listener, method, path, summary string
	query                           []string // name: description
	in, out                         any      // a type of package api, or a medium; out nil: an answer of another form
	status                          int
	stream                          string // the events, for a stream
}

// medium is the media type of a body that is not JSON; empty: no body.
type medium string

// securityEvent is the media type of a security event token (RFC 8417).
const securityEvent = medium("application/secevent+jwt")

var operations = []operation{
	{"agents", "post", "/v1/chains", "Open a chain and hold its root delegation", nil, api.OpenRequest{}, api.Delegation{}, 201, ""},
	{"agents", "get", "/v1/delegations/{id}", "Read the status of a delegation as its holder", nil, nil, api.Standing{}, 200, ""},
	{"agents", "post", "/v1/delegations/{id}/delegate", "Delegate a part of the delegation to another SPIFFE ID", nil, api.DelegateRequest{}, api.Delegation{}, 201, ""},
	{"agents", "post", "/v1/delegations/{id}/steps", "Take a step: one secret for one tool call (200 when the idempotency key repeats one)", nil, api.StepRequest{}, api.Issued{}, 201, ""},
	{"agents", "get", "/v1/delegations/{id}/events", "Follow the status of a delegation until it ends", nil, nil, nil, 200, "standing events with a Standing, at the start and after each change; a problem event before an early end; a comment at least every 15 s"},
	{"agents", "post", "/v1/delegations/{id}/heartbeat", "Send a heartbeat as the holder; refused under a fence and after the end, and counted all the same", nil, api.Nothing{}, api.Nothing{}, 200, ""},
	{"agents", "post", "/v1/delegations/{id}/acknowledge", "Acknowledge a revocation as the holder; allowed under a fence and after the end, and a heartbeat", nil, api.AcknowledgeRequest{}, api.Nothing{}, 200, ""},
	{"agents", "post", "/v1/grants/{id}/close", "End a step: its secret is revoked", nil, api.Nothing{}, api.Grant{}, 200, ""},
	{"agents", "post", "/v1/grants/{id}/collect", "Collect a sealed secret, once", nil, api.Nothing{}, api.Collected{}, 200, ""},
	{"agents", "get", "/v1/grants/{id}/hold", "Hold a step that was taken with held: its secret ends 1.5 s after the last such request has ended", nil, nil, nil, 200, "one comment; the broker ends the request after 10 s, and its client sends another one"},
	{"agents", "post", "/v1/introspect", "Check whether a token from a step is active (RFC 7662); for any workload that the broker knows", nil, medium(api.FormType), api.Introspection{}, 200, ""},
	{"agents", "post", "/v1/security-events", "Push a security event token (RFC 8935), if transmitters are configured; its signature authenticates it", nil, securityEvent, medium(""), 202, ""},
	{"agents", "get", "/v1/status-lists/{backend}", "Read the signed status list that a backend's tokens name (draft-ietf-oauth-status-list), if one is configured; without an identity", nil, nil, medium(api.StatusListType), 200, ""},
	{"agents", "post", "/v1/violations", "Report a policy violation", nil, api.ReportRequest{}, api.Reported{}, 200, ""},

	{"operators", "get", "/v1/chains", "List the chains", append([]string{"all: true to include those that have ended"}, page...), nil, api.Chains{}, 200, ""},
	{"operators", "get", "/v1/chains/{id}", "Read one chain with its delegations and grants", page, nil, api.ChainView{}, 200, ""},
	{"operators", "get", "/v1/chains/{id}/audit", "Read the audit log of one chain", auditPage, nil, api.Entries{}, 200, ""},
	{"operators", "post", "/v1/plans", "Plan a revocation: read its scope without revoking", nil, api.PlanRequest{}, api.Plan{}, 200, ""},
	{"operators", "post", "/v1/revocations", "Revoke or freeze: answers once it is fenced, before all is dead", nil, api.RevokeRequest{}, api.Revocation{}, 202, ""},
	{"operators", "get", "/v1/revocations", "List the revocations", page, nil, api.Revocations{}, 200, ""},
	{"operators", "get", "/v1/revocations/{id}", "Read the progress of a revocation", nil, nil, api.Revocation{}, 200, ""},
	{"operators", "get", "/v1/revocations/{id}/events", "Follow a revocation until it is settled", nil, nil, nil, 200, "revocation events with a Revocation, at the start and after each change; a problem event before an early end; a comment at least every 15 s"},
	{"operators", "get", "/v1/revocations/{id}/report", "Read the signed report of a revocation: a compact JWS of typ pawl-report+jws", nil, nil, medium(api.ReportType), 200, ""},
	{"operators", "post", "/v1/revocations/{id}/unfreeze", "Ask to lift a freeze; two operators must ask", nil, api.Nothing{}, api.Revocation{}, 200, ""},
	{"operators", "post", "/v1/canaries", "Plant a canary; its value is returned only here", nil, api.PlantRequest{}, api.Planted{}, 201, ""},
	{"operators", "get", "/v1/canaries", "List the canaries", page, nil, api.Canaries{}, 200, ""},
	{"operators", "post", "/v1/canaries/{id}/pull", "Pull a canary", nil, api.Nothing{}, api.Canary{}, 200, ""},
	{"operators", "get", "/v1/audit", "Read the audit log", auditPage, nil, api.Entries{}, 200, ""},
	{"operators", "get", "/v1/audit/checkpoint", "Read a signed checkpoint of the audit log: a note over the root of its Merkle tree", nil, nil, medium(api.CheckpointType), 200, ""},
	{"operators", "get", "/metrics", "Read the broker's metrics, in the format of Prometheus", nil, nil, medium(api.MetricsType), 200, ""},

	{"both", "get", "/v1/openapi.json", "Read this document", nil, nil, nil, 200, ""},
	{"both", "get", "/livez", "Check whether the broker runs: it fences and revokes also while it cannot issue", nil, nil, api.Health{}, 200, ""},
	{"both", "get", "/readyz", "Check whether the broker can issue", nil, nil, api.Health{}, 200, ""},
	{"both", "get", "/healthz", "The same as /readyz", nil, nil, api.Health{}, 200, ""},
}

var (
	page      = []string{"after: what the page before has in next; omitted: from the start", limit}
	auditPage = []string{"after: the revision after which to start; default 0", limit}
)

const limit = "limit: the most items of the page; default 100, at most 1000"

// TestIDPattern holds that ids of each kind match the document's pattern of an id in a path.
func TestIDPattern(t *testing.T) {
	pattern := regexp.MustCompile(`"pattern": "(.*)"`).FindStringSubmatch(string(api.OpenAPI))
	if pattern == nil {
		t.Fatal("the document has no pattern")
	}
	for _, prefix := range []string{"ch", "dl", "gr", "rv", "cn"} {
		if id := prefix + "0123456789abcdefghjkmnpq"; !regexp.MustCompile(pattern[1]).MatchString(id) {
			t.Errorf("the id %s does not match %s", id, pattern[1])
		}
	}
}

type object = map[string]any

// TestOpenAPI compares openapi.json with the types. With -update it writes the file.
func TestOpenAPI(t *testing.T) {
	s := schemas{defs: object{}, comments: comments(t)}
	paths := object{}
	for _, op := range operations {
		at := op.path
		item, _ := paths[at].(object)
		if item == nil {
			item = object{}
			paths[at] = item
		}
		described := s.operation(op)
		if other, taken := item[op.method]; taken {
			t.Fatalf("%s %s is described twice: %v", op.method, op.path, other)
		}
		item[op.method] = described
	}
	doc := object{
		"openapi": "3.1.0",
		"info": object{
			"title": "Pawl", "version": "1",
			"description": "A credential broker for agent workloads. Agents and operators have separate listeners, and an operation's x-listener names its listener. Every refusal is a Problem.",
			"license":     object{"name": "Apache-2.0", "identifier": "Apache-2.0"},
		},
		"paths":      paths,
		"components": object{"schemas": s.defs, "securitySchemes": object{"svid": object{"type": "mutualTLS", "description": "An X.509-SVID."}, "jwt-svid": object{"type": "http", "scheme": "bearer", "bearerFormat": "JWT-SVID"}}},
	}
	s.ref(reflect.TypeFor[api.Problem]())
	golden(t, "openapi.json", encode(t, doc))
	for _, r := range regexp.MustCompile(`#/components/schemas/(\w+)`).FindAllStringSubmatch(string(api.OpenAPI), -1) {
		if s.defs[r[1]] == nil {
			t.Errorf("the document refers to schema %q, which it does not have", r[1])
		}
	}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v, json.Deterministic(true), jsontext.WithIndent("  "))
	if err != nil {
		t.Fatal(err)
	}
	return append(b, '\n')
}

func golden(t *testing.T, name string, want []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is out of date: run go test ./broker/api -update and review the diff", name)
	}
}

// schemas collects the JSON schemas of Go types.
type schemas struct {
	defs     object
	comments map[string]string // by "Type" and "Type.member"
}

func (s *schemas) operation(op operation) object {
	out := object{"description": op.summary}
	switch {
	case op.stream != "":
		out["content"] = object{"text/event-stream": object{"schema": object{"type": "string", "description": op.stream}}}
		s.ref(reflect.TypeFor[api.Standing]())
		s.ref(reflect.TypeFor[api.Revocation]())
	case isMedium(op.out):
		if m := op.out.(medium); m != "" {
			out["content"] = m.content()
		}
	case op.out == nil:
		out["content"] = object{"application/json": object{"schema": object{"type": "object"}}}
	default:
		out["content"] = object{"application/json": object{"schema": s.ref(reflect.TypeOf(op.out))}}
	}
	responses := object{fmt.Sprint(op.status): out, "default": object{
		"description": "A refusal or failure",
		"content":     object{api.ProblemType: object{"schema": s.ref(reflect.TypeFor[api.Problem]())}},
	}}
	described := object{
		"operationId": operationID(op), "summary": op.summary, "x-listener": op.listener,
		"responses": responses, "security": []any{object{"svid": []string{}}, object{"jwt-svid": []string{}}},
	}
	switch {
	case op.listener == "both" || op.out == medium(api.StatusListType):
		described["security"] = []any{}
	case op.listener == "operators":
		described["security"] = []any{object{"svid": []string{}}}
	}
	if m, ok := op.in.(medium); ok {
		described["requestBody"] = object{"required": true, "content": m.content()}
		if m == securityEvent { // its signature authenticates it
			described["security"] = []any{}
		}
	} else if op.in != nil {
		described["requestBody"] = object{"required": true, "content": object{"application/json": object{"schema": s.ref(reflect.TypeOf(op.in))}}}
	}
	if p := parameters(op); p != nil {
		described["parameters"] = p
	}
	if _, step := op.in.(api.StepRequest); step {
		responses["200"] = object{"description": "The step was taken before with the same idempotency key: its grant, without a second secret", "content": out["content"]}
	}
	return described
}

func isMedium(v any) bool { _, ok := v.(medium); return ok }

func (m medium) content() object {
	return object{string(m): object{"schema": object{"type": "string"}}}
}

// operationID consists of the method and the fixed segments of the path: post_delegations_steps.
func operationID(op operation) string {
	words := []string{op.method}
	for _, w := range strings.FieldsFunc(strings.TrimPrefix(op.path, "/v1"), func(r rune) bool { return r == '/' }) {
		if strings.HasPrefix(w, "{") {
			w = "one"
		}
		words = append(words, strings.TrimSuffix(w, ".json"))
	}
	if op.listener == "operators" {
		words = append([]string{"operator"}, words...)
	}
	return strings.Join(words, "_")
}

const idPattern = "^(ch|dl|gr|rv|cn)[0-9a-z]{24}$"

func parameters(op operation) (all []any) {
	if strings.Contains(op.path, "{id}") {
		all = append(all, object{"name": "id", "in": "path", "required": true, "schema": object{"type": "string", "pattern": idPattern}})
	}
	if strings.Contains(op.path, "{backend}") {
		all = append(all, object{"name": "backend", "in": "path", "required": true, "description": "its name in the configuration", "schema": object{"type": "string"}})
	}
	for _, q := range op.query {
		name, text, _ := strings.Cut(q, ": ")
		schema := object{"type": "integer", "minimum": 0}
		switch {
		case name == "all":
			schema = object{"type": "boolean"}
		case name == "limit":
			schema = object{"type": "integer", "minimum": 1, "maximum": 1000}
		case q == page[0]:
			schema = object{"type": "string", "pattern": idPattern}
		}
		all = append(all, object{"name": name, "in": "query", "description": text, "schema": schema})
	}
	if _, step := op.in.(api.StepRequest); step {
		all = append(all, object{"name": api.IdempotencyKey, "in": "header", "description": "makes it safe to repeat the step", "schema": object{"type": "string", "maxLength": 128}})
	}
	return all
}

func (s *schemas) ref(t reflect.Type) object {
	if s.defs[t.Name()] == nil {
		s.defs[t.Name()] = object{} // before its members, which may refer to it
		s.defs[t.Name()] = s.structure(t)
	}
	return object{"$ref": "#/components/schemas/" + t.Name()}
}

func (s *schemas) structure(t reflect.Type) object {
	members, required := object{}, []string{}
	for _, f := range reflect.VisibleFields(t) {
		tag := f.Tag.Get("json")
		if tag == "" {
			continue
		}
		name, options, _ := strings.Cut(tag, ",")
		schema := s.of(f.Type)
		owner := t
		if len(f.Index) > 1 {
			owner = t.FieldByIndex(f.Index[:1]).Type
		}
		if text := s.comments[owner.Name()+"."+f.Name]; text != "" {
			schema["description"] = text
		}
		members[name] = schema
		if options == "" {
			required = append(required, name)
		}
	}
	out := object{"type": "object", "properties": members}
	if text := s.comments[t.Name()]; text != "" {
		out["description"] = text
	}
	if len(required) > 0 {
		out["required"] = required
	}
	if strings.HasSuffix(t.Name(), "Request") || t == reflect.TypeFor[api.Nothing]() {
		out["additionalProperties"] = false // the broker refuses unknown members
	}
	return out
}

func (s *schemas) of(t reflect.Type) object {
	switch {
	case t == reflect.TypeFor[time.Time]():
		return object{"type": "string", "format": "date-time"}
	case t == reflect.TypeFor[jsontext.Value]():
		return object{"type": "object"}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return s.of(t.Elem())
	case reflect.Struct:
		return s.ref(t)
	case reflect.Slice:
		return object{"type": "array", "items": s.of(t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": s.of(t.Elem())}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Int, reflect.Int64, reflect.Uint64:
		return object{"type": "integer", "minimum": 0}
	case reflect.String:
		return object{"type": "string"}
	}
	panic("no schema for " + t.String())
}

// comments reads the comments of the package's types and their members.
func comments(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, name := range []string{"agents.go", "operators.go", "problem.go"} {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			decl, ok := d.(*ast.GenDecl)
			if !ok || decl.Tok != token.TYPE {
				continue
			}
			spec := decl.Specs[0].(*ast.TypeSpec)
			all[spec.Name.Name] = oneLine(decl.Doc.Text())
			structure, ok := spec.Type.(*ast.StructType)
			for i := 0; ok && i < len(structure.Fields.List); i++ {
				field := structure.Fields.List[i]
				for _, n := range field.Names {
					all[spec.Name.Name+"."+n.Name] = oneLine(field.Comment.Text())
				}
			}
		}
	}
	return all
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
