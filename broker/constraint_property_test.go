package broker_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"pgregory.net/rapid"
)

// The generators draw from a small world, so that constraints and values meet often.

// pick is what both rapid and a seeded source can do.
type pick func(n int) int // a number from 0 to n-1

func drawn(t *rapid.T) pick {
	return func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "pick") }
}

func oneFrom[T any](p pick, of ...T) T { return of[p(len(of))] }

func someOf[T any](p pick, n int, each func(pick) T) []T {
	list := make([]T, 1+p(n))
	for i := range list {
		list[i] = each(p)
	}
	return list
}

func anyWord(p pick) any       { return oneFrom(p, "a", "b", "ab", "abc", "-a", "a/b", "/a/b", "10.0.0.1") }
func anyNumber(p pick) any     { return p(12) - 3 }
func anyElement(p pick) string { return oneFrom(p, "a", "b", "c") }

func anyPattern(p pick) string {
	for {
		s := strings.Join(someOf(p, 4, func(p pick) string { return oneFrom(p, "a", "b", "*", "?", "-") }), "")
		if !strings.Contains(s, "**") {
			return s
		}
	}
}

func anyPath(p pick) string {
	return "/" + strings.Join(someOf(p, 3, anyElement), "/")
}

var constraintKinds = []string{"exact", "one_of", "not_one_of", "range", "prefix", "glob", "cidr", "subset", "subpath", "url", "shell"}

// anyBody draws what a constraint of the kind holds.
func anyBody(kind string, p pick) any {
	switch kind {
	case "exact":
		return oneFrom[any](p, anyWord(p), anyNumber(p), p(2) == 0, someOf(p, 3, anyElement))
	case "one_of", "not_one_of":
		return someOf(p, 3, oneFrom(p, anyWord, anyNumber, anyWord))
	case "range":
		low := p(12) - 3
		return oneFrom(p, map[string]any{"min": low, "max": low + p(6)}, map[string]any{"min": low}, map[string]any{"max": low}, map[string]any{})
	case "prefix":
		return oneFrom(p, "a", "ab", "b", "-", "/a", "/a/", "https://", "https://x.h", "https://x.h/a", "a b", "10.")
	case "glob":
		return anyPattern(p)
	case "cidr":
		return oneFrom(p, "10.0.0.0/8", "10.0.0.0/16", "10.0.0.1/32", "0.0.0.0/0", "11.0.0.0/8", "::/0", "2001:db8::/32")
	case "subset":
		return someOf(p, 3, anyElement)
	case "subpath":
		return oneFrom(p, "/", anyPath(p), anyPath(p))
	case "url":
		u := map[string]any{"scheme": oneFrom(p, "https", "https", "https", "http"), "host": oneFrom(p, "x.h", "y.x.h", "*.h", "*.h", "*.x.h", "10.0.0.1")}
		if p(5) == 0 {
			u["port"] = oneFrom(p, 80, 443, 8443)
		}
		if p(3) == 0 {
			u["path"] = anyPath(p)
		}
		return u
	case "shell":
		command := someOf(p, 2, func(p pick) any { return oneFrom[any](p, "a", "b", []string{"a", "b"}) })
		return map[string]any{"command": command, "words": someOf(p, 2, anyPattern)[p(2):]}
	}
	panic("no such kind: " + kind)
}

// anyConstraint draws a constraint in its wire form.
func anyConstraint(p pick, kind string) []byte {
	if kind == "all" {
		kind := oneFrom(p, constraintKinds...)
		parts := someOf(p, 3, func(p pick) any {
			other := oneFrom(p, kind, kind, "not_one_of")
			return map[string]any{other: anyBody(other, p)}
		})
		return toJSON(map[string]any{"all": parts})
	}
	return toJSON(map[string]any{kind: anyBody(kind, p)})
}

// anyValueFor draws a value that a constraint of the kind may well allow.
func anyValueFor(p pick, kind string) broker.Value {
	text := func(s string) broker.Value { return broker.String(s) }
	switch kind {
	case "range":
		return valueOf(anyNumber(p))
	case "subset":
		return broker.List(someOf(p, 3, anyElement)...)
	case "cidr":
		return text(oneFrom(p, "10.0.0.1", "10.0.1.0/24", "10.1.0.0", "11.0.0.0/8", "10.0.0.0/8", "::1", "2001:db8::1", "1.1.1.1"))
	case "subpath":
		return text(anyPath(p) + oneFrom(p, "", "", "", "/..", "/", "/%2e"))
	case "url":
		return text(oneFrom(p, "https", "https", "https", "http") + "://" + oneFrom(p, "x.h", "y.x.h", "y.x.h", "10.0.0.1", "*.h") + oneFrom(p, "", "", "", ":8443", ":80") +
			oneFrom(p, "", "/", "/a", "/a/b", anyPath(p), anyPath(p)+"/", anyPath(p)+"/../a") + oneFrom(p, "", "", "?q"))
	case "shell":
		return text(strings.Join(someOf(p, 4, func(p pick) string { return oneFrom(p, "a", "b", "ab", "-a", "a", "b;") }), " "))
	case "exact":
		return oneFrom(p, valueOf(anyWord(p)), valueOf(anyNumber(p)), valueOf(p(2) == 0), broker.List(someOf(p, 3, anyElement)...))
	case "glob":
		return text(strings.Join(someOf(p, 5, func(p pick) string { return oneFrom(p, "a", "b", "a", "b", "-", "c", "/") }), ""))
	}
	return valueOf(oneFrom(p, anyWord, anyWord, anyNumber)(p))
}

// narrower draws a constraint that has a chance to be inside of one of the kind.
func narrower(p pick, kind string) string {
	related := map[string][]string{
		"exact": {"one_of", "all"}, "one_of": {"exact", "range", "all"}, "not_one_of": append(slices.Clone(constraintKinds), "all"),
		"range": {"exact", "one_of", "all"}, "prefix": {"exact", "one_of", "glob", "subpath", "url", "shell", "all"},
		"glob": {"exact", "one_of", "all"}, "cidr": {"exact", "all"}, "subset": {"exact", "all"}, "subpath": {"one_of", "all"},
		"url": {"all"}, "shell": {"glob", "exact", "all"}, "all": append(slices.Clone(constraintKinds), "all"),
	}
	return oneFrom(p, oneFrom(p, related[kind]...), kind)
}

// TestCoversIsSound holds for all constraints c, d and values v: c.Covers(d) and d.Allows(v)
// give c.Allows(v); and Allows agrees with the reference.
func TestCoversIsSound(t *testing.T) {
	held := map[string]int{}
	property := func(t *rapid.T) {
		p := drawn(t)
		outer := oneFrom(p, append(slices.Clone(constraintKinds), "all")...)
		inner := narrower(p, outer)
		checkPair(t, p, held, outer, inner)
	}
	for range 100 {
		rapid.Check(t, property)
	}
	for _, kind := range append(slices.Clone(constraintKinds), "all") {
		if held[kind] < 10 {
			t.Errorf("only %d cases had a covering %s, a covered constraint and a value in both; the generators are too wide (%v)", held[kind], kind, held)
		}
	}
	t.Logf("cases in which all three held: %v", held)
}

type failer interface {
	Fatalf(format string, args ...any)
}

// checkPair draws two constraints of the constraintKinds, and values; those it refuses to parse are none.
func checkPair(t failer, p pick, held map[string]int, outer, inner string) {
	outerWire, innerWire := anyConstraint(p, outer), anyConstraint(p, inner)
	if p(8) == 0 {
		innerWire = outerWire
	}
	c, errOuter := broker.ParseConstraint(outerWire)
	d, errInner := broker.ParseConstraint(innerWire)
	if errOuter != nil || errInner != nil {
		return // drawn with members of two constraintKinds
	}
	covers := c.Covers(d)
	for range 8 {
		v := anyValueFor(p, oneFrom(p, inner, inner, "one_of", oneFrom(p, constraintKinds...)))
		if got, want := d.Allows(v), referenceAllows(innerWire, v); got != want {
			t.Fatalf("%s.Allows(%s) = %v, want %v", innerWire, toJSON(v), got, want)
		}
		if covers && d.Allows(v) {
			held[outer]++
			if !c.Allows(v) {
				t.Fatalf("%s covers %s, which allows %s, which the first does not", outerWire, innerWire, toJSON(v))
			}
		}
	}
}

// TestGlobCoversIsExact takes every pair of short patterns: one covers the other just when it
// matches all of a set of words that includes, for every run, one longer than any pattern.
func TestGlobCoversIsExact(t *testing.T) {
	globs, words := []string{}, map[string][]string{}
	for n, layer := 0, []string{""}; n < 4; n++ {
		layer = longer(layer, "a", "b", "*", "?")
		layer = slices.DeleteFunc(layer, func(s string) bool { return strings.Contains(s, "**") })
		globs = append(globs, layer...)
	}
	constraints := map[string]broker.Constraint{}
	for _, g := range globs {
		constraints[g] = mustParse(t, fmt.Sprintf(`{"glob":%q}`, g))
		list := []string{""}
		for _, c := range g {
			switch c {
			case '*':
				list = longer(list, "", "a", "b", "#", "######") // # is in no pattern
			case '?':
				list = longer(list, "a", "b", "#")
			default:
				list = longer(list, string(c))
			}
		}
		words[g] = list
	}
	covered := 0
	for _, p := range globs {
		for _, q := range globs {
			want := !slices.ContainsFunc(words[q], func(s string) bool { return !globExpr(p).MatchString(s) })
			if got := constraints[p].Covers(constraints[q]); got != want {
				t.Fatalf("glob %s covers %s = %v, want %v", p, q, got, want)
			}
			if want {
				covered++
			}
		}
	}
	t.Logf("%d of %d pairs are covered", covered, len(globs)*len(globs))
}

// longer puts each ending behind each text.
func longer(texts []string, endings ...string) (all []string) {
	for _, s := range texts {
		for _, e := range endings {
			all = append(all, s+e)
		}
	}
	return all
}
