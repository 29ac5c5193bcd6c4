package rules_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// place is a file that may do something otherwise forbidden, and the reason.
type place struct{ file, why string }

// reveals lists the files outside tests that may open a secret.
var reveals = []place{
	{"broker/secret.go", "the type itself"},
	{"broker/server/agents.go", "the API's encoder: the one way out to an agent"},
	{"broker/server/seal.go", "the API's encoder of a sealed delivery: it encrypts where the other encodes"},
	{"cmd/wire/trial.go", "the self-test uses the secret of its own step"},
	{"broker/brokertest/backend_checks.go", "the suite that tries a backend's secrets; tests and the bench link it, the broker does not"},
}

// skips lists the files that may skip a test. For every other missing part a test calls cmd/parts, so that PAWL_REQUIRE
// can make it a failure.
var skips = []place{
	{"cmd/parts/need.go", "the one place that knows which parts are missing"},
	{"cmd/parts/gotest/main_test.go", "it tests how skips are reported"},
	{"plugins/ssh/ssh_test.go", "ssh-keygen is a second opinion, beside a real sshd"},
	{"store/bolt/fault_test.go", "mounting a small disk takes root"},
	{"cmd/wire/start_test.go", "mounting a small disk takes root"},
	{"cmd/rules/docs_test.go", "psql comes with PostgreSQL on most systems, and not on all"},
}

// clocks lists the files below broker, outside tests, that may call time.Now. The domain's packages have no row: they
// never read the clock.
var clocks = []place{
	{"broker/brokertest/backend.go", "its clock is that of testing/synctest"},
	{"broker/server/problem.go", "deadlines of sockets are the operating system's time"},
	{"broker/server/signals.go", "deadlines of sockets are the operating system's time"},
	{"broker/agent/seal.go", "an SDK runs in another program's process"},
	{"broker/agent/step.go", "an SDK runs in another program's process"},
	{"broker/api/client/client.go", "an SDK runs in another program's process"},
}

func in(list []place, file string) bool {
	return slices.ContainsFunc(list, func(p place) bool { return p.file == file })
}

var (
	mark  = regexp.MustCompile(`\b(TODO|FIXME|XXX|HACK)\b`)
	owned = regexp.MustCompile(`TODO\((#[0-9]+|@[a-z0-9-]+)\): \S`)
	// A suppression names the linter, and then the reason.
	suppression = regexp.MustCompile(`//nolint(:[a-z,]+)?( // \S|$)?`)
)

// findings returns the breaches of the rules in a source file.
func findings(file string, source []byte) (found []string) {
	set := token.NewFileSet()
	f, err := parser.ParseFile(set, file, source, parser.ParseComments)
	if err != nil {
		return []string{err.Error()}
	}
	isTest := strings.HasSuffix(file, "_test.go")
	say := func(at token.Pos, format string, args ...any) {
		found = append(found, fmt.Sprintf("%s: %s", set.Position(at), fmt.Sprintf(format, args...)))
	}
	ast.Inspect(f, func(n ast.Node) bool {
		s, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		of, _ := s.X.(*ast.Ident)
		name := s.Sel.Name
		switch {
		case name == "Reveal" && !isTest && !in(reveals, file):
			say(s.Pos(), "Reveal: a secret is opened only where it goes to its recipient: add the file to reveals, with the reason")
		case (name == "Skip" || name == "Skipf" || name == "SkipNow") && !in(skips, file):
			say(s.Pos(), "%s: call cmd/parts, so that PAWL_REQUIRE can make the missing part a failure", name)
		case of == nil || of.Name != "time":
		case name == "Now" && !isTest && strings.HasPrefix(file, "broker/") && !in(clocks, file):
			say(s.Pos(), "time.Now: the clock comes in as a Now field")
		case name == "Sleep" && !importsSynctest(f):
			say(s.Pos(), "time.Sleep: wait on a handshake, or in a bubble of testing/synctest")
		}
		return true
	})
	for _, group := range f.Comments {
		for _, c := range group.List {
			if mark.MatchString(c.Text) && !owned.MatchString(c.Text) {
				say(c.Pos(), "a mark without an owner; write TODO(#12): or TODO(@name): and when it goes")
			}
			if m := suppression.FindStringSubmatch(c.Text); m != nil && (m[1] == "" || m[2] == "") {
				say(c.Pos(), "a suppression without a linter and a reason: //nolint:name // why")
			}
		}
	}
	return found
}

func importsSynctest(f *ast.File) bool {
	return slices.ContainsFunc(f.Imports, func(i *ast.ImportSpec) bool { return i.Path.Value == `"testing/synctest"` })
}

// sources visits our files with the extension.
func sources(t *testing.T, ext string, visit func(file string, source []byte)) {
	t.Helper()
	tree := os.DirFS(root(t))
	seen := 0
	err := fs.WalkDir(tree, ".", func(file string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (file == "build" || path.Base(file) == "testdata" || path.Base(file) == "node_modules" || file != "." && strings.HasPrefix(path.Base(file), ".")):
			return fs.SkipDir
		case d.IsDir() || path.Ext(file) != ext:
			return nil
		}
		source, err := fs.ReadFile(tree, file)
		if err == nil {
			seen++
			visit(file, source)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen == 0 {
		t.Fatalf("no file *%s was found", ext)
	}
}

func TestSources(t *testing.T) {
	text := map[string]string{}
	sources(t, ".go", func(file string, source []byte) {
		text[file] = string(source)
		for _, finding := range findings(file, source) {
			t.Error(finding)
		}
	})
	for of, list := range map[string][]place{"Reveal": reveals, ".Skip": skips, "time.Now": clocks} {
		for _, p := range list {
			if !strings.Contains(text[p.file], of) || p.why == "" {
				t.Errorf("the exception for %s in %s has nothing to except, or no reason", of, p.file)
			}
		}
	}
}

// TestSourcesBite checks that the rules find breaches.
func TestSourcesBite(t *testing.T) {
	for _, row := range []struct {
		file, body string
		found      int
	}{
		{"broker/issue.go", `var _ = clock.Now()`, 0},
		{"broker/issue.go", `var _ = time.Now()`, 1},
		{"broker/broker.go", `var now = time.Now`, 1},
		{"broker/agent/step.go", `var _ = time.Now()`, 0},
		{"broker/issue_test.go", `var _ = time.Now()`, 0},
		{"plugins/ssh/ssh.go", `var _ = secret.Reveal()`, 1},
		{"plugins/ssh/ssh.go", `var f = broker.Secret.Reveal`, 1},
		{"plugins/ssh/more_test.go", `var _ = secret.Reveal()`, 0},
		{"broker/server/agents.go", `var _ = issued.Secret.Reveal()`, 0},
		{"attest/jwt_test.go", `func f() { t.Skip("later") }`, 1},
		{"attest/jwt_test.go", `func f() { t.SkipNow() }`, 1},
		{"cmd/parts/need.go", `func f() { t.Skipf("none") }`, 0},
		{"attest/jwt_test.go", `func f() { time.Sleep(1) }`, 1},
		{"attest/jwt.go", "// TODO: later", 1},
		{"attest/jwt.go", "// FIXME(#12): later", 1},
		{"attest/jwt.go", "// TODO(#12): when go-jose refuses it itself", 0},
		{"attest/jwt.go", "// TODO(@ana): when go-jose refuses it itself", 0},
		{"attest/jwt.go", "var x = 1 //nolint", 1},
		{"attest/jwt.go", "var x = 1 //nolint:errcheck", 1},
		{"attest/jwt.go", "var x = 1 //nolint:errcheck // only read", 0},
		{"attest/jwt.go", "func {", 1},
	} {
		if got := findings(row.file, []byte("package p\n"+row.body+"\n")); len(got) != row.found {
			t.Errorf("findings(%s, %s) = %q, want %d", row.file, row.body, got, row.found)
		}
	}
}
