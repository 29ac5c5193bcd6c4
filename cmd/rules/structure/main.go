// Structure measures every package of the module and holds it to the limits in limits.go: its lines, its largest
// cycle of files that use each other, the methods of its largest type and its longest function. It exits 1 when a
// package breaks a limit.
//
// It runs in the root of the module. With -v it also lists the files of each cycle and the exported names without
// a doc comment.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

func main() {
	verbose := flag.Bool("v", false, "list the files of each cycle and the undocumented names")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "structure: error: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}
	all, err := measureModule(".")
	if err != nil {
		fmt.Fprintf(os.Stderr, "structure: error: %v\n", err)
		os.Exit(1)
	}
	writeTable(os.Stdout, all)
	if *verbose {
		writeDetails(os.Stdout, all)
	}
	for _, note := range tree.loose(all) {
		fmt.Println("note: " + note)
	}
	broken := tree.breaches(all)
	for _, breach := range broken {
		fmt.Fprintln(os.Stderr, "structure: error: "+breach)
	}
	if len(broken) > 0 {
		os.Exit(1)
	}
}

func writeTable(w io.Writer, all []figures) {
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(table, "PACKAGE\tLINES\tFILES\tCYCLE\tMETHODS\tOF TYPE\tLONGEST\tFUNCTION\tUNDOCUMENTED")
	for _, f := range all {
		l, longest := tree.limitOf(f.pkg), f.longest()
		fmt.Fprintf(table, "%s\t%d of %d\t%d\t%d of %d\t%s\t%s\t%d\t%s\t%d\n", f.pkg, f.lines, l.lines, f.files,
			len(f.cycle), l.cycle, bounded(f.methods, l.methods), f.methodsOf, longest.lines, longest.name, len(f.undocumented))
	}
	_ = table.Flush() // standard output; there is nowhere left to report to
}

// bounded prints a figure with its limit, where it has one.
func bounded(n, most int) string {
	if most == 0 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%d of %d", n, most)
}

func writeDetails(w io.Writer, all []figures) {
	for _, f := range all {
		if len(f.cycle) > 1 {
			fmt.Fprintf(w, "%s: cycle of %d: %s\n", f.pkg, len(f.cycle), strings.Join(f.cycle, " "))
		}
		for _, name := range slices.Sorted(slices.Values(f.undocumented)) {
			fmt.Fprintf(w, "%s: undocumented: %s\n", f.pkg, name)
		}
	}
}
