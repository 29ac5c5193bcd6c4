// Package argstest draws constraints and values for property tests. It has a reference evaluator of its own, which
// decides whether a value is inside a constraint.
package argstest

import (
	"fmt"
	"slices"
	"strings"

	"github.com/pawlsec/pawl/broker/args"
)

// Parse reads a constraint that the test knows to be valid. It panics if it is not.
func Parse(wire string) args.Constraint {
	c, err := args.ParseConstraint([]byte(wire))
	if err != nil {
		panic(fmt.Sprintf("argstest: %s: %v", wire, err))
	}
	return c
}

// Pick draws a number from 0 to n-1. Rapid and a seeded source both implement it.
type Pick func(n int) int

// OneFrom draws one of the given values.
func OneFrom[T any](p Pick, of ...T) T { return of[p(len(of))] }

// SomeOf draws 1 to n values, each with the function.
func SomeOf[T any](p Pick, n int, each func(Pick) T) []T {
	list := make([]T, 1+p(n))
	for i := range list {
		list[i] = each(p)
	}
	return list
}

func anyWord(p Pick) any       { return OneFrom(p, "a", "b", "ab", "abc", "-a", "a/b", "/a/b", "10.0.0.1") }
func anyNumber(p Pick) any     { return p(12) - 3 }
func anyElement(p Pick) string { return OneFrom(p, "a", "b", "c") }

func anyPattern(p Pick) string {
	for {
		s := strings.Join(SomeOf(p, 4, func(p Pick) string { return OneFrom(p, "a", "b", "*", "?", "-") }), "")
		if !strings.Contains(s, "**") {
			return s
		}
	}
}

func anyPath(p Pick) string {
	return "/" + strings.Join(SomeOf(p, 3, anyElement), "/")
}

// Kinds are the kinds of constraints except all.
var Kinds = []string{
	"exact", "one_of", "not_one_of", "range", "prefix", "glob", "cidr", "subset", "subpath", "url", "shell",
}

// drawBody draws the body of a constraint of the kind.
func drawBody(kind string, p Pick) any {
	switch kind {
	case "exact":
		return OneFrom[any](p, anyWord(p), anyNumber(p), p(2) == 0, SomeOf(p, 3, anyElement))
	case "one_of", "not_one_of":
		return SomeOf(p, 3, OneFrom(p, anyWord, anyNumber, anyWord))
	case "range":
		low := p(12) - 3
		return OneFrom(p, map[string]any{"min": low, "max": low + p(6)},
			map[string]any{"min": low}, map[string]any{"max": low}, map[string]any{})
	case "prefix":
		return OneFrom(p, "a", "ab", "b", "-", "/a", "/a/", "https://", "https://x.h", "https://x.h/a", "a b", "10.")
	case "glob":
		return anyPattern(p)
	case "cidr":
		return OneFrom(p, "10.0.0.0/8", "10.0.0.0/16", "10.0.0.1/32", "0.0.0.0/0", "11.0.0.0/8",
			"::/0", "2001:db8::/32")
	case "subset":
		return SomeOf(p, 3, anyElement)
	case "subpath":
		return OneFrom(p, "/", anyPath(p), anyPath(p))
	case "url":
		u := map[string]any{
			"scheme": OneFrom(p, "https", "https", "https", "http"),
			"host":   OneFrom(p, "x.h", "y.x.h", "*.h", "*.h", "*.x.h", "10.0.0.1"),
		}
		if p(5) == 0 {
			u["port"] = OneFrom(p, 80, 443, 8443)
		}
		if p(3) == 0 {
			u["path"] = anyPath(p)
		}
		return u
	case "shell":
		command := SomeOf(p, 2, func(p Pick) any { return OneFrom[any](p, "a", "b", []string{"a", "b"}) })
		return map[string]any{"command": command, "words": SomeOf(p, 2, anyPattern)[p(2):]}
	}
	panic("no such kind: " + kind)
}

// Constraint draws a constraint in its wire form.
func Constraint(p Pick, kind string) []byte {
	if kind == "all" {
		kind := OneFrom(p, Kinds...)
		parts := SomeOf(p, 3, func(p Pick) any {
			other := OneFrom(p, kind, kind, "not_one_of")
			return map[string]any{other: drawBody(other, p)}
		})
		return ToJSON(map[string]any{"all": parts})
	}
	return ToJSON(map[string]any{kind: drawBody(kind, p)})
}

// ValueFor draws a value that a constraint of the kind is likely to allow.
func ValueFor(p Pick, kind string) args.Value {
	text := func(s string) args.Value { return args.String(s) }
	switch kind {
	case "range":
		return ValueOf(anyNumber(p))
	case "subset":
		return args.List(SomeOf(p, 3, anyElement)...)
	case "cidr":
		return text(OneFrom(p, "10.0.0.1", "10.0.1.0/24", "10.1.0.0", "11.0.0.0/8", "10.0.0.0/8",
			"::1", "2001:db8::1", "1.1.1.1"))
	case "subpath":
		return text(anyPath(p) + OneFrom(p, "", "", "", "/..", "/", "/%2e"))
	case "url":
		origin := OneFrom(p, "https", "https", "https", "http") + "://" +
			OneFrom(p, "x.h", "y.x.h", "y.x.h", "10.0.0.1", "*.h") + OneFrom(p, "", "", "", ":8443", ":80")
		path := OneFrom(p, "", "/", "/a", "/a/b", anyPath(p), anyPath(p)+"/", anyPath(p)+"/../a")
		return text(origin + path + OneFrom(p, "", "", "?q"))
	case "shell":
		word := func(p Pick) string { return OneFrom(p, "a", "b", "ab", "-a", "a", "b;") }
		return text(strings.Join(SomeOf(p, 4, word), " "))
	case "exact":
		return OneFrom(p, ValueOf(anyWord(p)), ValueOf(anyNumber(p)), ValueOf(p(2) == 0),
			args.List(SomeOf(p, 3, anyElement)...))
	case "glob":
		letter := func(p Pick) string { return OneFrom(p, "a", "b", "a", "b", "-", "c", "/") }
		return text(strings.Join(SomeOf(p, 5, letter), ""))
	}
	return ValueOf(OneFrom(p, anyWord, anyWord, anyNumber)(p))
}

// Narrower draws a kind of constraint that may be inside a constraint of the given kind.
func Narrower(p Pick, kind string) string {
	every := append(slices.Clone(Kinds), "all")
	related := map[string][]string{
		"exact": {"one_of", "all"}, "one_of": {"exact", "range", "all"}, "not_one_of": every, "all": every,
		"range": {"exact", "one_of", "all"}, "prefix": {"exact", "one_of", "glob", "subpath", "url", "shell", "all"},
		"glob": {"exact", "one_of", "all"}, "cidr": {"exact", "all"}, "subset": {"exact", "all"},
		"subpath": {"one_of", "all"}, "url": {"all"}, "shell": {"glob", "exact", "all"},
	}
	return OneFrom(p, OneFrom(p, related[kind]...), kind)
}

// ValueOf makes a Value of an int, a bool, a []string or a string.
func ValueOf(v any) args.Value {
	switch v := v.(type) {
	case int:
		return args.Int(int64(v))
	case bool:
		return args.Bool(v)
	case []string:
		return args.List(v...)
	}
	return args.String(v.(string))
}
