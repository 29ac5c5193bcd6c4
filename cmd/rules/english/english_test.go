package main

import (
	"bufio"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/rogpeppe/go-internal/txtar"
)

// TestFind finds the phrases of testdata/phrases.txt.
func TestFind(t *testing.T) {
	table, err := os.Open("testdata/phrases.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	rows := 0
	for lines := bufio.NewScanner(table); lines.Scan(); {
		wanted, text, ok := strings.Cut(lines.Text(), "\t")
		if !ok {
			continue
		}
		rows++
		var got []string
		for _, f := range phrases {
			for _, h := range f.find(passage{text: text}) {
				got = append(got, h.name)
			}
		}
		if got := strings.Join(got, ", "); got != strings.TrimPrefix(wanted, "-") {
			t.Errorf("%q has the phrases %q, want %q", text, got, wanted)
		}
	}
	if rows < 30 {
		t.Errorf("testdata/phrases.txt has %d rows", rows)
	}
}

// TestRead reads the tree of testdata/tree.txtar, which begins with its passages.
func TestRead(t *testing.T) {
	archive, err := txtar.ParseFile("testdata/tree.txtar")
	if err != nil {
		t.Fatal(err)
	}
	tree := fstest.MapFS{}
	for _, f := range archive.Files {
		tree[f.Name] = &fstest.MapFile{Data: f.Data}
	}
	_, table, _ := strings.Cut(string(archive.Comment), "\n\n")
	want := strings.Split(strings.TrimSpace(table), "\n")
	for _, prefix := range []string{"", "a", "./a/", "a/a_test.go", "p.md"} {
		all, err := read(tree, prefix)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, p := range all {
			got = append(got, fmt.Sprintf("%s %s:%d-%d %d %s",
				p.kind, p.file, p.lineAt(0), p.lineAt(len(p.text)-1), p.words(), p.text))
		}
		slices.Sort(got)
		in := regexp.MustCompile(`^\w+ ` + strings.Trim(prefix, "./"))
		want := slices.DeleteFunc(slices.Clone(want), func(row string) bool { return !in.MatchString(row) })
		if !slices.Equal(got, want) {
			t.Errorf("read(%q) gives\n%s\nwant\n%s", prefix, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// TestCount holds each kind of text to the bounds apart, and a short one to two hits.
func TestCount(t *testing.T) {
	text := func(k kind, words, hits int) passage {
		return passage{kind: k, text: strings.Repeat("nobody ", hits) + strings.Repeat("word ", words-hits)}
	}
	for _, row := range []struct {
		passages []passage
		above    int
	}{
		{nil, 0},
		{[]passage{text(comments, 4000, 2)}, 0},
		{[]passage{text(comments, 3999, 2)}, 1},
		{[]passage{text(comments, 2000, 0), text(comments, 1999, 2)}, 1},
		{[]passage{text(hints, 10, 1)}, 0},
		{[]passage{text(hints, 10, 2)}, 1},
		{[]passage{text(comments, 9000, 2), text(hints, 10, 1), text(docs, 10, 1)}, 0},
		{[]passage{text(comments, 9000, 0), text(hints, 100, 2), text(docs, 100, 2)}, 2},
	} {
		tallies, found := count(row.passages)
		hits := 0
		for _, tally := range tallies {
			hits += tally.count
		}
		var out strings.Builder
		above := writeTable(&out, tallies)
		if above != row.above || strings.Count(out.String(), "ABOVE") != above || hits != len(found) {
			t.Errorf("the table of %d hits has %d above their bounds, want %d:\n%s", len(found), above, row.above, &out)
		}
	}
}

func TestWriteHits(t *testing.T) {
	p := passage{kind: docs, file: "p.md"}
	p.add(3, "A long line of a page that goes before it says that ")
	p.add(4, "nobody reads what is due, and that nothing else is said until the end")
	_, found := count([]passage{p})
	var out strings.Builder
	writeHits(&out, found)
	const want = `p.md:4: docs, no-body words: a page that goes before it says that nobody reads what is due, and that nothing
p.md:4: docs, what-nouns: goes before it says that nobody reads what is due, and that nothing else is said
`
	if out.String() != want {
		t.Errorf("writeHits() writes\n%swant\n%s", &out, want)
	}
}
