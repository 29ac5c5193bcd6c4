package rules_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/pawlsec/pawl"

// pkg is a package as `go list` prints it.
type pkg struct {
	ImportPath, Name, Doc              string
	Imports, TestImports, XTestImports []string
}

// ours returns the package's path in the module, and whether it is in the module. The root is ".".
func ours(importPath string) (string, bool) {
	if importPath == module {
		return ".", true
	}
	return strings.CutPrefix(importPath, module+"/")
}

func isStandard(importPath string) bool {
	first, _, _ := strings.Cut(importPath, "/")
	return !strings.Contains(first, ".")
}

// row lists the packages of ours that the packages of a pattern may import, and the reason for it.
type row struct {
	pattern string
	may     []string // patterns
	tests   []string // more for their tests, beside the package itself and forTests
	why     string
}

// forTests are packages that every test may import.
var forTests = []string{"broker/brokertest", "broker/engine", "cmd/parts"}

// forAll are packages that every package may import, the SDK too, unless never forbids it. They import the standard
// library alone.
var forAll = []string{"broker/backoff"}

// The first row that fits a package counts. A package without a row is an error: add its row with the package. A row
// may name a package that does not exist yet.
var rows = []row{
	{"broker", []string{"broker/args"}, []string{"broker/selector", "broker/args/argstest", "store/*"},
		"the words and the ports depend on broker/args alone: everything else may change without them"},
	{"broker/args/argstest", []string{"broker/args"}, nil, "it draws arguments and constraints for tests"},
	{"broker/args", nil, []string{"broker", "broker/args/argstest"}, "arguments and their constraints are read without learning anything else"},
	{"broker/selector", []string{"broker", "broker/args"}, nil, "a selector knows no ledger and no procedure"},
	{"broker/engine/internal/records", []string{"broker", "broker/args", "broker/selector"}, []string{"store/*"},
		"records know no procedure"},
	{"broker/engine/internal/ahead", []string{"broker", "broker/engine/internal/records"}, nil,
		"it makes tokens and ends them, and knows no issue"},
	{"broker/engine/internal/archiving", []string{"broker", "broker/selector", "broker/engine/internal/records"}, nil,
		"it moves what is closed, and knows no procedure"},
	{"broker/engine/internal/draw", nil, nil, "it draws values, and knows nothing of the domain"},
	{"broker/engine/internal/indexing", []string{"broker", "broker/engine/internal/records"}, nil,
		"it keeps the index of chains, and knows no procedure"},
	{"broker/engine/internal/model", nil, nil, "a model that shared code with the engine would share its mistakes"},
	{"broker/engine/internal/planning", []string{"broker"}, nil, "it counts, and reads no ledger"},
	{"broker/engine/internal/requests", []string{"broker", "broker/args"}, nil, "it reads a request and no ledger"},
	{"broker/engine/internal/sched", nil, nil, "a heap and a set of keys know nothing of the domain"},
	{"broker/engine/internal/volatile", []string{"broker", "broker/engine/internal/sched"}, nil, "it keeps what a restart loses, and decides nothing"},
	{"broker/engine/internal/closing", []string{"broker", "broker/args", "broker/engine/internal/records", "broker/engine/internal/sched"}, []string{"store/*"},
		"closing knows records, and no procedure that asks for it"},
	{"broker/engine/internal/sweeping", []string{"broker", "broker/engine/internal/closing", "broker/engine/internal/records", "broker/engine/internal/volatile"},
		[]string{"store/*"}, "sweeping knows records and the reaper, and no procedure that asks for it"},
	{"broker/engine", []string{"broker", "broker/args", "broker/selector", "broker/engine/internal/*"}, []string{"broker/args/argstest", "store/*"},
		"the procedures know the ports and no adapter"},
	{"broker/backoff", nil, nil, "every package may import it"},
	{"broker/yaml", nil, nil, "it reads a format, and knows nothing of the domain"},
	{"broker/api", nil, nil, "wire types are a contract with clients in other languages, not a view of our own types"},
	{"broker/api/apitest", []string{"broker/api"}, nil, "it compares answers with the document, and knows nothing behind the wire"},
	{"broker/api/client", []string{"broker/api"}, nil, "a client knows the wire and nothing behind it"},
	{"broker/agent", []string{"broker/api", "broker/api/client"}, []string{"attest/workload"},
		"a program that links the SDK must not link the broker, a store or Vault"},
	{"broker/operator", []string{"broker/api", "broker/api/client"}, nil, "a client knows the wire and nothing behind it"},
	{"broker/server", []string{"broker", "broker/args", "broker/selector", "broker/api"},
		[]string{"broker/agent", "broker/operator", "broker/api/client", "broker/api/apitest"}, "HTTP must not know Vault or a store"},
	{"broker/brokertest", []string{"broker", "broker/args", "broker/selector", "broker/engine"}, nil,
		"the suites of every ledger and backend cannot know one of them"},
	{"broker/jws", []string{"broker"}, nil, "a signed token is opened without learning its purpose"},
	{"broker/envelope", []string{"broker", "broker/args", "broker/jws"}, nil, "an envelope is verified as a pure function of an issuer's keys"},
	{"broker/signals", []string{"broker", "broker/args", "broker/selector", "broker/jws"}, nil, "it opens the tokens of other parties"},
	{"broker/policy", []string{"broker", "broker/args", "broker/envelope", "broker/jws", "broker/yaml"}, nil, "a bundle names the issuers of envelopes"},
	{"broker/*", []string{"broker", "broker/args", "broker/selector"}, nil,
		"parts of the broker meet in package broker's ports only"},
	{"attest", []string{"broker"}, []string{"attest/workload"}, "it makes a Caller of an SVID and decides nothing"},
	{"attest/workload", nil, nil, "other packages start it in their tests of anything that speaks SPIFFE"},
	{"store/bolt/internal/journal", nil, nil, "it keeps bytes, and knows no ledger"},
	{"store/bolt", []string{"broker", "broker/args", "broker/selector", "store/bolt/internal/journal"}, []string{"store/power"},
		"an adapter may have rooms of its own"},
	{"store/power", nil, []string{"broker", "broker/selector", "store/bolt"},
		"a loss of power knows files, and nothing of what is in them"},
	{"store/archive", []string{"broker", "broker/audit"}, []string{"broker/args", "broker/selector", "store/bolt"},
		"the entries of a segment make the tree that checkpoints sign; it knows no ledger's file"},
	{"store/*", []string{"broker", "broker/args", "broker/selector"}, nil,
		"adapters never import each other: each can be removed alone"},
	{"plugins/*", []string{"broker", "broker/args", "broker/selector"}, nil,
		"adapters never import each other: each can be removed alone"},
	{"cmd/parts", nil, nil, "all tests start servers by it, so it can depend on nothing that they test"},
	{"cmd/parts/*", []string{"cmd/parts"}, nil, "the builders and runners of real servers know nothing of the product"},
	{"cmd/bench/profiled", []string{"cmd/wire"}, nil, "it runs the broker, and measures nothing"},
	{"cmd/bench/*", []string{"cmd/bench/*"}, nil, "the report and the flooder of the measurements know nothing of the product"},
	{"cmd/rules/*", nil, nil, "a check of the tree must not depend on the tree"},
	{"cmd/wire", []string{"attest", "broker", "broker/*", "broker/api/client", "store/*", "plugins/*"}, []string{"attest/workload", "broker/api/apitest"},
		"it makes a broker of parts; commands make something of it"},
	{"cmd/*", []string{"*", "*/*", "*/*/*"}, []string{"*", "*/*", "*/*/*"}, "commands wire everything"},
	{".", nil, []string{"*", "*/*"}, "the root has no product code"},
}

// only lists packages that few may import. Tests are not held to it.
var only = []struct {
	pattern string
	by      []string // patterns; none: tests alone
	why     string
}{
	{"broker/engine", []string{"cmd/*", "broker/brokertest"}, "adapters know the ports, and only cmd wires"},
	{"broker/api/apitest", nil, "it is for tests"},
	{"broker/brokertest", []string{"cmd/bench"}, "it has failures to order, which a running broker must not"},
	{"store/power", nil, "it is for tests"},
	{"cmd/parts", []string{"cmd/*", "cmd/parts/*"}, "it starts servers with root tokens, which are for development"},
	{"cmd/*", []string{"cmd/*", "cmd/parts/*", "cmd/bench/profiled"}, "only cmd wires, and nothing depends on the wiring"},
}

// homes lists the packages that may use a dependency, and the reason why no other may. cmd/bench is never shipped. It
// measures the bare parts and may use all.
var homes = []struct {
	path string // with all packages below it
	in   []string
	why  string
}{
	{"github.com/cedar-policy/cedar-go", []string{"broker/policy"}, "a caller asks for a decision in broker's words"},
	{"github.com/go-jose/go-jose/v4", []string{"attest", "attest/workload", "broker/agent", "broker/audit", "broker/envelope", "broker/jws", "broker/policy", "broker/server", "broker/signals", "cmd/*", "plugins/jwt"}, "signatures and seals are made and checked where bytes leave and come in"},
	{"github.com/hashicorp/vault/api", []string{"cmd/parts"}, "the stock client re-sends mints and follows redirects"},
	{"github.com/jackc/pgx/v5", []string{"plugins/postgres", "store/postgres", "cmd/*"}, "one plugin and one store talk to PostgreSQL"},
	{"go.etcd.io/bbolt", []string{"store/bolt"}, "the ledger's file has one owner"},
	{"github.com/spf13/cobra", []string{"cmd/pawl"}, "commands are the surface, not the inside"},
	{"google.golang.org/grpc", []string{"attest/workload"}, "only the Workload API is gRPC"},
	{"golang.org/x/crypto/ssh", []string{"plugins/ssh", "cmd/*"}, "one plugin speaks SSH"},
	{"testing", []string{"broker/api/apitest", "broker/brokertest", "store/power"}, "no program that we ship links package testing"},
	{"pgregory.net/rapid", nil, "it draws cases for tests"},
}

// domain is package broker with the packages that it was divided into, and forAll. They do no I/O.
var domain = append([]string{"broker", "broker/args", "broker/selector", "broker/engine", "broker/engine/*", "broker/engine/*/*"}, forAll...)

// never lists packages of the standard library and of forAll that a package must not import.
var never = []struct {
	in, except []string // patterns
	path       string
	why        string
}{
	{domain, nil, "os", "it does no I/O: it asks for the world over a port"},
	{domain, nil, "os/exec", "it does no I/O: it asks for the world over a port"},
	{domain, nil, "net", "it does no I/O: it asks for the world over a port"},
	{domain, nil, "net/http", "it does no I/O, and kinds are mapped to HTTP in broker/server"},
	{domain, nil, "crypto/rand", "randomness comes from Config, so that a test can choose it"},
	{domain, nil, "database/sql", "it does no I/O: it asks for the world over a port"},
	{domain, nil, "log", "it returns errors and raises alarms over a port"},
	{[]string{"broker/policy", "broker/envelope", "broker/jws"}, nil, "os", "a decision is a pure function of a bundle and a question"},
	{[]string{"broker/policy", "broker/envelope", "broker/jws"}, nil, "net", "a decision is a pure function of a bundle and a question"},
	{[]string{"broker/policy", "broker/envelope", "broker/jws"}, nil, "net/http", "a decision is a pure function of a bundle and a question"},
	{[]string{"broker/policy", "broker/envelope", "broker/jws"}, nil, "context", "a decision waits for nothing"},
	{[]string{"broker", "broker/args", "broker/selector", "broker/policy"}, nil, module + "/broker/backoff", "rules and decisions wait for nothing"},
	{[]string{"plugins/*"}, []string{"plugins/exec"}, "os/exec", "plugins/exec alone starts programs"},
	{[]string{"store/*"}, nil, "net/http", "a store serves no requests"},
}

// library says which packages of the domain may import what besides the standard library and spiffeid.
var library = map[string][]string{
	"golang.org/x/sync/errgroup":   {"broker/engine/internal/closing"}, // calls to Vault side by side
	"github.com/fxamacker/cbor/v2": {"broker/engine/internal/records"}, // the format of records
}

func matches(pattern, p string) bool {
	ok, err := path.Match(pattern, p)
	if err != nil {
		panic("rules: a pattern of the table is malformed: " + pattern)
	}
	return ok
}

func matchesAny(patterns []string, p string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool { return matches(pattern, p) })
}

// breaches returns the forbidden imports of the packages, each with the reason.
func breaches(list []pkg) (found []string) {
	for _, p := range list {
		name, ok := ours(p.ImportPath)
		if !ok {
			found = append(found, fmt.Sprintf("%s is not in module %s", p.ImportPath, module))
			continue
		}
		i := slices.IndexFunc(rows, func(r row) bool { return matches(r.pattern, name) })
		if i < 0 {
			found = append(found, fmt.Sprintf("%s has no row in rows: add one", name))
			continue
		}
		for _, imported := range p.Imports {
			if why := forbidden(rows[i], name, imported); why != "" {
				found = append(found, fmt.Sprintf("%s imports %s: %s", name, imported, why))
			}
		}
		for _, imported := range append(p.TestImports, p.XTestImports...) {
			if why := forbiddenInTests(rows[i], name, imported); why != "" {
				found = append(found, fmt.Sprintf("a test of %s imports %s: %s", name, imported, why))
			}
		}
	}
	return found
}

// forbidden returns the reason why name must not import a package; empty: it may.
func forbidden(r row, name, imported string) string {
	for _, n := range never {
		if n.path == imported && matchesAny(n.in, name) && !matchesAny(n.except, name) {
			return n.why
		}
	}
	for _, h := range homes {
		if (imported == h.path || strings.HasPrefix(imported, h.path+"/")) && name != "cmd/bench" && name != "cmd/bench/process" && !matchesAny(h.in, name) {
			return h.why
		}
	}
	other, isOurs := ours(imported)
	if !isOurs {
		if matchesAny(domain, name) && !isStandard(imported) && imported != "github.com/spiffe/go-spiffe/v2/spiffeid" && !matchesAny(library[imported], name) {
			return "it imports the standard library and spiffeid, so that its rules can be read without learning anything else"
		}
		return ""
	}
	for _, o := range only {
		if matches(o.pattern, other) && !matchesAny(o.by, name) {
			return o.why
		}
	}
	if !matchesAny(r.may, other) && !slices.Contains(forAll, other) {
		return r.why
	}
	return ""
}

func forbiddenInTests(r row, name, imported string) string {
	other, isOurs := ours(imported)
	if !isOurs || other == name || slices.Contains(forTests, other) || slices.Contains(forAll, other) || matchesAny(r.may, other) || matchesAny(r.tests, other) {
		return ""
	}
	return r.why
}

// list runs `go list` in the module's root.
func list(t *testing.T, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list"}, args...)...)
	cmd.Dir = root(t)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		t.Fatalf("go list %s: %v", strings.Join(args, " "), err)
	}
	return out
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func packages(t *testing.T) (all []pkg) {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(list(t, "-json=ImportPath,Name,Doc,Imports,TestImports,XTestImports", "./...")))
	for {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestImports(t *testing.T) {
	all := packages(t)
	if len(all) < 20 {
		t.Fatalf("go list gave %d packages; the tree has more", len(all))
	}
	for _, breach := range breaches(all) {
		t.Error(breach)
	}
	for _, r := range rows {
		if r.why == "" {
			t.Errorf("row %q has no reason", r.pattern)
		}
	}
}

func TestPackageComments(t *testing.T) {
	for _, p := range packages(t) {
		if p.Name == "" || strings.HasSuffix(p.Name, "_test") {
			continue // tests alone
		}
		if !commented(p) {
			t.Errorf("package comment of %s = %.40q, want its name and its job in one sentence", p.ImportPath, p.Doc)
		}
	}
}

func commented(p pkg) bool {
	if p.Name != "main" {
		return strings.HasPrefix(p.Doc, "Package "+p.Name+" ")
	}
	name := path.Base(p.ImportPath)
	return strings.HasPrefix(p.Doc, "Command "+name+" ") || strings.HasPrefix(p.Doc, strings.ToUpper(name[:1])+name[1:]+" ")
}

func TestPackageCommentsBite(t *testing.T) {
	for _, row := range []struct {
		path, name, doc string
		want            bool
	}{
		{"attest", "attest", "Package attest makes Callers.", true}, {"attest", "attest", "", false}, {"attest", "attest", "Package attestation does.", false},
		{"cmd/pawl", "main", "Command pawl is it.", true}, {"cmd/bench", "main", "Bench measures.", true}, {"cmd/bench", "main", "Package main measures.", false},
	} {
		if got := commented(pkg{ImportPath: module + "/" + row.path, Name: row.name, Doc: row.doc}); got != row.want {
			t.Errorf("commented(%s, %q) = %v, want %v", row.path, row.doc, got, row.want)
		}
	}
}

// TestModuleGraph checks that the servers that tests run are in modules of their own.
func TestModuleGraph(t *testing.T) {
	for module := range strings.Lines(string(list(t, "-m", "-f", "{{.Path}}", "all"))) {
		switch module = strings.TrimSpace(module); {
		case module == "github.com/hashicorp/vault/api":
		case strings.HasPrefix(module, "github.com/hashicorp/vault"), strings.HasPrefix(module, "github.com/openbao/openbao"),
			strings.HasPrefix(module, "github.com/spiffe/spire"):
			t.Errorf("%s is in the product's module graph: servers for tests are built from go.mod files of their own", module)
		}
	}
	for dep := range strings.Lines(string(list(t, "-deps", "./cmd/pawl"))) {
		switch dep = strings.TrimSpace(dep); dep {
		case "testing", module + "/broker/brokertest", module + "/broker/api/apitest", module + "/store/power":
			t.Errorf("cmd/pawl links %s, which is for tests", dep)
		}
	}
}

// TestImportsBite checks that the tables refuse forbidden imports.
func TestImportsBite(t *testing.T) {
	for _, row := range []struct {
		name     string
		imports  string
		inTest   bool
		breaches int
	}{
		{"broker", "strings", false, 0},
		{"broker", "github.com/spiffe/go-spiffe/v2/spiffeid", false, 0},
		{"broker", "github.com/spiffe/go-spiffe/v2/svid/x509svid", false, 1},
		{"broker", "os", false, 1},
		{"broker", module + "/broker/api", false, 1},
		{"broker", module + "/broker/brokertest", false, 1},
		{"broker", module + "/broker/brokertest", true, 0},
		{"broker", module + "/broker/args", false, 0},
		{"broker", module + "/broker/selector", false, 1},
		{"broker", module + "/broker/engine", false, 1},
		{"broker", module + "/broker/engine", true, 0},
		{"broker/args", module + "/broker", false, 1},
		{"broker/args", "os", false, 1},
		{"broker/args", "strings", false, 0},
		{"broker/selector", module + "/broker/args", false, 0},
		{"broker/selector", module + "/broker/engine", false, 1},
		{"broker/selector", "net", false, 1},
		{"broker/selector", "github.com/spiffe/go-spiffe/v2/spiffeid", false, 0},
		{"broker/engine", module + "/broker/selector", false, 0},
		{"broker/engine", module + "/broker/engine/internal/records", false, 0},
		{"broker/engine", module + "/store/bolt", false, 1},
		{"broker/engine", module + "/store/bolt", true, 0},
		{"broker/engine", "log", false, 1},
		{"broker/engine", "github.com/jackc/pgx/v5", false, 1},
		{"broker/engine/internal/records", module + "/broker/selector", false, 0},
		{"broker/engine/internal/records", module + "/broker/engine/internal/closing", false, 1},
		{"broker/engine/internal/records", module + "/broker/engine", false, 1},
		{"broker/engine/internal/records", "crypto/rand", false, 1},
		{"broker/engine/internal/closing", module + "/broker/engine/internal/records", false, 0},
		{"broker/engine/internal/closing", module + "/broker/selector", false, 1},
		{"broker/engine/internal/closing", "net/http", false, 1},
		{"broker/engine/internal/more", "strings", false, 1},
		{"broker/brokertest", module + "/broker/engine", false, 0},
		{"broker/audit", module + "/broker/selector", false, 0},
		{"broker/audit", module + "/broker/engine", false, 1},
		{"broker/signals", module + "/broker/args", false, 0},
		{"broker/server", module + "/broker/args", false, 0},
		{"broker/server", module + "/broker/engine", false, 1},
		{"broker/server", module + "/broker/engine", true, 0},
		{"store/bolt", module + "/broker/args", false, 0},
		{"store/bolt", module + "/broker/engine", false, 1},
		{"plugins/ssh", module + "/broker/selector", false, 0},
		{"plugins/ssh", module + "/broker/engine", false, 1},
		{"cmd/wire", module + "/broker/engine", false, 0},
		{"cmd/wire", module + "/broker/args", false, 0},
		{"cmd/bench", module + "/broker/engine", false, 0},
		{"cmd/parts", module + "/broker/engine", false, 1},
		{"broker/policy", module + "/plugins/vault", false, 1},
		{"broker/policy", "context", false, 1},
		{"broker/audit", module + "/store/bolt", false, 1},
		{"broker/server", module + "/plugins/vault", false, 1},
		{"broker/server", module + "/broker/agent", false, 1},
		{"broker/server", module + "/broker/agent", true, 0},
		{"broker/agent", module + "/broker", false, 1},
		{"broker/agent", module + "/broker/api/client", false, 0},
		{"broker/agent", module + "/broker/backoff", false, 0},
		{"broker/engine/internal/closing", module + "/broker/backoff", false, 0},
		{"plugins/vault", module + "/broker/backoff", false, 0},
		{"store/bolt", module + "/broker/backoff", true, 0},
		{"broker/policy", module + "/broker/backoff", false, 1},
		{"broker/backoff", "math/rand/v2", false, 0},
		{"broker/backoff", module + "/broker", false, 1},
		{"broker/backoff", "github.com/cenkalti/backoff/v5", false, 1},
		{"broker/backoff", "net", false, 1},
		{"plugins/ssh", module + "/plugins/vault", false, 1},
		{"plugins/ssh", module + "/plugins/vault", true, 1},
		{"plugins/ssh", module + "/cmd/parts", false, 1},
		{"plugins/ssh", module + "/cmd/parts", true, 0},
		{"plugins/ssh", "github.com/hashicorp/vault/api", false, 1},
		{"plugins/ssh", "github.com/jackc/pgx/v5/pgxpool", false, 1},
		{"store/bolt", module + "/store/postgres", false, 1},
		{"attest", module + "/attest/workload", false, 1},
		{"cmd/parts", module + "/broker", false, 1},
		{"plugins/exec", "os/exec", false, 0},
		{"plugins/etcd", "os/exec", false, 1},
		{"plugins/ssh", "os/exec", false, 1},
		{"cmd/wire", module + "/cmd/dev", false, 1},
		{"cmd/pawl", module + "/cmd/dev", false, 0},
		{"cmd/pawl", "testing", false, 1},
		{"cmd/dev", module + "/broker/brokertest", false, 1},
		{"console", module + "/broker", false, 1},
	} {
		p := pkg{ImportPath: module + "/" + row.name}
		if row.inTest {
			p.XTestImports = []string{row.imports}
		} else {
			p.Imports = []string{row.imports}
		}
		if got := breaches([]pkg{p}); len(got) != row.breaches {
			t.Errorf("breaches(%s imports %s, in a test: %v) = %q, want %d", row.name, row.imports, row.inTest, got, row.breaches)
		}
	}
}
