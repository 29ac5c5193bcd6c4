package rules_test

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

const architecturePage = "docs/architecture.md"

var (
	span         = regexp.MustCompile("`([^`\n]+)`")
	fileSpan     = regexp.MustCompile(`^[\w./-]+\.(go|sql)$`)
	functionSpan = regexp.MustCompile(`^(?:[A-Za-z]\w*\.)?([A-Za-z]\w*)\(\)$`)
)

// architecture compares a page with the tree.
type architecture struct {
	tree  fs.FS
	named map[string]bool // files of the tree that the page names
	found []string        // what is wrong
}

// architectureFindings returns what is wrong with the page. Below a heading that is the path of a package, files are
// relative to it. Elsewhere they are relative to the root or to broker/engine.
func architectureFindings(tree fs.FS, page string, packages []string) []string {
	a := architecture{tree: tree, named: map[string]bool{}}
	var homes []string
	home := ""
	for i, line := range strings.Split(page, "\n") {
		if strings.HasPrefix(line, "#") {
			home = ""
			if m := span.FindStringSubmatch(line); m != nil && strings.HasSuffix(line, " "+m[0]) && strings.Count(line, "`") == 2 {
				home = m[1]
				homes = append(homes, home)
			}
			continue
		}
		a.line(i+1, home, line)
	}
	for _, p := range packages {
		if !strings.Contains(page, "`"+p+"`") {
			a.say("%s does not name package %s", architecturePage, p)
		}
		if (p == "broker/engine" || strings.HasPrefix(p, "broker/engine/")) && !slices.Contains(homes, p) {
			a.say("%s has no table of the files of %s", architecturePage, p)
		}
	}
	for _, home := range homes {
		a.complete(home)
	}
	return a.found
}

func (a *architecture) say(format string, args ...any) {
	a.found = append(a.found, fmt.Sprintf(format, args...))
}

// line checks the files and functions that a line names.
func (a *architecture) line(number int, home, line string) {
	var files, functions []string
	for _, m := range span.FindAllStringSubmatch(line, -1) {
		if f := functionSpan.FindStringSubmatch(m[1]); f != nil {
			functions = append(functions, f[1])
		}
		if !fileSpan.MatchString(m[1]) {
			continue
		}
		if file := a.resolve(home, m[1]); file != "" {
			files = append(files, file)
			a.named[file] = true
		} else {
			a.say("%s:%d names %s, which does not exist", architecturePage, number, m[1])
		}
	}
	for _, f := range functions {
		if len(files) > 0 && !slices.ContainsFunc(files, func(file string) bool { return a.declares(file, f) }) {
			a.say("%s:%d names %s(), which %s does not declare", architecturePage, number, f, strings.Join(files, ", "))
		}
	}
}

func (a *architecture) resolve(home, file string) string {
	for _, dir := range []string{home, ".", "broker/engine"} {
		if dir == "" {
			continue
		}
		if info, err := fs.Stat(a.tree, path.Join(dir, file)); err == nil && !info.IsDir() {
			return path.Join(dir, file)
		}
	}
	return ""
}

func (a *architecture) declares(file, function string) bool {
	source, err := fs.ReadFile(a.tree, file)
	return err == nil && regexp.MustCompile(`(?m)^(func (\([^)\n]*\) )?|CREATE OR REPLACE FUNCTION \w+\.)`+function+`[\[(]`).Match(source)
}

// complete checks that the page names each file of a package.
func (a *architecture) complete(home string) {
	files, err := fs.Glob(a.tree, home+"/*.go")
	if err != nil || len(files) == 0 {
		a.say("%s has a heading for %s, which is no package", architecturePage, home)
	}
	for _, file := range files {
		if !strings.HasSuffix(file, "_test.go") && path.Base(file) != "doc.go" && !a.named[file] {
			a.say("%s does not name %s", architecturePage, file)
		}
	}
}

// TestArchitecture checks that the page names every package, every file of the packages with a heading of their own, and
// no file or function that does not exist.
func TestArchitecture(t *testing.T) {
	tree := os.DirFS(root(t))
	page, err := fs.ReadFile(tree, architecturePage)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range packages(t) {
		if name, ok := ours(p.ImportPath); ok && name != "." {
			names = append(names, name)
		}
	}
	for _, finding := range architectureFindings(tree, string(page), names) {
		t.Error(finding)
	}
}

// TestArchitectureBites checks that the comparison finds a page that has gone stale.
func TestArchitectureBites(t *testing.T) {
	tree := fstest.MapFS{}
	for file, text := range map[string]string{
		"broker/engine/issue.go":      "package engine\n\nfunc (s *issue) recheck() {}\n",
		"broker/engine/issue_test.go": "package engine\n",
		"broker/engine/doc.go":        "package engine\n",
		"store/bolt/tx.go":            "package bolt\n\nfunc open[T any]() {}\n",
		"plugins/postgres/b.sql":      "CREATE OR REPLACE FUNCTION pawl.sever(\n",
	} {
		tree[file] = &fstest.MapFile{Data: []byte(text)}
	}
	for _, row := range []struct {
		page  string
		found int
	}{
		{"### `broker/engine`\n| `issue.go` | `recheck()` |\n`store/bolt`", 0},
		{"`broker/engine` `store/bolt`\n", 1}, // no table
		{"### `broker/engine`\n`store/bolt`", 1},
		{"### `broker/engine`\n| `issue.go` | |\n", 1},
		{"### `broker/engine`\n| `issue.go` | `gone()` |\n`store/bolt`", 1},
		{"### `broker/engine`\n| `issue.go` | |\n| `gone.go` | |\n`store/bolt`", 1},
		{"### `broker/engine`\n| `issue.go` | |\n## B\n`store/bolt` `tx.go`", 1},
		{"### `broker/engine`\n| `issue.go` | |\n## B\n`store/bolt` `store/bolt/tx.go` `open()` `issue.go`", 0},
		{"### `broker/engine`\n| `issue.go` | |\n### `store/bolt`\n| `tx.go` | `T.open()` |\n| `issue.go` | `open()` |", 1},
		{"### `broker/engine`\n| `issue.go` | |\n### `store/none`\n`store/bolt`", 1},
		{"### `broker/engine`\n| `issue.go` | |\n`store/bolt` `plugins/postgres/b.sql` `pawl.sever()`", 0},
	} {
		found := architectureFindings(tree, row.page, []string{"broker/engine", "store/bolt"})
		if len(found) != row.found {
			t.Errorf("architectureFindings(%q) = %q, want %d", row.page, found, row.found)
		}
	}
}
