package main

import (
	"regexp"
	"strings"
	"unicode/utf8"
)

// phrase is a turn of phrase with a bound.
type phrase struct {
	name    string
	bound   float64 // most per 1,000 words of a kind
	pattern *regexp.Regexp
}

// phrases is the table of bounds.
var phrases = []phrase{
	{"who-words", 0.5, regexp.MustCompile(`(?i)\b(whoever|whomever|whom|whose)\b`)},
	{"no-body words", 0.5, regexp.MustCompile(`(?i)\b(nobody|somebody|no one|someone|anybody|anyone)\b`)},
	// The pronoun, not the question.
	{"what-nouns", 0.5, regexp.MustCompile(`(?i)\bwhat (is|was|has|are|were|had|have|will|may|can|must|it|they|he|the|` +
		`a|this|that|no|came|comes|happens|lives|lies|stands|follows|works|ends|makes)\b`)},
	// The adverb, not the preposition of "is over the limit".
	{"over for ended", 0.5, regexp.MustCompile(`(?i)\b(is|are|was|were|be|been) over` +
		`([.,;:!?)\]"”’'` + "`" + `]|\s*[|(—–]|\s*$|\s+(and|or|when|while|since|for)\b)`)},
	{"personified", 0.5, regexp.MustCompile(`(?i)\b(told|heard|hears|looked at|looks at|look at)\b`)},
}

// leastHits is the least count that can be above a bound. In a short text a single hit would be.
const leastHits = 2

// hit is a phrase that was found.
type hit struct {
	file string
	line int
	kind kind
	name string // of the phrase
	text string // with the words around it
}

// find returns the phrase's hits in a passage.
func (f phrase) find(p passage) (found []hit) {
	for _, at := range f.pattern.FindAllStringIndex(p.text, -1) {
		isWhat := strings.EqualFold(p.text[at[0]:at[0]+len("what")], "what")
		if isWhat && asks(p.text, at[0]) || inName(p.text, at[0]) {
			continue
		}
		found = append(found, hit{p.file, p.lineAt(at[0]), p.kind, f.name, around(p.text, at[0], at[1])})
	}
	return found
}

var sentenceEnd = regexp.MustCompile(`[.?!]+["”'’)*]*(\s|$)`)

// asks reports whether the word at an offset begins a sentence that ends with a question mark.
func asks(text string, at int) bool {
	before := strings.TrimRight(text[:at], " *_#>-")
	if last, _ := utf8.DecodeLastRuneInString(before); before != "" && !strings.ContainsRune(".?!:;|\"“'‘", last) {
		return false
	}
	end := sentenceEnd.FindString(text[at:])
	return strings.HasPrefix(end, "?")
}

// inName reports whether the word at an offset is part of a path or a member's name, such as /v1/heard.
func inName(text string, at int) bool {
	return at > 0 && strings.ContainsAny(text[at-1:at], "/.")
}

// around returns a piece of the text with about forty bytes on either side, cut at words.
func around(text string, from, to int) string {
	const beside = 40
	if from -= beside; from <= 0 {
		from = 0
	} else if space := strings.IndexByte(text[from:], ' '); space >= 0 && space < beside {
		from += space + 1
	}
	if to += beside; to >= len(text) {
		to = len(text)
	} else if space := strings.LastIndexByte(text[:to], ' '); space > to-beside {
		to = space
	}
	return strings.ToValidUTF8(text[from:to], "")
}

// tally is the count of one phrase in one kind of text.
type tally struct {
	kind   kind
	phrase phrase
	count  int
	words  int
}

func (t tally) perThousand() float64 {
	if t.words == 0 {
		return 0
	}
	return float64(t.count) * 1000 / float64(t.words)
}

func (t tally) above() bool { return t.count >= leastHits && t.perThousand() > t.phrase.bound }

// count returns a tally for each kind and phrase, and every hit.
func count(all []passage) (tallies []tally, found []hit) {
	for _, k := range kinds {
		words := 0
		hits := make([][]hit, len(phrases))
		for _, p := range all {
			if p.kind != k {
				continue
			}
			words += p.words()
			for i, f := range phrases {
				hits[i] = append(hits[i], f.find(p)...)
			}
		}
		for i, f := range phrases {
			tallies = append(tallies, tally{k, f, len(hits[i]), words})
			found = append(found, hits[i]...)
		}
	}
	return tallies, found
}
