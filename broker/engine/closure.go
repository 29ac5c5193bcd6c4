package engine

import (
	"fmt"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// tally counts the grants under a revocation.
type tally struct {
	left   int       // not closed
	alive  int       // of these, shown to work
	static int       // closed, and the static secret works on
	total  int       // of left and static, when they were first listed
	latest time.Time // when the last of left ends by itself
}

// tallyOf counts grants that were just listed.
func tallyOf(left []broker.Grant, static int) tally {
	t := tally{left: len(left), static: static, total: len(left) + static}
	for _, g := range left {
		if g.Outcome == broker.OutcomeAlive {
			t.alive++
		}
		if end := g.LatestEnd(); end.After(t.latest) {
			t.latest = end
		}
	}
	return t
}

// recount brings the revocation's numbers up to date. What is left decides the closure; what is closed was proven, except
// a static secret.
func recount(rv *broker.Revocation, t tally) {
	rv.Grants = max(rv.Grants, t.total) // none can join after the fence
	rv.Alive, rv.Unknown, rv.Static, rv.LatestEnd = t.alive+t.static, t.left-t.alive, t.static, t.latest
	rv.Dead = rv.Grants - rv.Alive - rv.Unknown
	switch {
	case rv.Alive > 0:
		rv.Closure = broker.ClosurePartial
	case rv.Unknown > 0 || rv.Tokens > 0 || rv.Unswept:
		rv.Closure = broker.ClosureUnknown
	default:
		rv.Closure = broker.ClosureClosed
	}
}

const tallyFormat = "%d dead, %d alive, %d unknown of %d"

// tallyText is the revocation's numbers in words; parseTally reads them back.
func tallyText(rv broker.Revocation) string {
	return fmt.Sprintf("%s: "+tallyFormat, rv.Closure, rv.Dead, rv.Alive, rv.Unknown, rv.Grants)
}

func parseTally(detail string) (t broker.Tally, ok bool) {
	closure, counts, ok := strings.Cut(detail, ": ")
	t.Closure = broker.Closure(closure)
	_, err := fmt.Sscanf(counts, tallyFormat, &t.Dead, &t.Alive, &t.Unknown, &t.Grants)
	return t, ok && err == nil
}
