package args

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// shell allows command lines of plain words with one space between two. First come the words of the command in order,
// each one of its choices. Any number of words follows, each of which matches a pattern.
//
// A plain word consists of ASCII letters, digits and _ - . / : = , @ +. So no shell expands, quotes, redirects or
// runs any part of it. A word that begins with a hyphen is an option for most programs. Only a pattern that itself
// begins with a hyphen allows it.
type shell struct {
	command [][]string // choices sorted
	words   []glob     // sorted
}

func newShell(command [][]string, words []string) (bound, error) {
	if len(command) == 0 || len(command) > MaxConstraintWords || len(words) > MaxConstraintWords {
		return nil, fmt.Errorf("a command has 1 to %d words, and at most as many patterns", MaxConstraintWords)
	}
	var r shell
	longest := -1 // of the command alone, in bytes
	for i, choices := range command {
		choices = slices.Compact(slices.Sorted(slices.Values(choices)))
		if len(choices) == 0 || len(choices) > MaxConstraintSet {
			return nil, fmt.Errorf("a word of a command has 1 to %d choices", MaxConstraintSet)
		}
		widest := 0
		for _, word := range choices {
			widest = max(widest, len(word))
			if len(word) > MaxConstraintText || !plainWord(word, "") || i == 0 && strings.Contains(word, "=") {
				return nil, errors.New("the words of a command are letters, digits and _ - . / : = , @ +, " +
					"and the first has no =")
			}
		}
		if longest += 1 + widest; longest > MaxConstraintLine {
			return nil, fmt.Errorf("a command has at most %d bytes", MaxConstraintLine)
		}
		r.command = append(r.command, choices)
	}
	for _, word := range slices.Compact(slices.Sorted(slices.Values(words))) {
		pattern, err := parseGlob(word)
		if err != nil {
			return nil, err
		}
		if !plainWord(word, "*?") {
			return nil, errors.New("the pattern of a word is letters, digits, _ - . / : = , @ + " +
				"and the wildcards * and ?")
		}
		r.words = append(r.words, pattern)
	}
	return r, nil
}

func plainWord(s, also string) bool {
	for i := range len(s) {
		c := s[i]
		alphanumeric := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alphanumeric && strings.IndexByte("_-./:=,@+"+also, c) < 0 {
			return false
		}
	}
	return s != ""
}

func (r shell) name() string     { return "shell" }
func (r shell) takes() valueKind { return stringValue }

func (r shell) allows(v Value) bool {
	if v.kind != stringValue || len(v.s) > MaxConstraintLine {
		return false
	}
	words := strings.Split(v.s, " ")
	if len(words) < len(r.command) {
		return false
	}
	for i, word := range words {
		if !plainWord(word, "") {
			return false
		}
		if i < len(r.command) && !slices.Contains(r.command[i], word) || i >= len(r.command) && !r.admits(word) {
			return false
		}
	}
	return true
}

// admits reports whether a word after the command, or the pattern of a narrower bound, is allowed.
func (r shell) admits(word string) bool {
	u := units(word)
	return slices.ContainsFunc(r.words, func(p glob) bool {
		return covers(p.units, u) && (word[0] != '-' || p.pattern[0] == '-')
	})
}

func (r shell) covers(d bound) bool {
	in, ok := d.(shell)
	if !ok || len(in.command) < len(r.command) {
		return false
	}
	for i, choices := range in.command {
		for _, word := range choices {
			if i < len(r.command) && !slices.Contains(r.command[i], word) || i >= len(r.command) && !r.admits(word) {
				return false
			}
		}
	}
	return !slices.ContainsFunc(in.words, func(p glob) bool { return !r.admits(p.pattern) })
}

// lead is the beginning of the command up to the first choice.
func (r shell) lead() string {
	var fixed []string
	for _, choices := range r.command {
		if len(choices) > 1 {
			break
		}
		fixed = append(fixed, choices[0])
	}
	return strings.Join(fixed, " ")
}

// values lists the lines of a command without further words, if they are few.
func (r shell) values() (all []Value, ok bool) {
	if len(r.words) > 0 {
		return nil, false
	}
	lines := []string{""}
	for _, choices := range r.command {
		if len(lines)*len(choices) > MaxConstraintSet {
			return nil, false
		}
		var longer []string
		for _, line := range lines {
			for _, word := range choices {
				longer = append(longer, strings.TrimPrefix(line+" "+word, " "))
			}
		}
		lines = longer
	}
	return stringValues(lines), true
}

func (r shell) appendBody(b []byte) []byte {
	b = append(b, `{"command":[`...)
	for i, choices := range r.command {
		if i > 0 {
			b = append(b, ',')
		}
		if len(choices) == 1 {
			b = appendString(b, choices[0])
		} else {
			b = List(choices...).append(b)
		}
	}
	b = append(b, ']')
	if len(r.words) > 0 {
		b = List(r.patterns()...).append(append(b, `,"words":`...))
	}
	return append(b, '}')
}

func (r shell) patterns() []string {
	s := make([]string, len(r.words))
	for i, p := range r.words {
		s[i] = p.pattern
	}
	return s
}

func (r shell) String() string {
	var b strings.Builder
	b.WriteString("command line")
	for _, choices := range r.command {
		b.WriteString(" " + strings.Join(choices, "|"))
	}
	if len(r.words) > 0 {
		b.WriteString(", then words like " + strings.Join(r.patterns(), " "))
	}
	return b.String()
}
