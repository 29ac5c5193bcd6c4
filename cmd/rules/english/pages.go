package main

import (
	"regexp"
	"strings"
)

var (
	codeSpan = regexp.MustCompile("`[^`]+`")
	listItem = regexp.MustCompile(`^\s*([-*+]|[0-9]+[.)])\s`)
)

// pagePassages returns the prose of a page: neither blocks nor spans of code, nor comments. Headings, items of lists and
// rows of tables are passages of their own.
func pagePassages(file string, source []byte) []passage {
	w := writer{kind: docs, file: file}
	fence, comment := "", false
	for i, line := range strings.Split(string(source), "\n") {
		trimmed := strings.TrimSpace(line)
		switch {
		case fence != "":
			if strings.HasPrefix(trimmed, fence) {
				fence = ""
			}
			continue
		case strings.HasPrefix(trimmed, "```"), strings.HasPrefix(trimmed, "~~~"):
			w.end()
			fence = trimmed[:3]
			continue
		case comment || strings.HasPrefix(trimmed, "<!--"):
			w.end()
			comment = !strings.Contains(trimmed, "-->")
			continue
		case strings.HasPrefix(trimmed, "|"), strings.HasPrefix(trimmed, "#"), listItem.MatchString(line):
			w.end()
		}
		w.line(i+1, line)
		if strings.HasPrefix(trimmed, "|") || strings.HasPrefix(trimmed, "#") {
			w.end()
		}
	}
	w.end()
	for i, p := range w.closed {
		// The length stays, so that the marks stay right.
		w.closed[i].text = codeSpan.ReplaceAllStringFunc(p.text, func(span string) string {
			return strings.Repeat("`", len(span))
		})
	}
	return w.closed
}
