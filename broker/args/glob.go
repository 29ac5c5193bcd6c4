package args

import (
	"errors"
	"strconv"
	"strings"
	"unicode/utf8"
)

// glob allows strings that its pattern matches: "*" is any run of characters but slashes, the
// empty one included, "?" any one character but a slash, and every other character itself.
// There is no escape. Sets, braces and "**" are refused, since a reader would expect more of them.
type glob struct {
	pattern string
	units   []unit
}

// unit is one place of a pattern or, where all are literals, of a text.
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
		return glob{}, errors.New("a pattern has 1 to 256 bytes")
	case !utf8.ValidString(pattern):
		return glob{}, errors.New("a pattern is valid UTF-8")
	case strings.ContainsAny(pattern, `\[]{}`) || strings.Contains(pattern, "**"):
		return glob{}, errors.New(`a pattern knows * and ? only; \ [ ] { } and ** are refused`)
	}
	return glob{pattern, units(pattern)}, nil
}

// units puts each run of wildcards into one order, the single ones first: "*?" is "?*".
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

// stands reports whether the pattern p stands for everything that q stands for, q being a
// pattern or a text. Reached holds, for the part of p seen so far, which beginnings of q it can
// stand for. A run in q can be absorbed only by a run in p or on the way to a single character
// of the same run of wildcards, so every text of q takes the same way through p.
func stands(p, q []unit) bool {
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
			reached[i+1] = reached[i] && u.standsFor(q[i])
			any = any || reached[i+1]
		}
		if reached[0] = false; !any {
			return false
		}
	}
	return reached[len(q)]
}

// standsFor is about exactly one character.
func (u unit) standsFor(c unit) bool {
	if u.class == unitLiteral {
		return u == c
	}
	return c.class != unitRun && !c.slash()
}

func (r glob) name() string     { return "glob" }
func (r glob) takes() valueKind { return stringValue }
func (r glob) allows(v Value) bool {
	return v.kind == stringValue && utf8.ValidString(v.s) && stands(r.units, textUnits(v.s))
}
func (r glob) covers(d bound) bool {
	in, ok := d.(glob)
	return ok && stands(r.units, in.units)
}

func (r glob) lead() string {
	if end := strings.IndexAny(r.pattern, "*?"); end >= 0 {
		return r.pattern[:end]
	}
	return r.pattern
}

// values is the pattern itself when it has no wildcard.
func (r glob) values() ([]Value, bool) {
	return []Value{String(r.pattern)}, r.lead() == r.pattern
}

func (r glob) appendBody(b []byte) []byte { return appendString(b, r.pattern) }
func (r glob) String() string             { return "matches " + strconv.Quote(r.pattern) }
