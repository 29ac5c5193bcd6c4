package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// rules are the limits of the packages.
type rules struct {
	limits []limit     // the first that fits a package counts
	long   []exception // functions that may be longer than mostOfFunction
}

// limit holds the packages of a pattern: a path, or a path and everything below it, written path/... .
type limit struct {
	pattern string
	lines   int // most lines; zero: mostLines
	cycle   int // most files in a cycle; zero: 1
	methods int // most methods of one type; zero: no limit
	why     string
}

// exception names a function as the table prints it: f, or (T).f for a method of T or *T.
type exception struct{ pkg, name, why string }

// mostLines is the limit of every package without a larger one, and mostOfFunction that of every function without an
// exception.
const (
	mostLines      = 4000
	mostOfFunction = 80
)

const (
	asToday = "the figure when the row was written: lower it as the package improves"
	domain  = "a package of the domain can be read a few files at a time"
)

// tree is the table of this module. A limit may name a package that does not exist yet. An exception is for a table or a
// procedure with numbered steps, and gives the reason.
var tree = rules{
	limits: []limit{
		{pattern: "broker", cycle: 6, why: domain},
		{pattern: "broker/args/...", cycle: 6, why: domain},
		{pattern: "broker/selector/...", cycle: 6, why: domain},
		{pattern: "broker/engine", cycle: 6, methods: 75, why: "a procedure can be read without the others"},
		{pattern: "broker/engine/...", cycle: 6, why: domain},

		{pattern: "attest", cycle: 4, why: asToday},
		{pattern: "attest/workload", cycle: 5, why: asToday},
		{pattern: "broker/agent", cycle: 2, why: asToday},
		{pattern: "broker/api", cycle: 2, why: asToday},
		{pattern: "broker/audit", cycle: 4, why: asToday},
		{pattern: "broker/brokertest", cycle: 2, why: asToday},
		{pattern: "broker/policy", cycle: 9, why: asToday},
		{pattern: "broker/server", cycle: 13, why: asToday},
		{pattern: "broker/signals", cycle: 2, why: asToday},
		{pattern: "cmd/bench", cycle: 2, why: asToday},
		{pattern: "cmd/demo", cycle: 3, why: asToday},
		{pattern: "cmd/dev", cycle: 2, why: asToday},
		{pattern: "cmd/drill", cycle: 2, why: asToday},
		{pattern: "cmd/pawl", cycle: 2, why: asToday},
		{pattern: "cmd/wire", cycle: 9, why: asToday},
		{pattern: "plugins/exec", cycle: 5, why: asToday},
		{pattern: "plugins/jwt", cycle: 4, why: asToday},
		{pattern: "plugins/pki", cycle: 2, why: asToday},
		{pattern: "plugins/postgres", cycle: 3, why: asToday},
		{pattern: "plugins/ssh", cycle: 2, why: asToday},
		{pattern: "plugins/token", cycle: 2, why: asToday},
		{pattern: "plugins/vault", cycle: 9, why: asToday},
		{pattern: "store/bolt", cycle: 7, why: asToday},
	},
	long: []exception{},
}

// limitOf returns the first limit that fits, with the defaults filled in.
func (r rules) limitOf(pkg string) limit {
	found := limit{pattern: pkg}
	if i := slices.IndexFunc(r.limits, func(l limit) bool { return l.fits(pkg) }); i >= 0 {
		found = r.limits[i]
	}
	found.lines = cmp.Or(found.lines, mostLines)
	found.cycle = cmp.Or(found.cycle, 1)
	return found
}

func (l limit) fits(pkg string) bool {
	root, tree := strings.CutSuffix(l.pattern, "/...")
	return pkg == root || tree && strings.HasPrefix(pkg, root+"/")
}

// breaches returns each limit that a package breaks, and each exception that is no longer needed.
func (r rules) breaches(all []figures) (found []string) {
	say := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	long := map[string]int{}
	for _, f := range all {
		l := r.limitOf(f.pkg)
		if f.lines > l.lines {
			say("%s has %d lines, and may have %d", f.pkg, f.lines, l.lines)
		}
		if len(f.cycle) > l.cycle {
			say("%s has a cycle of %d files, and may have one of %d: %s",
				f.pkg, len(f.cycle), l.cycle, strings.Join(f.cycle, " "))
		}
		if l.methods > 0 && f.methods > l.methods {
			say("%s.%s has %d methods, and may have %d", f.pkg, f.methodsOf, f.methods, l.methods)
		}
		for _, fn := range f.functions {
			if fn.lines <= mostOfFunction {
				continue
			}
			long[f.pkg+"."+fn.name] = fn.lines
			if !r.mayBeLong(f.pkg, fn.name) {
				say("%s.%s has %d lines, and may have %d", f.pkg, fn.name, fn.lines, mostOfFunction)
			}
		}
	}
	for _, e := range r.long {
		if long[e.pkg+"."+e.name] == 0 {
			say("the exceptions list %s.%s, which is not longer than %d lines: delete the row", e.pkg, e.name, mostOfFunction)
		}
	}
	return found
}

func (r rules) mayBeLong(pkg, name string) bool {
	return slices.ContainsFunc(r.long, func(e exception) bool { return e.pkg == pkg && e.name == name })
}

// loose names the figures that fell below their row's, so that the rows can be lowered.
func (r rules) loose(all []figures) (notes []string) {
	for _, f := range all {
		if l := r.limitOf(f.pkg); l.why == asToday && len(f.cycle) < l.cycle {
			notes = append(notes, fmt.Sprintf("the largest cycle of %s has %d files, and its limit is %d: lower the limit",
				f.pkg, len(f.cycle), l.cycle))
		}
	}
	return notes
}
