package rules_test

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/cmd/wire"
)

var update = flag.Bool("update", false, "write the table of docs/configuration.md")

const (
	tableBegins = "<!-- from the comments in cmd/wire, by go test ./cmd/rules -run Reference -update -->\n"
	tableEnds   = "<!-- end -->\n"
)

// TestReference checks that docs/configuration.md lists each key of the configuration with its comment in the code.
func TestReference(t *testing.T) {
	page := filepath.Join(root(t), "docs/configuration.md")
	raw, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(raw), tableBegins)
	old, after, ended := strings.Cut(rest, tableEnds)
	if !ok || !ended {
		t.Fatalf("%s has no place for the table", page)
	}
	table := "\n| key | type | meaning |\n|---|---|---|\n" + keys(t, reflect.TypeFor[wire.Config](), "", fieldComments(t)) + "\n"
	if table == old {
		return
	}
	if !*update {
		t.Fatalf("the table of %s differs from the comments in cmd/wire: run go test ./cmd/rules -run Reference -update", page)
	}
	if err := os.WriteFile(page, []byte(before+tableBegins+table+tableEnds+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

// keys returns a row for each key below a struct.
func keys(t *testing.T, s reflect.Type, prefix string, comments map[string]string) string {
	t.Helper()
	var out strings.Builder
	for f := range s.Fields() {
		name := prefix + f.Tag.Get("yaml")
		what, ok := comments[s.Name()+"."+f.Name]
		is, below := f.Type.Kind().String(), ""
		var of reflect.Type
		switch {
		case f.Type == reflect.TypeFor[time.Duration]():
			is = "duration"
		case f.Type.Kind() == reflect.Struct:
			out.WriteString(keys(t, f.Type, name+".", comments))
			continue
		case f.Type.Kind() == reflect.Map:
			below, of = name+".NAME.", f.Type.Elem()
		case f.Type.Kind() == reflect.Slice:
			is, below, of = "list", name+"[].", f.Type.Elem()
		case f.Type.Kind() == reflect.Pointer:
			is, below, of = "map", name+".", f.Type.Elem()
		}
		if !ok {
			t.Errorf("key %s of the configuration has no comment", name)
		}
		fmt.Fprintf(&out, "| `%s` | %s | %s |\n", name, is, what)
		if of != nil && of.Kind() == reflect.Struct {
			out.WriteString(keys(t, of, below, comments))
		}
	}
	return out.String()
}

// fieldComments reads the comments of the fields of the types in cmd/wire.
func fieldComments(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root(t), "cmd/wire/*.go"))
	if err != nil {
		t.Fatal(err)
	}
	comments := map[string]string{}
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok {
				return true
			}
			if s, ok := spec.Type.(*ast.StructType); ok {
				comment(comments, spec.Name.Name, s)
			}
			return false
		})
	}
	return comments
}

func comment(comments map[string]string, name string, s *ast.StructType) {
	for _, field := range s.Fields.List {
		text := field.Comment.Text()
		if text == "" {
			text = field.Doc.Text()
		}
		for _, f := range field.Names {
			if text != "" {
				comments[name+"."+f.Name] = strings.ReplaceAll(strings.Join(strings.Fields(text), " "), "|", `\|`)
			}
		}
	}
}
