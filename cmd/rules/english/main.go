// English counts phrases that this tree avoids, per 1,000 words, in each kind of text: comments, help, errors, hints
// and docs. It exits 1 when a phrase is above its bound in phrases.go.
//
// It runs in the root of the module. With -v it lists every hit, and with -path it reads one folder or file only.
package main

import (
	"cmp"
	"flag"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"text/tabwriter"
)

func main() {
	verbose := flag.Bool("v", false, "list every hit as file:line: kind, phrase: text")
	prefix := flag.String("path", "", "count this folder or file only")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "english: error: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}
	all, err := read(os.DirFS("."), *prefix)
	if err != nil {
		fmt.Fprintf(os.Stderr, "english: error: %v\n", err)
		os.Exit(1)
	}
	tallies, found := count(all)
	if *verbose {
		writeHits(os.Stdout, found)
	}
	if writeTable(os.Stdout, tallies) > 0 {
		fmt.Fprintln(os.Stderr, "english: error: phrases are above their bounds\nenglish: hint: -v lists them")
		os.Exit(1)
	}
}

func writeHits(w io.Writer, found []hit) {
	slices.SortStableFunc(found, func(a, b hit) int {
		return cmp.Or(cmp.Compare(a.file, b.file), cmp.Compare(a.line, b.line))
	})
	for _, h := range found {
		fmt.Fprintf(w, "%s:%d: %s, %s: %s\n", h.file, h.line, h.kind, h.name, h.text)
	}
}

// writeTable returns the number of tallies above their bounds.
func writeTable(w io.Writer, tallies []tally) (above int) {
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(table, "KIND\tWORDS\tPHRASE\tCOUNT\tPER 1,000\tBOUND\t")
	for _, t := range tallies {
		mark := ""
		if t.above() {
			above++
			mark = "ABOVE"
		}
		fmt.Fprintf(table, "%s\t%d\t%s\t%d\t%.2f\t%.2f\t%s\n",
			t.kind, t.words, t.phrase.name, t.count, t.perThousand(), t.phrase.bound, mark)
	}
	_ = table.Flush() // standard output; there is nowhere left to report to
	return above
}

// read returns the passages of the tree below prefix; empty: of the whole tree. It parses all Go files in any case: the
// function that takes a string may be declared in another package.
func read(tree fs.FS, prefix string) (all []passage, err error) {
	set := token.NewFileSet()
	var goFiles []goFile
	err = fs.WalkDir(tree, ".", func(file string, d fs.DirEntry, err error) error {
		reader := readerOf(file)
		switch {
		case err != nil:
			return err
		case d.IsDir() && skipped(file):
			return fs.SkipDir
		case d.IsDir() || path.Ext(file) != ".go" && (reader == nil || !below(file, prefix)):
			return nil
		}
		source, err := fs.ReadFile(tree, file)
		if err != nil {
			return err
		}
		if reader != nil {
			all = append(all, reader(file, source)...)
			return nil
		}
		syntax, err := parser.ParseFile(set, file, source, parser.ParseComments|parser.SkipObjectResolution)
		if err == nil {
			goFiles = append(goFiles, newGoFile(file, syntax))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	inStrings := stringsReader{set: set, declared: declarations(goFiles), seen: map[token.Pos]bool{}}
	for _, f := range goFiles {
		if below(f.path, prefix) {
			all = append(all, goComments(set, f.path, f.syntax)...)
			inStrings.read(f)
		}
	}
	return append(all, inStrings.found...), nil
}

// readerOf returns the reader of a file that is not Go; nil: it has no prose of ours.
func readerOf(file string) func(file string, source []byte) []passage {
	switch ext := path.Ext(file); {
	case ext == ".md":
		return pagePassages
	case ext == ".sql":
		return sqlComments
	case ext == ".sh", file == "Makefile", file == ".ci/run":
		return shellComments
	}
	return nil
}

// skipped reports whether a folder holds no prose of ours: build output, data of tests, and the files of other tools.
func skipped(dir string) bool {
	name := path.Base(dir)
	hidden := strings.HasPrefix(name, ".") && dir != "." && dir != ".ci"
	return dir == "build" || name == "testdata" || name == "node_modules" || hidden
}

func below(file, prefix string) bool {
	prefix = strings.TrimSuffix(strings.TrimPrefix(prefix, "./"), "/")
	return prefix == "" || prefix == "." || file == prefix || strings.HasPrefix(file, prefix+"/")
}
