// Package argstest draws constraints and values for property tests, and decides by a reference evaluator of its own which
// values are inside which constraint.
package argstest

import (
	"fmt"
	"slices"
	"strings"

	"github.com/pawlsec/pawl/broker/args"
)

// Parse reads a constraint that the test knows to be valid.
func Parse(wire string) args.Constraint {
	c, err := args.ParseConstraint([]byte(wire))
	if err != nil {
		panic(fmt.Sprintf("argstest: %s: %v", wire, err))
	}
	return c
}

// Pick draws a number from 0 to n-1. Both rapid and a seeded source can do that.
type Pick func(n int) int

// OneFrom draws one of the given.
func OneFrom[T any](p Pick, of ...T) T { return of[p(len(of))] }

// SomeOf draws 1 to n, each by the function.
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
var Kinds = []string{"exact", "one_of", "not_one_of", "range", "prefix", "glob", "cidr", "subset", "subpath", "url", "shell"}

// anyBody draws what a constraint of the kind holds.
func anyBody(kind string, p Pick) any {
	switch kind {
	case "exact":
		return OneFrom[any](p, anyWord(p), anyNumber(p), p(2) == 0, SomeOf(p, 3, anyElement))
	case "one_of", "not_one_of":
		return SomeOf(p, 3, OneFrom(p, anyWord, anyNumber, anyWord))
	case "range":
		low := p(12) - 3
		return OneFrom(p, map[string]any{"min": low, "max": low + p(6)}, map[string]any{"min": low}, map[string]any{"max": low}, map[string]any{})
	case "prefix":
		return OneFrom(p, "a", "ab", "b", "-", "/a", "/a/", "https://", "https://x.h", "https://x.h/a", "a b", "10.")
	case "glob":
		return anyPattern(p)
	case "cidr":
		return OneFrom(p, "10.0.0.0/8", "10.0.0.0/16", "10.0.0.1/32", "0.0.0.0/0", "11.0.0.0/8", "::/0", "2001:db8::/32")
	case "subset":
		return SomeOf(p, 3, anyElement)
	case "subpath":
		return OneFrom(p, "/", anyPath(p), anyPath(p))
	case "url":
		u := map[string]any{"scheme": OneFrom(p, "https", "https", "https", "http"), "host": OneFrom(p, "x.h", "y.x.h", "*.h", "*.h", "*.x.h", "10.0.0.1")}
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
			return map[string]any{other: anyBody(other, p)}
		})
		return ToJSON(map[string]any{"all": parts})
	}
	return ToJSON(map[string]any{kind: anyBody(kind, p)})
}

// ValueFor draws a value that a constraint of the kind may well allow.
func ValueFor(p Pick, kind string) args.Value {
	text := func(s string) args.Value { return args.String(s) }
	switch kind {
	case "range":
		return ValueOf(anyNumber(p))
	case "subset":
		return args.List(SomeOf(p, 3, anyElement)...)
	case "cidr":
		return text(OneFrom(p, "10.0.0.1", "10.0.1.0/24", "10.1.0.0", "11.0.0.0/8", "10.0.0.0/8", "::1", "2001:db8::1", "1.1.1.1"))
	case "subpath":
		return text(anyPath(p) + OneFrom(p, "", "", "", "/..", "/", "/%2e"))
	case "url":
		return text(OneFrom(p, "https", "https", "https", "http") + "://" + OneFrom(p, "x.h", "y.x.h", "y.x.h", "10.0.0.1", "*.h") + OneFrom(p, "", "", "", ":8443", ":80") +
			OneFrom(p, "", "/", "/a", "/a/b", anyPath(p), anyPath(p)+"/", anyPath(p)+"/../a") + OneFrom(p, "", "", "?q"))
	case "shell":
		return text(strings.Join(SomeOf(p, 4, func(p Pick) string { return OneFrom(p, "a", "b", "ab", "-a", "a", "b;") }), " "))
	case "exact":
		return OneFrom(p, ValueOf(anyWord(p)), ValueOf(anyNumber(p)), ValueOf(p(2) == 0), args.List(SomeOf(p, 3, anyElement)...))
	case "glob":
		return text(strings.Join(SomeOf(p, 5, func(p Pick) string { return OneFrom(p, "a", "b", "a", "b", "-", "c", "/") }), ""))
	}
	return ValueOf(OneFrom(p, anyWord, anyWord, anyNumber)(p))
}

// Narrower draws a constraint that has a chance to be inside of one of the kind.
func Narrower(p Pick, kind string) string {
	related := map[string][]string{
		"exact": {"one_of", "all"}, "one_of": {"exact", "range", "all"}, "not_one_of": append(slices.Clone(Kinds), "all"),
		"range": {"exact", "one_of", "all"}, "prefix": {"exact", "one_of", "glob", "subpath", "url", "shell", "all"},
		"glob": {"exact", "one_of", "all"}, "cidr": {"exact", "all"}, "subset": {"exact", "all"}, "subpath": {"one_of", "all"},
		"url": {"all"}, "shell": {"glob", "exact", "all"}, "all": append(slices.Clone(Kinds), "all"),
	}
	return OneFrom(p, OneFrom(p, related[kind]...), kind)
}

// ValueOf makes a Value of a Go value.
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
