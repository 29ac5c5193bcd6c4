package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// row is one figure of ours, named by Name, with the same figure of something else that was measured in the same run,
// in turns. Scripts compare the JSON members.
type row struct {
	Name    string   `json:"name"`
	Unit    string   `json:"unit"`   // of ours, theirs, min and max
	Ours    float64  `json:"ours"`   // the median over the rounds, where there are several
	Theirs  *float64 `json:"theirs"` // null: there is no comparison
	Ratio   *float64 `json:"ratio"`  // ours/theirs; for the rows "vs" of the time to death theirs/ours, how many times sooner
	N       int      `json:"n"`      // measurements behind ours
	Min     float64  `json:"min"`    // the smallest and the largest round of ours
	Max     float64  `json:"max"`
	Against string   `json:"against,omitempty"` // the meaning of theirs
	Aim     string   `json:"aim,omitempty"`     // the target of ours or, after "×", of the ratio
	Met     *bool    `json:"met,omitempty"`     // null: no aim
	Note    string   `json:"note,omitempty"`
}

// report collects rows.
type report struct {
	rows    []row
	left    []omission
	machine []string // lines that describe the machine
	began   time.Time
	took    time.Duration
}

// omission is a measurement that failed, with the reason.
type omission struct{ what, why string }

func (r *report) leaveOut(what string, err error) {
	r.left = append(r.left, omission{what, err.Error()})
}

// add stores a row with the medians of the rounds as ours and theirs. theirs may be empty.
func (r *report) add(w row, ours, theirs samples) {
	if len(ours) == 0 {
		r.leaveOut(w.Name, fmt.Errorf("no round succeeded"))
		return
	}
	if w.Ours = ours.median(); w.Max == 0 {
		w.Min, w.Max = ours.quantile(0), ours.quantile(1)
	}
	if len(theirs) > 0 {
		t := theirs.median()
		w.Theirs = &t
	}
	if w.N == 0 {
		w.N = len(ours)
	}
	if w.Theirs != nil && w.Ratio == nil {
		over, under := w.Ours, *w.Theirs
		if sooner(w.Name) {
			over, under = under, over
		}
		if ratio := over / under; !math.IsNaN(ratio) && !math.IsInf(ratio, 0) {
			w.Ratio = &ratio
		}
	}
	r.rows = append(r.rows, w)
}

// sooner reports whether a row's ratio is theirs divided by ours: how many times sooner ours was.
func sooner(name string) bool { return strings.Contains(name, ".vs_") }

// aim is the target of the rows that match a pattern of path.Match.
type aim struct {
	rows  string
	least bool // the figure must be at least the limit; otherwise at most
	ratio bool // of the ratio, not of ours
	limit float64
}

var aims = []aim{
	{"issue.postgres.c16.throughput", true, true, 0.9},
	{"issue.*.added_p50_ms", false, false, 2},
	{"issue.*.cpu_vs_vault", false, true, 1},
	{"policy.1000.p99_us", false, false, 50},
	{"ledger.bolt.c64.per_s", true, false, 5000},
	{"fence.flatness", false, true, 1.5},
	{"flood.revoke.*.p99_ms", false, false, 250},
	{"flood.other.p99_ms", false, true, 3},
	{"flood.rss_mb", false, false, 1024},
	{"fence.*.p99_ms", false, false, 20},
	{"dead.postgres.1000.seconds", false, false, 0.4},
	{"dead.postgres.10000.seconds", false, false, 4},
	{"dead.postgres.1000.vs_vault_token", true, true, 30},
	{"dead.postgres.1000.vs_vault_best", true, true, 5},
	{"hostile.*.closed_seconds", false, false, 60},
	{"hostile.*.seconds", false, true, 3},
	{"alone.*.seconds", false, false, 2},
	{"resume.100000.seconds", false, false, 2},
	{"resume.bytes_per_grant", false, false, 2048},
}

// judge compares each row with its target. The first aim that matches counts.
func (r *report) judge() {
	for i := range r.rows {
		w := &r.rows[i]
		at := slices.IndexFunc(aims, func(a aim) bool {
			ok, err := path.Match(a.rows, w.Name)
			return ok && err == nil
		})
		if at < 0 || aims[at].ratio && w.Ratio == nil {
			continue
		}
		a, got, sign := aims[at], w.Ours, ""
		if a.ratio {
			got, sign = *w.Ratio, "×"
		}
		met := got <= a.limit
		w.Aim = fmt.Sprintf("≤ %s%g", sign, a.limit)
		if a.least {
			met, w.Aim = got >= a.limit, fmt.Sprintf("≥ %s%g", sign, a.limit)
		}
		w.Met = &met
	}
}

// figure prints a number with three significant digits.
func figure(f float64) string {
	switch a := math.Abs(f); {
	case a >= 1000:
		return fmt.Sprintf("%.0f", f)
	case a >= 100:
		return fmt.Sprintf("%.0f", f)
	case a >= 10:
		return fmt.Sprintf("%.1f", f)
	case a >= 1:
		return fmt.Sprintf("%.2f", f)
	}
	return fmt.Sprintf("%.3g", f)
}

func optional(f *float64) string {
	if f == nil {
		return ""
	}
	return figure(*f)
}

func (w row) verdict() string {
	switch {
	case w.Met == nil:
		return ""
	case *w.Met:
		return w.Aim + " met"
	}
	return w.Aim + " missed"
}

// cells are the columns of a row in the table and on the page.
func (w row) cells() []string {
	return []string{w.Name, w.Unit, figure(w.Ours), optional(w.Theirs), optional(w.Ratio), fmt.Sprint(w.N),
		figure(w.Min) + "–" + figure(w.Max), w.verdict()}
}

var heads = []string{"row", "unit", "ours", "theirs", "ratio", "n", "min–max", "target"}

func (r *report) table(out io.Writer) {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, strings.Join(heads, "\t"))
	for _, w := range r.rows {
		fmt.Fprintln(t, strings.Join(w.cells(), "\t"))
	}
	_ = t.Flush() // it goes to the terminal
	for _, l := range r.left {
		fmt.Fprintf(out, "left out: %s: %s\n", l.what, l.why)
	}
	fmt.Fprintf(out, "%.0f s; docs/performance.md explains each comparison\n", r.took.Seconds())
}

func (r *report) writeJSON(file string) error {
	raw, err := json.MarshalIndent(r.rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(raw, '\n'), 0o644)
}

// addQuantile stores a row with a quantile of single measurements as ours and theirs. The spread is that of ours.
func (r *report) addQuantile(w row, q float64, ours, theirs samples) {
	if len(ours) == 0 {
		r.leaveOut(w.Name, fmt.Errorf("nothing was measured"))
		return
	}
	w.N, w.Min, w.Max = len(ours), ours.quantile(0), ours.quantile(1)
	var beside samples
	if len(theirs) > 0 {
		beside = samples{theirs.quantile(q)}
	}
	r.add(w, samples{ours.quantile(q)}, beside)
}
