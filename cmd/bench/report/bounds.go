package report

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Bound is a figure that the product is held to. docs/promises.md states each, and the gate holds the ratios.
type Bound struct {
	Row     string  // that it is about
	Says    string  // the promise, for docs/promises.md
	Limit   float64 // of ours divided by theirs or, with Time, of ours in the row's unit
	Least   bool    // the figure must be at least the limit; otherwise at most
	Time    bool    // the gate ignores it: a busy machine is no fault of the product
	Family  string  // of rows that are measured together; empty with Time
	Section string  // regular expression of the sections that measure the row; empty with Time
}

// Bounds is the one table of bounds. Limits are near the last full run. Change one only with a measurement, and where a
// promise gets weaker say why in the commit.
var Bounds = []Bound{
	{Row: "fence.10.p99_ms", Limit: 20, Time: true,
		Says: "A revocation is acknowledged: p99, a chain of 10 live secrets"},
	{Row: "fence.100000.p99_ms", Limit: 20, Time: true,
		Says: "The same for a chain of 100,000"},
	{Row: "fence.flatness", Limit: 1.5, Family: "fence", Section: "fence",
		Says: "p50 of the chain of 100,000, of that of the chain of 10"},
	{Row: "dead.postgres.1.vs_floor", Limit: 1.5, Family: "dead", Section: "dead",
		Says: "1 PostgreSQL login with a session is dead, of the server's own floor"},
	{Row: "dead.postgres.100.vs_floor", Limit: 1.5, Family: "dead", Section: "dead",
		Says: "100 of them"},
	{Row: "dead.postgres.1000.vs_floor", Limit: 1.5, Family: "dead", Section: `dead|dead\.many`,
		Says: "1,000 of them"},
	{Row: "dead.postgres.1.closed_seconds", Limit: 3, Family: "closed", Section: "dead",
		Says: "The revocation of 1 is CLOSED, of the time until it is dead"},
	{Row: "dead.postgres.100.closed_seconds", Limit: 8, Family: "closed", Section: "dead",
		Says: "The revocation of 100"},
	{Row: "dead.postgres.1000.closed_seconds", Limit: 21, Family: "closed", Section: `dead|dead\.many`,
		Says: "The revocation of 1,000"},
	{Row: "policy.1000.p50_us", Limit: 0.05, Family: "decision", Section: "policy",
		Says: "A decision over 1,000 policies: p50, of cedar-go over all of them"},
	{Row: "policy.1000_all_apply.p50_us", Limit: 0.5, Family: "decision", Section: "policy",
		Says: "The same where every policy is in scope"},
	{Row: "issue.kv.c16.throughput", Limit: 0.1, Least: true, Family: "issue", Section: "issue",
		Says: "Steps a second of 16 clients, of direct calls to Vault: kv"},
	{Row: "issue.jwt.c16.throughput", Limit: 0.12, Least: true, Family: "issue", Section: "issue", Says: "jwt"},
	{Row: "issue.pki.c16.throughput", Limit: 0.3, Least: true, Family: "issue", Section: "issue", Says: "pki"},
	{Row: "issue.ssh.c16.throughput", Limit: 0.2, Least: true, Family: "issue", Section: "issue", Says: "ssh"},
	{Row: "issue.postgres.c16.throughput", Limit: 0.54, Least: true, Family: "issue", Section: "issue", Says: "postgres"},
}

// figure gives the figure of a row that the bound is about. It is not ok where the row has no such figure.
func (b Bound) figure(w Row) (f float64, ok bool) {
	switch {
	case b.Time:
		f = w.Ours
	case w.Ratio == nil:
		return 0, false
	case sooner(w.Name):
		f = 1 / *w.Ratio
	default:
		f = *w.Ratio
	}
	return f, !math.IsNaN(f) && !math.IsInf(f, 0)
}

// holds reports whether a figure is within slack times the bound.
func (b Bound) holds(f, slack float64) bool {
	if b.Least {
		return f >= b.Limit/slack
	}
	return f <= b.Limit*slack
}

// times gives slack times the bound in words.
func (b Bound) times(slack float64) string {
	sign, limit := "≤", b.Limit*slack
	if b.Least {
		sign, limit = "≥", b.Limit/slack
	}
	if b.Time {
		return fmt.Sprintf("%s %.3g", sign, limit)
	}
	return fmt.Sprintf("%s ×%.3g", sign, limit)
}

// The marks of the table of bounds in docs/promises.md.
const (
	promisesBegin = "<!-- from cmd/bench/report, by make bench or go test ./cmd/bench/report -update -->\n"
	promisesEnd   = "<!-- end of the bounds -->\n"
)

// Promises gives the text of docs/promises.md with the table of bounds, and their figures in the rows of a full run.
func Promises(page string, measured []Row) (string, error) {
	before, rest, ok := strings.Cut(page, promisesBegin)
	_, after, ended := strings.Cut(rest, promisesEnd)
	if !ok || !ended {
		return "", fmt.Errorf("docs/promises.md has no place for the bounds: it needs the lines\n%s%s", promisesBegin, promisesEnd)
	}
	var b strings.Builder
	b.WriteString(before + promisesBegin + "\n| promise | bound | last full run | row |\n|---|---|---|---|\n")
	for _, bound := range Bounds {
		limit, figure := bound.times(1), "not in it"
		w, _ := find(measured, bound.Row)
		if bound.Time {
			limit += " ms"
		}
		if f, ok := bound.figure(w); ok && w.Name != "" {
			figure = "×" + Figure(f)
			if bound.Time {
				figure = Figure(f) + " " + w.Unit
			}
		}
		fmt.Fprintf(&b, "| %s | %s | %s | `%s` |\n", bound.Says, limit, figure, bound.Row)
	}
	b.WriteString("\n" + promisesEnd + after)
	return b.String(), nil
}

// ParsePage reads the rows of docs/performance.md: name, unit, ours, theirs and ratio, with the three digits that the
// page has.
func ParsePage(page string) (rows []Row, err error) {
	_, table, ok := strings.Cut(page, "\n## Every row\n")
	if !ok {
		return nil, errors.New("docs/performance.md has no section \"Every row\": `make bench` writes it")
	}
	for line := range strings.Lines(table) {
		if strings.HasPrefix(line, "#") {
			break
		}
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		w, err := parseLine(line)
		if err != nil {
			return nil, fmt.Errorf("docs/performance.md: the row %q: %w", strings.TrimSpace(line), err)
		}
		rows = append(rows, w)
	}
	return rows, nil
}

// parseLine reads a line that [Report.markdown] wrote.
func parseLine(line string) (w Row, err error) {
	cells := strings.Split(strings.TrimSpace(line), " | ")
	if len(cells) != len(heads) {
		return w, fmt.Errorf("it has %d cells, and must have %d", len(cells), len(heads))
	}
	w.Name, w.Unit = strings.Trim(cells[0], "| `"), cells[1]
	ours, err := number(cells[2])
	if err != nil || ours == nil {
		return w, errors.Join(errors.New("the third cell must be a number"), err)
	}
	w.Ours = *ours
	theirs, theirsErr := number(cells[3])
	ratio, ratioErr := number(cells[4])
	w.Theirs, w.Ratio = theirs, ratio
	return w, errors.Join(theirsErr, ratioErr)
}

// number reads a cell of the page; nil: it is empty.
func number(cell string) (*float64, error) {
	cell = strings.TrimSpace(cell)
	if cell == "" {
		return nil, nil
	}
	f, err := strconv.ParseFloat(cell, 64)
	if err == nil && (math.IsNaN(f) || math.IsInf(f, 0)) {
		err = fmt.Errorf("%s is no figure", cell)
	}
	return &f, err
}
