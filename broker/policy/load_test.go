package policy_test

import (
	"errors"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/pawlsec/pawl/broker/policy"
)

const permit = `permit(principal == Agent::"spiffe://acme.example/x", action == Action::"use", resource == Tool::"mail");`

func TestBuildRefuses(t *testing.T) {
	tool := func(lines string) fstest.MapFS {
		dir := sources("")
		dir["tools.yaml"].Data = []byte("tools:\n  - name: x\n    backend: kv\n    narrowing: none\n    vault: {policy: p, path: kv/x}\n" + lines)
		return dir
	}
	file := func(name, text string) fstest.MapFS {
		dir := sources("")
		dir[name] = &fstest.MapFile{Data: []byte(text)}
		return dir
	}
	without := func(name string) fstest.MapFS {
		dir := sources("")
		delete(dir, name)
		return dir
	}
	for _, tt := range []struct {
		name string
		dir  fstest.MapFS
		want string
	}{
		{"no bundle.yaml", without("bundle.yaml"), "bundle.yaml: "},
		{"no tools.yaml", without("tools.yaml"), "tools.yaml: "},
		{"no version", file("bundle.yaml", "name: acme\n"), "bundle.yaml: version"},
		{"bad name", file("bundle.yaml", "name: Acme Inc\nversion: 1\n"), "bundle.yaml: name"},
		{"unknown key", tool("    owner: me\n"), `tools.yaml:6: unknown field "owner"`},
		{"repeated key", tool("    backend: ssh\n"), "tools.yaml:6: mapping key"},
		{"key in another case", tool("    Backend: ssh\n"), `tools.yaml:6: unknown field "Backend"`},
		{"two tools of a name", tool("  - {name: x, backend: kv, narrowing: none, vault: {policy: p, path: kv/x}}\n"), "declared twice"},
		{"tool name", tool("  - {name: X, backend: kv}\n"), `tools.yaml:6: tool "X": a tool name is`},
		{"no narrowing", tool("  - {name: y, backend: kv}\n"), `tools.yaml:6: tool "y": narrowing ""`},
		{"ttl too long", tool("    ttl: 16m\n"), `tools.yaml:2: tool "x": ttl "16m0s" is not`},
		{"ttl not a duration", tool("    ttl: soon\n"), `ttl "soon"`},
		{"argument name", tool("    arguments: {A: {kind: string}}\n"), `argument "A"`},
		{"argument kind", tool("    arguments: {a: {kind: float}}\n"), `argument "a": kind "float"`},
		{"constraint", tool("    arguments: {a: {kind: string, constraint: {one_off: [x]}}}\n"), `tool "x": argument "a": `},
		{"path climbs", tool("  - {name: y, backend: kv, narrowing: none, vault: {policy: p, path: kv/../sys}}\n"), `vault.path: segment 2 of a vault path: ".." begins with`},
		{"path is a mount only", tool("  - {name: y, backend: kv, narrowing: none, vault: {policy: p, path: kv}}\n"), `vault.path "kv" must have at least two segments`},
		{"policy is a pattern", tool("  - {name: y, backend: kv, narrowing: none, vault: {policy: 'p*', path: kv/x}}\n"), `vault.policy: "p*" has '*' at byte 2`},
		{"policy begins with a hyphen", tool("  - {name: y, backend: kv, narrowing: none, vault: {policy: '-p', path: kv/x}}\n"), `vault.policy: "-p" begins with`},
		{"path with an underscore in front", tool("  - {name: y, backend: kv, narrowing: none, vault: {policy: p, path: kv/_x}}\n"), `vault.path: segment 2 of a vault path: "_x" begins with`},
		{"path with two dots", tool("  - {name: y, backend: kv, narrowing: none, vault: {policy: p, path: kv/x..y}}\n"), `"x..y" has '..'`},
		{"path of 17 segments", tool("  - {name: y, backend: kv, narrowing: none, vault: {policy: p, path: kv" + strings.Repeat("/x", 16) + "}}\n"), "vault.path: a vault path has 17 segments"},
		{"consequence", file("violations.yaml", "canary: shoot\n"), `"canary": consequence "shoot" is unknown`},
		{"violation code", file("violations.yaml", "Canary Bird: deny\n"), `code "Canary Bird"`},
		{"violation code of one underscore", file("violations.yaml", "_: deny\n"), `code "_"`},
		{"path of dots", tool("  - {name: y, backend: kv, narrowing: none, vault: {policy: p, path: 'kv/..'}}\n"), `vault.path: segment 2 of a vault path: ".." begins with`},
		{"anchors", file("violations.yaml", "a: &x deny\nb: *x\n"), "violations.yaml:"},
		{"tag", file("violations.yaml", "a: !!str deny\n"), "violations.yaml:1: anchors"},
		{"large file", file("main.cedar", strings.Repeat(" ", policy.MaxFile+1)), "main.cedar: larger than"},

		{"not Cedar", file("main.cedar", "\npermit(principal, action);"), "main.cedar:2:26 "},
		{"not text", file("main.cedar", "\xff\xfe"), "main.cedar: "},
		{"one id twice", file("main.cedar", `@id("a") `+permit+"\n"+`@id("a") `+permit), `main.cedar:2: policy id "a" is taken by main.cedar:1`},
		{"id taken by a place", file("main.cedar", permit+`@id("main.cedar#1") `+permit), "is taken by main.cedar:1"},
		{"id with spaces", file("main.cedar", `@id("a b") `+permit), "main.cedar:1: @id: "},
		{"unknown annotation", file("main.cedar", `@violaton("deny") `+permit), "@violaton: unknown annotation"},
		{"unknown consequence", file("main.cedar", `@violation("explode") forbid(principal, action, resource);`), `@violation: "explode"`},
		{"violation on a permit", file("main.cedar", `@violation("deny") `+permit), "@violation: belongs on a forbid"},
		{"ttl on a forbid", file("main.cedar", `@ttl("1s") forbid(principal, action, resource);`), "@ttl: belongs on a permit"},
		{"approval", file("main.cedar", `@approval("two of oncall") `+permit), `@approval: "two of oncall"`},
		{"approval by zero people", file("main.cedar", `@approval("0 of oncall") `+permit), `@approval: "0 of oncall"`},
		{"ttl", file("main.cedar", `@ttl("1h") `+permit), `@ttl: ttl "1h"`},
		{"narrowing", file("main.cedar", `@narrowing("tight") `+permit), `@narrowing: narrowing "tight"`},
		{"one domain", file("main.cedar", `@domains("a.example") permit(principal in TrustDomain::"a", action == Action::"delegate", resource == Tool::"mail");`), "@domains: needs the trust domains of both sides"},
		{"domains without delegating", file("main.cedar", `@domains("a.example b.example") `+permit), "does not include Action::\"delegate\""},
		{"approval of a chain", file("main.cedar", `@approval("1 of oncall") permit(principal in TrustDomain::"a.example", action in [Action::"open", Action::"use"], resource == Tool::"mail");`), "apply to Action::\"use\" only"},
		{"open principal", file("main.cedar", `permit(principal, action == Action::"use", resource == Tool::"mail");`), `permits any principal; if intended, add @any("principal")`},
		{"open tool by type", file("main.cedar", `@any("principal") permit(principal is Agent, action == Action::"use", resource is Tool);`), "permits any tool"},
		{"open action", file("main.cedar", `@any("principal tool") permit(principal, action, resource);`), "permits any action"},
		{"@any without an open part", file("main.cedar", `@any("tool") `+permit), `@any: "tool" is not left open`},
		{"schema", file("schema.cedarschema", "entity Agent"), "schema.cedarschema: "},
		{"against the schema", func() fstest.MapFS {
			dir := file("schema.cedarschema", `entity Agent; entity Tool; action use appliesTo {principal: Agent, resource: Tool, context: {args: {ticket: String}}};`)
			dir["main.cedar"].Data = []byte(strings.TrimSuffix(permit, ";") + " when { context.args.tickt == \"a\" };")
			return dir
		}(), `policy "main.cedar#1" against the schema`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := policy.Build(tt.dir)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Build = %v, want %q", err, tt.want)
			}
		})
	}
	if _, err := policy.Build(without("bundle.yaml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Build without bundle.yaml = %v, want fs.ErrNotExist in it", err)
	}
}

func TestBuildHasOneForm(t *testing.T) {
	a := build(t, sources(someCedar))
	dir := sources(someCedar)
	dir["tools.yaml"].Data = []byte(strings.Replace(toolsYAML, "ttl: 60s", "ttl: 1m", 1) + "# a comment\n")
	dir["README.md"] = &fstest.MapFile{Data: []byte("left alone")}
	if b := build(t, dir); a.Digest() != b.Digest() {
		t.Errorf("two spellings of one bundle have digests %s and %s", a.Digest(), b.Digest())
	}
	if !strings.HasPrefix(a.Digest(), "sha256:") || len(a.Digest()) != len("sha256:")+64 {
		t.Errorf("Digest() = %q", a.Digest())
	}
}

// TestDeepInput checks that input made to exhaust a parser is answered, in time that grows only with its length.
func TestDeepInput(t *testing.T) {
	const n = 20_000
	when := func(s string) string { return strings.TrimSuffix(permit, ";") + " when { " + s + " };" }
	for name, cedar := range map[string]string{
		"parentheses": when(strings.Repeat("(", n) + "true" + strings.Repeat(")", n)),
		"sets":        when(strings.Repeat("[", n) + "true" + strings.Repeat("]", n) + " == []"),
		"members":     when("context" + strings.Repeat(".args", n)),
		"unfinished":  when(strings.Repeat("if ", n)),
	} {
		s, err := policy.Build(sources(cedar))
		if err != nil {
			continue // a refusal is an answer too
		}
		p, err := policy.Load(s.Unsigned())
		if err != nil {
			t.Fatalf("%s: Load: %v", name, err)
		}
		p.Decide(use("mail", caller("spiffe://acme.example/x")))
	}
	for name, yaml := range map[string]string{
		"open lists": "tools: " + strings.Repeat("[", n),
		"lists":      "tools: " + strings.Repeat("[", n) + strings.Repeat("]", n),
		"dashes":     "tools:\n" + strings.Repeat("- ", n),
	} {
		dir := sources("")
		dir["tools.yaml"].Data = []byte(yaml)
		if _, err := policy.Build(dir); err == nil || !strings.Contains(err.Error(), "nested") {
			t.Errorf("%s: Build = %v, want it to say nested", name, err)
		}
	}
}
