package main

import (
	"go/ast"
	"go/token"
	"regexp"
	"strings"
)

var (
	directive   = regexp.MustCompile(`^//[a-z]+:[^ ]`)
	suppression = regexp.MustCompile(`^//nolint\S* // `)
)

// goComments returns the comments of a Go file, without directives.
func goComments(set *token.FileSet, file string, f *ast.File) []passage {
	w := writer{kind: comments, file: file}
	for _, group := range f.Comments {
		for _, c := range group.List {
			text, line := c.Text, set.Position(c.Pos()).Line
			if why := suppression.FindString(text); why != "" {
				text = "//" + text[len(why):]
			} else if directive.MatchString(text) {
				w.end()
				continue
			}
			if rest, ok := strings.CutPrefix(text, "//"); ok {
				w.line(line, rest)
				continue
			}
			for i, l := range strings.Split(strings.TrimSuffix(strings.TrimPrefix(text, "/*"), "*/"), "\n") {
				w.line(line+i, strings.TrimPrefix(strings.TrimSpace(l), "*"))
			}
		}
		w.end()
	}
	return w.closed
}

var (
	dashes = regexp.MustCompile(`(?:^|\s)--+(?:\s|$)`)
	hashes = regexp.MustCompile(`(?:^|\s)#+(?:\s|$)`)
)

func sqlComments(file string, source []byte) []passage { return lineComments(file, source, dashes) }

func shellComments(file string, source []byte) []passage { return lineComments(file, source, hashes) }

// lineComments returns the comments of a file of a language in which they begin with a marker and end with the line. One
// beside code is a passage of its own.
func lineComments(file string, source []byte, marker *regexp.Regexp) []passage {
	w := writer{kind: comments, file: file}
	for i, line := range strings.Split(string(source), "\n") {
		at := marker.FindStringIndex(line)
		if at == nil || isQuoted(line, at[0]) {
			w.end()
			continue
		}
		beside := strings.TrimSpace(line[:at[0]]) != ""
		if beside {
			w.end()
		}
		w.line(i+1, line[at[1]:])
		if beside {
			w.end()
		}
	}
	w.end()
	return w.closed
}

// isQuoted reports whether the offset is within quotes that the line opened.
func isQuoted(line string, at int) bool {
	return strings.Count(line[:at], `"`)%2 == 1 || strings.Count(line[:at], "'")%2 == 1
}
