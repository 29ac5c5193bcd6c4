package args

import (
	"fmt"
	"slices"
	"strings"
)

// Constraint limits one argument of a step. The zero Constraint allows nothing.
//
// Each has one kind, named by the one member of its wire form:
//
//	{"exact":"x"}                      the value itself; also an integer, a boolean or a list
//	{"one_of":["a","b"]}               one of these strings, or integers, or booleans
//	{"not_one_of":["a","b"]}           a value of their kind, but none of them
//	{"range":{"min":1,"max":9}}        an integer in this range, ends included, each end optional
//	{"prefix":"a/"}                    a string with this prefix; for paths use subpath
//	{"glob":"web-*"}                   a string; * is any run, ? any one character, neither is a slash
//	{"cidr":"10.0.0.0/8"}              an address or a network inside, in canonical spelling
//	{"subset":["a","b"]}               a list of some of these; the empty list is outside
//	{"subpath":"/srv/data"}            this absolute path or one below it, in canonical spelling
//	{"url":{"scheme":"https","host":"*.example.org","port":8443,"path":"/v1"}}
//	                                   a URL, canonical too; "*." is any name below, the port is the
//	                                   scheme's own unless given, the path is this or below, the query free
//	{"shell":{"command":["systemctl",["restart","status"]],"words":["web-*"]}}
//	                                   a command line: this word, then one of these, then any number of
//	                                   words that match one of the patterns; no metacharacters
//	{"all":[…]}                        inside each of these; not nested
//
// Only exact and subset take lists. The others refuse a list, whatever its elements are. An empty list is outside a
// subset for the reason that a missing argument is: it may mean "all".
//
// Strings compare byte by byte. So not_one_of is weak if a callee accepts two spellings of one thing: case, Unicode
// forms, 010 for 8. The kinds with a canonical spelling (cidr, subpath, url, shell) refuse every other spelling.
type Constraint struct{ bound bound }

// bound is one kind of constraint. It is immutable, and always valid.
type bound interface {
	takes() valueKind           // the only kind of value it can allow
	allows(Value) bool          // whether the value is inside
	covers(bound) bool          // whether the whole of a bound that is not finite is inside; false if undecided
	name() string               // the member of the wire form
	appendBody(b []byte) []byte // the value of that member
	fmt.Stringer                // for people
}

// A finite bound can list every value that it allows. A bound of any kind covers it if it allows these values.
type finite interface {
	values() (all []Value, ok bool)
}

// A leading bound allows only strings that begin with lead.
type leading interface{ lead() string }

// Allows reports whether v is inside the constraint.
func (c Constraint) Allows(v Value) bool { return c.bound != nil && c.bound.allows(v) }

// Covers reports whether c allows every value that d allows. It is never true wrongly. It is false if the proof needs
// several parts of d together, or several words of c. It is also false if two kinds have a relation that this package
// does not know.
func (c Constraint) Covers(d Constraint) bool {
	if d.bound == nil {
		return true
	}
	return c.bound != nil && boundCovers(c.bound, d.bound)
}

func boundCovers(c, d bound) bool {
	if f, ok := d.(finite); ok {
		if values, ok := f.values(); ok {
			return !slices.ContainsFunc(values, func(v Value) bool { return !c.allows(v) })
		}
	}
	if parts, ok := c.(allOf); ok {
		return !slices.ContainsFunc(parts, func(p bound) bool { return !boundCovers(p, d) })
	}
	if c.covers(d) {
		return true
	}
	parts, ok := d.(allOf)
	return ok && slices.ContainsFunc(parts, func(p bound) bool { return boundCovers(c, p) })
}

// String describes the allowed values in words.
func (c Constraint) String() string {
	if c.bound == nil {
		return "nothing"
	}
	return c.bound.String()
}

func stringValues(s []string) []Value {
	values := make([]Value, len(s))
	for i := range s {
		values[i] = String(s[i])
	}
	return values
}

// listing shows values for people.
func listing(values []Value) string {
	s := make([]string, len(values))
	for i, v := range values {
		s[i] = string(v.append(nil))
	}
	return strings.Join(s, ", ")
}
