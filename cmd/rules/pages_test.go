package rules_test

import (
	"go/parser"
	"go/token"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// citation is a page that a comment or another page names.
type citation struct {
	page string
	line int
}

var (
	pageName   = regexp.MustCompile(`[^\s"'` + "`" + `()<>\[\]{},;|]*[A-Za-z0-9_-]\.md\b`)
	linkLabel  = regexp.MustCompile(`\[[^\[\]\n]*\]\(`)
	sqlComment = regexp.MustCompile(`(^|\s)--(\s.*)`)
)

// citations returns the pages that a Go or SQL file names in comments, or that a page names anywhere but in the label of
// a link. A URL names no page of ours, and a name with * or … is a pattern.
func citations(t *testing.T, file string, source []byte) (found []citation) {
	t.Helper()
	read := func(line int, text string) {
		for i, text := range strings.Split(text, "\n") {
			for _, page := range pageName.FindAllString(text, -1) {
				if !strings.Contains(page, "://") && !strings.ContainsAny(page, "*…") {
					found = append(found, citation{page, line + i})
				}
			}
		}
	}
	switch path.Ext(file) {
	case ".go":
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, file, source, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, group := range f.Comments {
			for _, c := range group.List {
				read(set.Position(c.Pos()).Line, c.Text)
			}
		}
	case ".sql":
		for i, line := range strings.Split(string(source), "\n") {
			if c := sqlComment.FindStringSubmatch(line); c != nil {
				read(i+1, c[2])
			}
		}
	default:
		read(1, linkLabel.ReplaceAllString(string(source), "("))
	}
	return found
}

// TestCitedPages checks that every page that a comment or a page names is in the repository. A name is relative to the
// file that names it, to docs/ or to the root.
func TestCitedPages(t *testing.T) {
	for _, ext := range []string{".go", ".sql", ".md"} {
		sources(t, ext, func(file string, source []byte) {
			for _, c := range citations(t, file, source) {
				here := func(dir string) bool { return exists(t, path.Join(dir, c.page)) }
				if !here(path.Dir(file)) && !here("docs") && !here(".") {
					t.Errorf("%s:%d: there is no page %s", file, c.line, c.page)
				}
			}
		})
	}
}

func TestCitedPagesBite(t *testing.T) {
	for _, row := range []struct {
		file, source string
		want         []citation
	}{
		{"a.go", "package a // a.md, Vault\n/* docs/b.md\nand (c.md). */\nvar s = \"d.md\"\n",
			[]citation{{"a.md", 1}, {"docs/b.md", 2}, {"c.md", 3}}},
		{"a.go", "package a // https://example.org/b.md, *.md, a.mdx, .md and b.mod\n", nil},
		{"a.sql", "-- a.md\nSELECT 'b.md'; -- c.md\nSELECT 1--d.md\n", []citation{{"a.md", 1}, {"c.md", 2}}},
		{"a.md", "# a\n[e.md](../b.md#part) and `c.md`\n```sh\ncat D.md\n```\n",
			[]citation{{"../b.md", 2}, {"c.md", 2}, {"D.md", 4}}},
	} {
		if got := citations(t, row.file, []byte(row.source)); !slices.Equal(got, row.want) {
			t.Errorf("citations(%s, %q) = %v, want %v", row.file, row.source, got, row.want)
		}
	}
}
