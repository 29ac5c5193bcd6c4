package args_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/args/argstest"
	"pgregory.net/rapid"
)

// The generators draw from few words, so that constraints often allow the values.

func drawn(t *rapid.T) argstest.Pick {
	return func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "pick") }
}

// TestCoversIsSound checks for constraints c, d and values v that c.Covers(d) and d.Allows(v) imply c.Allows(v), and
// that Allows agrees with the reference.
func TestCoversIsSound(t *testing.T) {
	held := map[string]int{}
	property := func(t *rapid.T) {
		p := drawn(t)
		outer := argstest.OneFrom(p, append(slices.Clone(argstest.Kinds), "all")...)
		inner := argstest.Narrower(p, outer)
		checkPair(t, p, held, outer, inner)
	}
	for least, done := 10_000, 0; done < least; { // rapid draws fewer with -short
		rapid.Check(t, func(t *rapid.T) { done++; property(t) })
	}
	for _, kind := range append(slices.Clone(argstest.Kinds), "all") {
		if held[kind] < 10 {
			t.Errorf("only %d cases had a covering %s, a covered constraint and a value in both: "+
				"the generators draw too widely (%v)", held[kind], kind, held)
		}
	}
	t.Logf("cases in which all three held: %v", held)
}

type failer interface {
	Fatalf(format string, args ...any)
}

// checkPair draws two constraints of the kinds, and values. It skips a constraint that does not parse.
func checkPair(t failer, p argstest.Pick, held map[string]int, outer, inner string) {
	outerWire, innerWire := argstest.Constraint(p, outer), argstest.Constraint(p, inner)
	if p(8) == 0 {
		innerWire = outerWire
	}
	c, errOuter := args.ParseConstraint(outerWire)
	d, errInner := args.ParseConstraint(innerWire)
	if errOuter != nil || errInner != nil {
		return // drawn with members of two kinds
	}
	covers := c.Covers(d)
	for range 8 {
		v := argstest.ValueFor(p, argstest.OneFrom(p, inner, inner, "one_of", argstest.OneFrom(p, argstest.Kinds...)))
		if got, want := d.Allows(v), argstest.Allows(innerWire, v); got != want {
			t.Fatalf("%s.Allows(%s) = %v, want %v", innerWire, argstest.ToJSON(v), got, want)
		}
		if covers && d.Allows(v) {
			held[outer]++
			if !c.Allows(v) {
				t.Fatalf("%s covers %s, but does not allow %s", outerWire, innerWire, argstest.ToJSON(v))
			}
		}
	}
}

// TestGlobCoversIsExact checks every pair of short patterns. One covers the other exactly if it matches a set of
// words of the other. The set has, for every run of wildcards, a word longer than any pattern.
func TestGlobCoversIsExact(t *testing.T) {
	globs, words := []string{}, map[string][]string{}
	for n, layer := 0, []string{""}; n < 4; n++ {
		layer = longer(layer, "a", "b", "*", "?")
		layer = slices.DeleteFunc(layer, func(s string) bool { return strings.Contains(s, "**") })
		globs = append(globs, layer...)
	}
	constraints := map[string]args.Constraint{}
	for _, g := range globs {
		constraints[g] = argstest.Parse(fmt.Sprintf(`{"glob":%q}`, g))
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
			want := !slices.ContainsFunc(words[q], func(s string) bool { return !argstest.GlobExpr(p).MatchString(s) })
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

// longer appends each ending to each text.
func longer(texts []string, endings ...string) (all []string) {
	for _, s := range texts {
		for _, e := range endings {
			all = append(all, s+e)
		}
	}
	return all
}
