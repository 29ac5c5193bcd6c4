package args

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// glob allows strings that match its pattern. "*" matches any run of characters but slashes, also the empty one. "?"
// matches any one character but a slash. Every other character matches itself, and there is no escape. Sets, braces and
// "**" are refused, because a reader would expect more of them.
type glob struct {
	pattern string
	units   []unit
}

// unit is one position of a pattern. A text is a pattern of literals.
type unit struct {
	class unitClass
	r     rune // of a literal
}

type unitClass uint8

const (
	unitLiteral unitClass = iota
	unitOne               // ?
	unitAmong             // ? in a run of wildcards that has a *
	unitRun               // *
)

func (u unit) slash() bool { return u.class == unitLiteral && u.r == '/' }

func newGlob(pattern string) (bound, error) { return parseGlob(pattern) }

func parseGlob(pattern string) (glob, error) {
	switch {
	case pattern == "" || len(pattern) > MaxConstraintText:
		return glob{}, fmt.Errorf("a pattern has 1 to %d bytes", MaxConstraintText)
	case !utf8.ValidString(pattern):
		return glob{}, errors.New("a pattern must be valid UTF-8")
	case strings.ContainsAny(pattern, `\[]{}`) || strings.Contains(pattern, "**"):
		return glob{}, errors.New(`the wildcards of a pattern are * and ?; \ [ ] { } and ** are refused`)
	}
	return glob{pattern, units(pattern)}, nil
}

// units parses a pattern. It sorts each run of wildcards, the single ones first: "*?" becomes "?*".
func units(pattern string) (u []unit) {
	for pattern != "" {
		rest := strings.TrimLeft(pattern, "*?")
		wild := pattern[:len(pattern)-len(rest)]
		single := unit{class: unitOne}
		star := strings.Contains(wild, "*")
		if star {
			single.class = unitAmong
		}
		for range strings.Count(wild, "?") {
			u = append(u, single)
		}
		if star {
			u = append(u, unit{class: unitRun})
		}
		end := strings.IndexAny(rest, "*?")
		if end < 0 {
			end = len(rest)
		}
		u = append(u, textUnits(rest[:end])...)
		pattern = rest[end:]
	}
	return u
}

func textUnits(s string) []unit {
	u := make([]unit, 0, len(s))
	for _, r := range s {
		u = append(u, unit{r: r})
	}
	return u
}

// covers reports whether the pattern p matches every text that q matches. q is a pattern or a text.
//
// reached[i] means that the units of p so far can match the first i units of q. Two units of p absorb a run in q: a
// run, and a "?" next to one, before it matches its one character. No other unit does. So every text of q takes the
// same way through p.
func covers(p, q []unit) bool {
	reached := make([]bool, len(q)+1)
	reached[0] = true
	for _, u := range p {
		switch u.class {
		case unitRun:
			for i, c := range q {
				reached[i+1] = reached[i+1] || reached[i] && !c.slash()
			}
			continue
		case unitAmong:
			for i, c := range q {
				reached[i+1] = reached[i+1] || reached[i] && c.class == unitRun
			}
		}
		any := false
		for i := len(q) - 1; i >= 0; i-- {
			reached[i+1] = reached[i] && u.matches(q[i])
			any = any || reached[i+1]
		}
		if reached[0] = false; !any {
			return false
		}
	}
	return reached[len(q)]
}

// matches reports whether the one character u matches the one character c.
func (u unit) matches(c unit) bool {
	if u.class == unitLiteral {
		return u == c
	}
	return c.class != unitRun && !c.slash()
}

func (r glob) name() string     { return "glob" }
func (r glob) takes() valueKind { return stringValue }
func (r glob) allows(v Value) bool {
	return v.kind == stringValue && utf8.ValidString(v.s) && covers(r.units, textUnits(v.s))
}
func (r glob) covers(d bound) bool {
	in, ok := d.(glob)
	return ok && covers(r.units, in.units)
}

func (r glob) lead() string {
	if end := strings.IndexAny(r.pattern, "*?"); end >= 0 {
		return r.pattern[:end]
	}
	return r.pattern
}

// values has the pattern itself if it has no wildcard.
func (r glob) values() ([]Value, bool) {
	return []Value{String(r.pattern)}, r.lead() == r.pattern
}

func (r glob) appendBody(b []byte) []byte { return appendString(b, r.pattern) }
func (r glob) String() string             { return "matches " + strconv.Quote(r.pattern) }
