package closing

import (
	"fmt"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Counts counts the grants under a revocation.
type Counts struct {
	Left   int       // not closed
	Alive  int       // of these, shown to work
	Static int       // closed, while the static secret still works
	Leases int       // closed, while Vault has still to remove the lease
	Total  int       // left and static, when they were first listed
	Latest time.Time // when the last of those left ends by itself
}

// CountsOf counts the listed grants that are not closed, with the numbers of static ones and of leftover leases.
func CountsOf(left []broker.Grant, static, leases int) Counts {
	c := Counts{Left: len(left), Static: static, Leases: leases, Total: len(left) + static}
	for _, g := range left {
		c.add(g.Outcome, g.LatestEnd())
	}
	return c
}

func (c *Counts) add(outcome broker.Outcome, end time.Time) {
	if outcome == broker.OutcomeAlive {
		c.Alive++
	}
	if end.After(c.Latest) {
		c.Latest = end
	}
}

// Apply updates the revocation's counts and its closure. Each closed grant was proven dead, except a static one. The
// revocation's Tokens and Unswept must be up to date.
func (c Counts) Apply(rv *broker.Revocation) {
	rv.Uncounted = false
	rv.Grants = max(rv.Grants, c.Total) // no grant can join after the fence
	rv.Alive, rv.Unknown, rv.Static, rv.LatestEnd = c.Alive+c.Static, c.Left-c.Alive, c.Static, c.Latest
	rv.Dead = rv.Grants - rv.Alive - rv.Unknown
	rv.Leases = c.Leases // whatever they are, the closure does not depend on them
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

// FormatTally formats the revocation's closure and counts for the audit log.
func FormatTally(rv broker.Revocation) string {
	text := fmt.Sprintf("%s: "+tallyFormat, rv.Closure, rv.Dead, rv.Alive, rv.Unknown, rv.Grants)
	if rv.Leases > 0 {
		text += fmt.Sprintf("; leases still being removed: %d", rv.Leases)
	}
	return text
}

// ParseTally parses the text of FormatTally.
func ParseTally(detail string) (t broker.Tally, ok bool) {
	closure, counts, ok := strings.Cut(detail, ": ")
	t.Closure = broker.Closure(closure)
	_, err := fmt.Sscanf(counts, tallyFormat, &t.Dead, &t.Alive, &t.Unknown, &t.Grants)
	return t, ok && err == nil
}
