package report

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// Pair is a row that two builds have measured in turns.
type Pair struct {
	Name   string   `json:"name"`
	Unit   string   `json:"unit"`
	New    float64  `json:"new"`              // median over the rounds of ours in the newer build
	Old    float64  `json:"old"`              // the same in the older build
	Ratio  *float64 `json:"ratio"`            // new/old; null: the older one is zero
	Min    *float64 `json:"min"`              // the smallest and the largest ratio of one round
	Max    *float64 `json:"max"`              //
	Rounds int      `json:"rounds"`           // in which both builds measured the row
	Note   string   `json:"note,omitempty"`   // why the row is not compared
	OnlyIn string   `json:"onlyIn,omitempty"` // "new" or "old": the other build does not have the row
}

// Compare pairs the rows of two builds. Element i of both is round i. A row counts in the rounds in which both builds
// measured it.
func Compare(newer, older [][]Row) (pairs []Pair) {
	for _, name := range names(newer, older) {
		var here, there, ratios Samples
		p := Pair{Name: name}
		inNew, inOld := false, false
		for i := range max(len(newer), len(older)) {
			a, isNew := at(newer, i, name)
			b, isOld := at(older, i, name)
			inNew, inOld = inNew || isNew, inOld || isOld
			p.Unit = cmp.Or(p.Unit, a.Unit, b.Unit)
			switch {
			case !isNew || !isOld:
				continue
			case a.Unit != b.Unit:
				p.Note = fmt.Sprintf("one build measures %s, the other %s", a.Unit, b.Unit)
				continue
			}
			here, there = append(here, a.Ours), append(there, b.Ours)
			if b.Ours != 0 {
				ratios = append(ratios, a.Ours/b.Ours)
			}
		}
		switch {
		case !inOld:
			p.OnlyIn = "new"
		case !inNew:
			p.OnlyIn = "old"
		case len(here) == 0 && p.Note == "":
			p.Note = "in no round did both builds measure it"
		case len(here) > 0:
			p.New, p.Old, p.Rounds = here.Median(), there.Median(), len(here)
			if p.Old != 0 && len(ratios) > 0 {
				ratio, least, most := p.New/p.Old, ratios.Quantile(0), ratios.Quantile(1)
				p.Ratio, p.Min, p.Max = &ratio, &least, &most
			}
		}
		pairs = append(pairs, p)
	}
	return pairs
}

// names lists the rows of both builds, each once, in the order of the newer build.
func names(builds ...[][]Row) (list []string) {
	seen := map[string]bool{}
	for _, rounds := range builds {
		for _, rows := range rounds {
			for _, w := range rows {
				if !seen[w.Name] {
					list, seen[w.Name] = append(list, w.Name), true
				}
			}
		}
	}
	return list
}

func at(rounds [][]Row, i int, name string) (Row, bool) {
	if i >= len(rounds) {
		return Row{}, false
	}
	return find(rounds[i], name)
}

// Comparison has the rows that two builds measured in turns.
type Comparison struct {
	Old, New string // the builds, in words
	Pairs    []Pair
}

// Table prints the pairs for people, and then the rows that one build does not have.
func (c Comparison) Table(out io.Writer) {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "row\tunit\t%s\t%s\tratio\tmin–max of a round\trounds\n", c.New, c.Old)
	for _, p := range c.Pairs {
		if p.Rounds == 0 {
			continue
		}
		spread := ""
		if p.Ratio != nil {
			spread = "×" + Figure(*p.Min) + "–×" + Figure(*p.Max)
		}
		ratio := optional(p.Ratio)
		if ratio != "" {
			ratio = "×" + ratio
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%d\n", p.Name, p.Unit, Figure(p.New), Figure(p.Old), ratio, spread, p.Rounds)
	}
	_ = t.Flush() // it goes to the terminal
	c.missing(out, "new", c.Old+" does not have")
	c.missing(out, "old", c.New+" does not have")
	for _, p := range c.Pairs {
		if p.Note != "" {
			fmt.Fprintf(out, "not compared: %s: %s\n", p.Name, p.Note)
		}
	}
}

func (c Comparison) missing(out io.Writer, onlyIn, says string) {
	var list []string
	for _, p := range c.Pairs {
		if p.OnlyIn == onlyIn {
			list = append(list, p.Name)
		}
	}
	if len(list) > 0 {
		slices.Sort(list)
		fmt.Fprintf(out, "%s: %s\n", says, strings.Join(list, ", "))
	}
}

// WriteJSON writes the pairs for scripts.
func (c Comparison) WriteJSON(file string) error {
	raw, err := json.MarshalIndent(c.Pairs, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(raw, '\n'), 0o644)
}
