package main

import (
	"fmt"
	"go/importer"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
)

// TestMeasure measures the packages in testdata. Each begins with its purpose and its figures.
func TestMeasure(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("testdata holds %d packages, %v", len(files), err)
	}
	for _, file := range files {
		archive, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		sources := map[string][]byte{}
		for _, f := range archive.Files {
			sources[f.Name] = f.Data
		}
		got, err := measure(token.NewFileSet(), importer.Default(), "p", sources)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		slices.Sort(got.undocumented)
		longest := got.longest()
		figures := fmt.Sprintf("lines %d\ncycle %s\nmethods %d %s\nlongest %d %s\nundocumented %s",
			got.lines, strings.Join(got.cycle, " "), got.methods, got.methodsOf, longest.lines, longest.name,
			strings.Join(got.undocumented, " "))
		_, want, _ := strings.Cut(string(archive.Comment), "\n\n")
		if figures, want = strings.TrimSpace(figures), strings.TrimSpace(want); figures != want {
			t.Errorf("%s: measure() gives\n%s\nwant\n%s", file, figures, want)
		}
	}
}

func TestLargestCycle(t *testing.T) {
	for _, row := range []struct{ graph, want string }{
		{"a", "a"}, {"a>b", "a"}, {"b>a a>b", "a b"}, {"a>b b>c c>a", "a b c"},
		{"a>b b>a c>d d>c", "a b"}, {"a>b b>a b>c c>d d>e e>c", "c d e"},
		{"a>b b>c c>d d>a b>d", "a b c d"}, {"a>b b>c c>b c>a", "a b c"}, {"a>c b>c c>d", "a"},
	} {
		graph := map[string][]string{}
		for edge := range strings.FieldsSeq(row.graph) {
			from, to, _ := strings.Cut(edge, ">")
			graph[from] = append(graph[from], strings.Fields(to)...)
		}
		for range 20 { // the order of the visits is random
			if got := strings.Join(largestCycle(graph), " "); got != row.want {
				t.Fatalf("largestCycle(%s) = %s, want %s", row.graph, got, row.want)
			}
		}
	}
}

// TestLimits holds figures against the table of the tree, and against exceptions.
func TestLimits(t *testing.T) {
	files := func(n int) []string { return slices.Repeat([]string{"a.go"}, n) }
	for _, row := range []struct {
		figures figures
		want    string // part of the one breach; empty: none
	}{
		{figures{pkg: "store/new", lines: 4000, cycle: files(1)}, ""},
		{figures{pkg: "store/new", lines: 4001, cycle: files(1)}, "store/new has 4001 lines, and may have 4000"},
		{figures{pkg: "store/new", cycle: files(2)}, "may have one of 1: a.go a.go"},
		{figures{pkg: "store/bolt", cycle: files(7)}, ""},
		{figures{pkg: "store/bolt", cycle: files(8)}, "may have one of 7"},
		{figures{pkg: "broker/args", cycle: files(6)}, ""},
		{figures{pkg: "broker/args", cycle: files(7)}, "may have one of 6"},
		{figures{pkg: "broker/argsmore", cycle: files(2)}, "may have one of 1"},
		{figures{pkg: "broker/engine/internal/records", cycle: files(7)}, "may have one of 6"},
		{figures{pkg: "broker/engine/internal/records", cycle: files(6), methods: 100, methodsOf: "T"}, ""},
		{figures{pkg: "broker/engine", cycle: files(6), methods: 75, methodsOf: "Broker"}, ""},
		{figures{pkg: "broker/engine", cycle: files(6), methods: 76, methodsOf: "Broker"}, "Broker has 76 methods, and may have 75"},
		{figures{pkg: "cmd/new", functions: []function{{"f", 80}}}, ""},
		{figures{pkg: "cmd/new", functions: []function{{"f", 81}, {"g", 3}}}, "cmd/new.f has 81 lines, and may have 80"},
	} {
		got := rules{limits: tree.limits}.breaches([]figures{row.figures})
		if row.want == "" && len(got) > 0 || row.want != "" && (len(got) != 1 || !strings.Contains(got[0], row.want)) {
			t.Errorf("breaches(%+v) = %q, want %q", row.figures, got, row.want)
		}
	}
	excepted := rules{long: []exception{{"cmd/new", "f", "a table"}}}
	for lines, want := range map[int]int{80: 1, 81: 0} {
		if got := excepted.breaches([]figures{{pkg: "cmd/new", functions: []function{{"f", lines}}}}); len(got) != want {
			t.Errorf("breaches(f has %d lines and an exception) = %q, want %d", lines, got, want)
		}
	}
	lower := tree.loose([]figures{
		{pkg: "store/bolt", cycle: files(6)}, {pkg: "attest", cycle: files(4)}, {pkg: "broker/args", cycle: files(1)},
	})
	if len(lower) != 1 || !strings.Contains(lower[0], "store/bolt") {
		t.Errorf("loose() = %q, want one note about store/bolt", lower)
	}
}

func TestRulesHaveReasons(t *testing.T) {
	for _, l := range tree.limits {
		if l.why == "" {
			t.Errorf("the limit of %s has no reason", l.pattern)
		}
	}
	for _, e := range tree.long {
		if e.why == "" {
			t.Errorf("the exception of %s.%s has no reason", e.pkg, e.name)
		}
	}
}
