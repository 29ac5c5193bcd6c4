// Package report collects the rows of a run of the measurements, and writes the table, the JSON, the chart and the page.
package report

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

// Row is one figure of ours, named by Name, with the same figure of something else that was measured in the same run,
// in turns. Scripts compare the JSON members.
type Row struct {
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
	Failed  int      `json:"failed,omitempty"` // measurements that failed and so are not behind ours: no aim is met

	Bound string    `json:"bound,omitempty"` // of the gate, which holds the ratio to twice the bound
	Held  *bool     `json:"held,omitempty"`  // null: the gate has no bound for it
	Tries []float64 `json:"tries,omitempty"` // the figures of the runs that the gate made; see Bounds
}

// Report collects rows.
type Report struct {
	rows    []Row
	left    []omission
	Machine []string // lines that describe the machine
	Began   time.Time
	Took    time.Duration
}

// omission is a measurement that failed, with the reason.
type omission struct{ what, why string }

// LeftOut reports whether a measurement was left out for this reason.
func (r *Report) LeftOut(what string, because error) bool {
	return slices.Contains(r.left, omission{what, because.Error()})
}

// Rows returns the rows so far.
func (r *Report) Rows() []Row { return r.rows }

// LeaveOut lists a measurement that failed, with the reason.
func (r *Report) LeaveOut(what string, err error) {
	r.left = append(r.left, omission{what, err.Error()})
}

// Add stores a row with the medians of the rounds as ours and theirs. theirs may be empty.
func (r *Report) Add(w Row, ours, theirs Samples) {
	if len(ours) == 0 {
		r.LeaveOut(w.Name, fmt.Errorf("no round succeeded"))
		return
	}
	if w.Ours = ours.Median(); w.Max == 0 {
		w.Min, w.Max = ours.Quantile(0), ours.Quantile(1)
	}
	if len(theirs) > 0 {
		t := theirs.Median()
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
	plus  float64 // may be added to the limit of the ratio, in the unit of ours
}

var aims = []aim{
	{rows: "issue.kv.c16.throughput", least: true, ratio: true, limit: 0.38},
	{rows: "issue.pki.c16.throughput", least: true, ratio: true, limit: 0.65},
	{rows: "issue.postgres.c16.throughput", least: true, ratio: true, limit: 0.95},
	{rows: "issue.kv.c64.throughput", least: true, ratio: true, limit: 0.5},
	{rows: "issue.jwt.c64.throughput", least: true, ratio: true, limit: 0.5},
	{rows: "issue.ssh.c64.throughput", least: true, ratio: true, limit: 0.5},
	{rows: "issue.kv.c16.added_p99_ms", ratio: true, limit: 3},
	{rows: "issue.*.c1.added_of_commit_ms", ratio: true, limit: 1.2, plus: 0.5},
	{rows: "issue.*.cpu_vs_vault", ratio: true, limit: 1},
	{rows: "issue.kv.vault_cpu", ratio: true, limit: 1.2},
	{rows: "issue.jwt.vault_cpu", ratio: true, limit: 1.2},
	{rows: "issue.ssh.vault_cpu", ratio: true, limit: 1.2},
	{rows: "close.pki.p50_ms", limit: 50},
	{rows: "events.listeners_10000.kb_each", limit: 25},
	{rows: "idle.tls_kb", limit: 20},
	{rows: "policy.1000.p99_us", limit: 50},
	{rows: "ledger.bolt.c64.per_s", least: true, ratio: true, limit: 0.9},
	{rows: "ledger.bytes_per_step", limit: 2022},
	{rows: "fence.flatness", ratio: true, limit: 1.5},
	{rows: "flood.revoke.*.p99_ms", limit: 250},
	{rows: "flood.other.p99_ms", ratio: true, limit: 3, plus: 50},
	{rows: "flood.rss_mb", limit: 1024},
	{rows: "growth.gb_per_day", limit: 2},
	{rows: "chains.*.page.p99_ms", limit: 50},
	{rows: "chains.*.plan.p99_ms", limit: 20},
	{rows: "fence.while_closing.p99_ms", ratio: true, limit: 2},
	{rows: "fence.*.p99_ms", limit: 20},
	{rows: "dead.postgres.1000.closed_seconds", ratio: true, limit: 1.5},
	{rows: "dead.postgres.1000.vs_floor", least: true, ratio: true, limit: 0.87}, // ours is ×1.15 of the floor
	{rows: "dead.postgres.1000.seconds", limit: 0.4},
	{rows: "dead.postgres.10000.seconds", limit: 4},
	{rows: "dead.postgres.1000.vs_vault_token", least: true, ratio: true, limit: 30},
	{rows: "dead.postgres.1000.vs_vault_best", least: true, ratio: true, limit: 5},
	{rows: "hostile.*.closed_seconds", limit: 60},
	{rows: "hostile.*.seconds", ratio: true, limit: 3},
	{rows: "alone.*.seconds", limit: 2},
	{rows: "resume.100000.seconds", ratio: true, limit: 2},
	{rows: "resume.bytes_per_grant", limit: 2048},
}

// Judge compares each row with its target. The first aim that matches counts. Where measurements failed, it is missed.
func (r *Report) Judge() {
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
		if a.plus > 0 {
			met = w.Ours <= a.limit**w.Theirs+a.plus
			w.Aim += fmt.Sprintf(" + %g", a.plus)
		}
		met = met && w.Failed == 0
		w.Met = &met
	}
}

// Figure prints a number with three significant digits.
func Figure(f float64) string {
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
	return Figure(*f)
}

func (w Row) verdict() string {
	switch {
	case w.Met == nil:
		return ""
	case *w.Met:
		return w.Aim + " met"
	}
	if w.Failed > 0 {
		return fmt.Sprintf("%s missed: %d failed", w.Aim, w.Failed)
	}
	return w.Aim + " missed"
}

// cells are the columns of a row in the table and on the page.
func (w Row) cells() []string {
	return []string{w.Name, w.Unit, Figure(w.Ours), optional(w.Theirs), optional(w.Ratio), fmt.Sprint(w.N),
		Figure(w.Min) + "–" + Figure(w.Max), w.verdict()}
}

var heads = []string{"row", "unit", "ours", "theirs", "ratio", "n", "min–max", "target"}

// Table prints the rows for people.
func (r *Report) Table(out io.Writer) {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, strings.Join(heads, "\t"))
	for _, w := range r.rows {
		fmt.Fprintln(t, strings.Join(w.cells(), "\t"))
	}
	_ = t.Flush() // it goes to the terminal
	for _, l := range r.left {
		fmt.Fprintf(out, "left out: %s: %s\n", l.what, l.why)
	}
	fmt.Fprintf(out, "%.0f s; docs/performance.md explains each comparison\n", r.Took.Seconds())
}

// WriteJSON writes the rows for scripts.
func (r *Report) WriteJSON(file string) error { return WriteRows(file, r.rows) }

// WriteRows writes rows so that [ReadRows] reads them.
func WriteRows(file string, rows []Row) error {
	raw, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(raw, '\n'), 0o644)
}

// AddQuantile stores a row with a quantile of single measurements as ours and theirs. The spread is that of ours.
func (r *Report) AddQuantile(w Row, q float64, ours, theirs Samples) {
	if len(ours) == 0 {
		r.LeaveOut(w.Name, fmt.Errorf("nothing was measured, %d failed: %s", w.Failed, w.Note))
		return
	}
	w.N, w.Min, w.Max = len(ours), ours.Quantile(0), ours.Quantile(1)
	var beside Samples
	if len(theirs) > 0 {
		beside = Samples{theirs.Quantile(q)}
	}
	r.Add(w, Samples{ours.Quantile(q)}, beside)
}
