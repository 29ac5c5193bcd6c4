package report

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

const (
	// Tries is the number of runs in which a bound must be missed before the gate fails.
	Tries = 3
	// slack is the multiple of a bound from which on a run counts as a miss.
	slack = 2
)

// Gate holds the ratios of a run to [Bounds]. A bound is broken when it is missed by more than twice in each of three
// runs. Times are never held: both sides of a ratio are measured in the same run, so a slow machine slows both.
type Gate struct {
	bounds  []Bound
	figures map[string][]float64 // by row, one for each run that measured it
	runs    int
	without map[string]string // families that this machine cannot measure, with the reason
}

// NewGate returns a gate on the bounds that are ratios.
func NewGate() *Gate {
	g := &Gate{figures: map[string][]float64{}, without: map[string]string{}}
	for _, b := range Bounds {
		if !b.Time {
			g.bounds = append(g.bounds, b)
		}
	}
	return g
}

// Without excuses the families, which this machine cannot measure.
func (g *Gate) Without(why string, families ...string) {
	for _, f := range families {
		g.without[f] = why
	}
}

// Run adds the rows of a run.
func (g *Gate) Run(rows []Row) {
	g.runs++
	for _, b := range g.bounds {
		if w, ok := find(rows, b.Row); ok {
			if f, ok := b.figure(w); ok {
				g.figures[b.Row] = append(g.figures[b.Row], f)
			}
		}
	}
}

// held reports whether a run was within twice the bound.
func (g *Gate) held(b Bound) bool {
	return slices.ContainsFunc(g.figures[b.Row], func(f float64) bool { return b.holds(f, slack) })
}

// unmeasured reports whether no run measured anything of the family.
func (g *Gate) unmeasured(family string) bool {
	if _, excused := g.without[family]; excused {
		return false
	}
	return !slices.ContainsFunc(g.bounds, func(b Bound) bool { return b.Family == family && len(g.figures[b.Row]) > 0 })
}

// Again lists the bounds that another run must measure: those that were missed so far, and all of a family of which
// nothing was measured. It is empty after the last run.
func (g *Gate) Again() (list []Bound) {
	if g.runs >= Tries {
		return nil
	}
	for _, b := range g.bounds {
		if missed := len(g.figures[b.Row]) > 0 && !g.held(b); missed || g.unmeasured(b.Family) {
			list = append(list, b)
		}
	}
	return list
}

// broken lists the bounds that were missed in each of three runs.
func (g *Gate) broken() (list []Bound) {
	for _, b := range g.bounds {
		if len(g.figures[b.Row]) >= Tries && !g.held(b) {
			list = append(list, b)
		}
	}
	return list
}

// Err says which bounds are broken, and which families no run could measure: a gate that measures nothing would hold
// nothing.
func (g *Gate) Err() error {
	var says []string
	for _, b := range g.broken() {
		says = append(says, fmt.Sprintf("%s was %s in %d runs out of %d, and may be %s: its bound is %s",
			b.Row, figures(g.figures[b.Row]), len(g.figures[b.Row]), g.runs, b.times(slack), b.times(1)))
	}
	var families []string
	for _, b := range g.bounds {
		if g.runs >= Tries && !slices.Contains(families, b.Family) && g.unmeasured(b.Family) {
			families = append(families, b.Family)
			says = append(says, fmt.Sprintf("no run measured a row of %q: the lines \"left out\" above give the reason", b.Family))
		}
	}
	if len(says) == 0 {
		return nil
	}
	return fmt.Errorf("the gate: %s; `go run ./cmd/bench -against HEAD~1 -quick -only 'SECTION'` shows what a change did",
		strings.Join(says, "; "))
}

// Mark adds the bounds and the figures of all runs to the rows of the first.
func (g *Gate) Mark(rows []Row) {
	for i := range rows {
		at := slices.IndexFunc(g.bounds, func(b Bound) bool { return b.Row == rows[i].Name })
		if at < 0 || len(g.figures[rows[i].Name]) == 0 {
			continue
		}
		held := g.held(g.bounds[at])
		rows[i].Bound, rows[i].Held, rows[i].Tries = g.bounds[at].times(1), &held, g.figures[rows[i].Name]
	}
}

// Print lists the bounds that were missed or not measured, for people.
func (g *Gate) Print(out io.Writer) {
	measured := 0
	for _, b := range g.bounds {
		seen := g.figures[b.Row]
		if len(seen) > 0 {
			measured++
		}
		why := g.without[b.Family]
		switch {
		case len(seen) == 0 && why != "":
			fmt.Fprintf(out, "gate: not measured: %s: %s\n", b.Row, why)
		case len(seen) == 0:
			fmt.Fprintf(out, "gate: not measured: %s\n", b.Row)
		case !g.held(b) && len(seen) < Tries:
			fmt.Fprintf(out, "gate: %s was %s, bound %s: missed, and not measured in every run\n", b.Row, figures(seen), b.times(1))
		case !g.held(b):
			fmt.Fprintf(out, "gate: %s was %s, bound %s: broken\n", b.Row, figures(seen), b.times(1))
		case len(seen) > 1:
			fmt.Fprintf(out, "gate: %s was %s, bound %s: held in the last run\n", b.Row, figures(seen), b.times(1))
		}
	}
	fmt.Fprintf(out, "gate: %d of %d bounds measured, %d broken, %d runs\n", measured, len(g.bounds), len(g.broken()), g.runs)
}

func figures(list []float64) string {
	var texts []string
	for _, f := range list {
		texts = append(texts, "×"+Figure(f))
	}
	return strings.Join(texts, ", ")
}
