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
	tableBegins = "<!-- from cmd/wire/config.go, by go test ./cmd/rules -run Reference -update -->\n"
	tableEnds   = "<!-- end -->\n"
)

// TestReference holds that docs/configuration.md has each key of the configuration, in the words of
// the code.
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
	table := "\n| key | is | what it says |\n|---|---|---|\n" + keys(reflect.TypeFor[wire.Config](), "", fieldComments(t)) + "\n"
	if table == old {
		return
	}
	if !*update {
		t.Fatalf("the table of %s is not what cmd/wire/config.go says; -update writes it", page)
	}
	if err := os.WriteFile(page, []byte(before+tableBegins+table+tableEnds+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

// keys gives a row for each key below a struct.
func keys(s reflect.Type, prefix string, comments map[string]string) string {
	var out strings.Builder
	for f := range s.Fields() {
		name := prefix + f.Tag.Get("yaml")
		what := comments[s.Name()+"."+f.Name]
		switch {
		case f.Type == reflect.TypeFor[time.Duration]():
			fmt.Fprintf(&out, "| `%s` | duration | %s |\n", name, what)
		case f.Type.Kind() == reflect.Struct:
			out.WriteString(keys(f.Type, name+".", comments))
		case f.Type.Kind() == reflect.Map:
			fmt.Fprintf(&out, "| `%s` | map | %s |\n", name, what)
			out.WriteString(keys(f.Type.Elem(), name+".NAME.", comments))
		case f.Type.Kind() == reflect.Slice:
			fmt.Fprintf(&out, "| `%s` | list | %s |\n", name, what)
		default:
			fmt.Fprintf(&out, "| `%s` | %s | %s |\n", name, f.Type.Kind(), what)
		}
	}
	return out.String()
}

// fieldComments reads what config.go says beside each field.
func fieldComments(t *testing.T) map[string]string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root(t), "cmd/wire/config.go"), nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	comments := map[string]string{}
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		s, ok := spec.Type.(*ast.StructType)
		if !ok {
			return true
		}
		for _, field := range s.Fields.List {
			for _, name := range field.Names {
				text := strings.TrimSpace(field.Comment.Text())
				if text == "" {
					t.Errorf("field %s.%s of the configuration says nothing of itself", spec.Name, name)
				}
				comments[spec.Name.Name+"."+name.Name] = strings.ReplaceAll(text, "|", `\|`)
			}
		}
		return false
	})
	return comments
}
