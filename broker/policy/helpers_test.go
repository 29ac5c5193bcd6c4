package policy_test

import (
	"io/fs"
	"testing"
	"testing/fstest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const toolsYAML = `
tools:
  - name: db.read
    backend: postgres
    narrowing: native
    ttl: 60s
    arguments:
      tables: {kind: list, required: true}
      env: {kind: string}
      limit: {kind: integer}
      dry: {kind: boolean}
    vault: {policy: pawl-db-read, path: database/pawl-app}
  - name: db.write
    backend: postgres
    narrowing: native
    vault: {policy: pawl-db-write, path: database/pawl-app}
  - name: mail
    backend: kv
    narrowing: none
    vault: {policy: pawl-mail, path: kv/mail}
`

var noon = time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC) // a Wednesday

// sources returns an author's directory with one policy file over the tools above.
func sources(cedar string) fstest.MapFS {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	return fstest.MapFS{
		"bundle.yaml":     file("name: acme\nversion: 3\n"),
		"tools.yaml":      file(toolsYAML),
		"main.cedar":      file(cedar),
		"violations.yaml": file("canary: freeze-caller\noutside_scope: revoke-step\n"),
	}
}

func build(t testing.TB, dir fs.FS) policy.Source {
	t.Helper()
	s, err := policy.Build(dir)
	if err != nil {
		t.Fatalf("Build: %v", err)
	}
	return s
}

// load loads policies for a test of their decisions. They may be wrong: see TestWrongPolicies.
func load(t testing.TB, cedar string) *policy.Policy {
	t.Helper()
	p, err := policy.LoadUnchecked(sources(cedar))
	if err != nil {
		t.Fatalf("Load: %v", err)
	}
	return p
}

func id(s string) spiffeid.ID { return spiffeid.RequireFromString(s) }

func list(names ...string) args.Args {
	a, err := args.New(map[string]args.Value{"tables": args.List(names...)})
	if err != nil {
		panic(err)
	}
	return a
}

// use returns a question by spiffe://acme.example/ci/runner, changed by each of with.
func use(tool broker.ToolName, with ...func(*broker.Question)) broker.Question {
	q := broker.Question{
		Action: broker.ActionUse,
		Caller: broker.Caller{ID: id("spiffe://acme.example/ci/runner"), Proof: broker.ProofX509},
		Tool:   broker.Tool{Name: tool},
		Chain:  broker.Chain{Task: "nightly", Opener: id("spiffe://acme.example/ci/runner"), Opened: noon.Add(-time.Minute)},
		Now:    noon,
	}
	for _, f := range with {
		f(&q)
	}
	return q
}
