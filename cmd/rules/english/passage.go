package main

import (
	"regexp"
	"strings"
	"unicode"
)

// kind is a kind of text. Each has to keep the bounds alone, so that a large one does not hide a small one.
type kind string

const (
	comments kind = "comments" // of Go, SQL, shell and the Makefile, tests included
	help     kind = "help"     // texts of commands and of flags
	failures kind = "errors"   // texts of errors
	hints    kind = "hints"    // remedies of errors
	docs     kind = "docs"     // pages, without code
)

var kinds = []kind{comments, help, failures, hints, docs}

// passage is text that is read as a whole: a paragraph, a row of a table, or a string. Its lines are joined, so that a
// line break does not hide a phrase.
type passage struct {
	kind  kind
	file  string
	text  string // in one line
	marks []mark // ascending
}

// mark is the offset in the text at which a line of the source begins.
type mark struct{ at, line int }

func (p *passage) add(line int, s string) {
	p.marks = append(p.marks, mark{len(p.text), line})
	p.text += s
}

// lineAt returns the line of the source for an offset in the text.
func (p *passage) lineAt(at int) (line int) {
	for _, m := range p.marks {
		if m.at > at {
			break
		}
		line = m.line
	}
	return line
}

// writer divides lines into passages: a blank line ends one.
type writer struct {
	kind   kind
	file   string
	open   passage
	closed []passage
	begun  int // the offset at which the last line begins
}

// line writes a whole line.
func (w *writer) line(line int, s string) {
	w.write(line, strings.TrimSpace(s))
	w.endLine()
}

func (w *writer) write(line int, s string) { w.open.add(line, s) }

func (w *writer) endLine() {
	if strings.TrimSpace(w.open.text[w.begun:]) == "" {
		w.end()
		return
	}
	w.open.text = strings.TrimRight(w.open.text, " ") + " "
	w.begun = len(w.open.text)
}

// end ends the open passage.
func (w *writer) end() {
	if strings.ContainsFunc(w.open.text, unicode.IsLetter) {
		w.open.kind, w.open.file, w.open.text = w.kind, w.file, strings.TrimRight(w.open.text, " ")
		w.closed = append(w.closed, w.open)
	}
	w.open, w.begun = passage{}, 0
}

var verb = regexp.MustCompile(`%[-+# 0-9.*\[\]]*[a-zA-Z]`)

// words counts the runs without a space that have a letter. The verbs of a format do not count.
func (p passage) words() (n int) {
	for word := range strings.FieldsSeq(verb.ReplaceAllString(p.text, "")) {
		if strings.ContainsFunc(word, unicode.IsLetter) {
			n++
		}
	}
	return n
}
