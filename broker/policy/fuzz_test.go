package policy_test

import (
	"bytes"
	"crypto/rand"
	"testing"
	"testing/fstest"

	"github.com/go-jose/go-jose/v4"
	"github.com/pawlsec/pawl/broker/policy"
)

// FuzzVerify checks that Verify accepts the signed content and nothing else, whatever the envelope.
func FuzzVerify(f *testing.F) {
	private, public := keys(f, 1)
	good := sign(f, build(f, sources(someCedar)), private...)
	f.Add(good)
	f.Add([]byte(`{"payload":"e30","signatures":[{"protected":"e30","signature":""}]}`))
	f.Add([]byte(`{"payload":null,"signatures":null}`))
	want := build(f, sources(someCedar)).Digest()
	f.Fuzz(func(t *testing.T, jws []byte) {
		b, err := policy.Verify(jws, policy.Trust{Keys: public, Need: 1})
		if err == nil && b.Digest() != want {
			t.Errorf("Verify accepted %s, which no key signed", b.Digest())
		}
	})
}

// FuzzPayload checks that any signed payload is refused, or loads and keeps its exact bytes.
func FuzzPayload(f *testing.F) {
	private, public, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(build(f, sources(someCedar)).Payload())
	f.Add([]byte(`{"name":"a","version":1,"tools":[],"policies":[]}`))
	f.Add([]byte(`{"name":"a","version":1,"tools":null,"policies":null}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		b, err := policy.Verify(policy.SignRaw(payload, private), policy.Trust{Keys: []jose.JSONWebKey{public}, Need: 1})
		if err != nil {
			return
		}
		if !bytes.Equal(b.Payload(), payload) {
			t.Errorf("Verify accepted %q and keeps %q", payload, b.Payload())
		}
		if p, err := policy.Load(b); err == nil {
			p.Explain(use("db.read", given(list("a"))))
		}
	})
}

func FuzzBuild(f *testing.F) {
	f.Add(toolsYAML, someCedar, "canary: deny\n")
	f.Add("tools: &a [*a]", "permit(principal,action,resource);", "{}")
	f.Add("tools:\n- ~", `@any("principal action tool")permit(principal,action,resource)when{context.a.b.c};`, "~")
	f.Fuzz(func(t *testing.T, tools, cedar, violations string) {
		dir := sources(cedar)
		dir["tools.yaml"].Data = []byte(tools)
		dir["violations.yaml"] = &fstest.MapFile{Data: []byte(violations)}
		s, err := policy.Build(dir)
		if err != nil {
			return
		}
		p, err := policy.Load(s.Unsigned())
		if err != nil {
			t.Fatalf("Load after Build: %v", err)
		}
		p.Decide(use("db.read"))
	})
}

func FuzzRunTests(f *testing.F) {
	f.Add(row + "    expect: allow\n")
	f.Add("tests:\n- ~")
	f.Add("tests: {a: [b, {c: d}]}")
	f.Add(row + "    args: {a: [b, 1, ~]}\n    history: {x: {count: -1, first: 1h}}\n    expect: deny\n")
	p := load(f, someCedar)
	f.Fuzz(func(t *testing.T, raw string) {
		_, _ = policy.RunTests(p, "t.yaml", []byte(raw)) // must not panic
	})
}
