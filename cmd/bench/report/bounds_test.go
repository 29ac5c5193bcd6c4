package report

import (
	"flag"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the bounds of docs/promises.md")

const docs = "../../../docs/"

func read(t *testing.T, page string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.FromSlash(docs + page))
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// measured returns the rows of docs/performance.md.
func measured(t *testing.T) []Row {
	t.Helper()
	rows, err := ParsePage(read(t, "performance.md"))
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

func TestPromises(t *testing.T) {
	page := read(t, "promises.md")
	want, err := Promises(page, measured(t))
	switch {
	case err != nil:
		t.Fatal(err)
	case want == page:
	case !*update:
		t.Error("the bounds of docs/promises.md differ from the table: run go test ./cmd/bench/report -run Promises -update")
	default:
		if err := os.WriteFile(filepath.FromSlash(docs+"promises.md"), []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Promises("# Promises\n", nil); err == nil || !strings.Contains(err.Error(), promisesBegin) {
		t.Errorf("a page without a place for the bounds gives %v, want the marks that it lacks", err)
	}
	for _, want := range []string{"| ≤ 20 ms | 5.42 ms | `fence.100000.p99_ms` |", "| ≤ ×1.5 | ×1.45 | `dead.postgres.1000.vs_floor` |",
		"| ≥ ×0.3 | not in it | `issue.pki.c16.throughput` |"} {
		ratio, ours := 0.689, 5.42
		got, err := Promises(promisesBegin+promisesEnd, []Row{{Name: "fence.100000.p99_ms", Unit: "ms", Ours: ours},
			{Name: "dead.postgres.1000.vs_floor", Ratio: &ratio}})
		if err != nil || !strings.Contains(got, want) {
			t.Errorf("the bounds lack %q: %v\n%s", want, err, got)
		}
	}
}

// TestBoundsOfTheLastRun checks that no bound promises more than the last full run has shown.
func TestBoundsOfTheLastRun(t *testing.T) {
	rows, seen := measured(t), 0
	for _, b := range Bounds {
		w, ok := find(rows, b.Row)
		if !ok {
			continue
		}
		if f, ok := b.figure(w); ok {
			seen++
			if !b.holds(f, 1) {
				t.Errorf("docs/performance.md has %s for %s, and its bound is %s: state a bound that holds", Figure(f), b.Row, b.times(1))
			}
		}
	}
	if seen < 10 {
		t.Errorf("docs/performance.md has %d of the %d bounds", seen, len(Bounds))
	}
}

func TestBoundFigures(t *testing.T) {
	half, none, nothing := 0.5, math.NaN(), 0.0
	for _, row := range []struct {
		bound       Bound
		row         Row
		want        float64 // NaN: none
		holds, gate bool    // within the bound, and within twice of it
		says        string
	}{
		{Bound{Limit: 0.4}, Row{Name: "a", Ratio: &half}, 0.5, false, true, "≤ ×0.4"},
		{Bound{Limit: 0.2}, Row{Name: "a", Ratio: &half}, 0.5, false, false, "≤ ×0.2"},
		{Bound{Limit: 0.25}, Row{Name: "a", Ratio: &half}, 0.5, false, true, "≤ ×0.25"},
		{Bound{Limit: 2}, Row{Name: "dead.postgres.1.vs_floor", Ratio: &half}, 2, true, true, "≤ ×2"},
		{Bound{Limit: 1.5}, Row{Name: "dead.postgres.1.vs_floor", Ratio: &half}, 2, false, true, "≤ ×1.5"},
		{Bound{Limit: 0.6, Least: true}, Row{Name: "a", Ratio: &half}, 0.5, false, true, "≥ ×0.6"},
		{Bound{Limit: 1.1, Least: true}, Row{Name: "a", Ratio: &half}, 0.5, false, false, "≥ ×1.1"},
		{Bound{Limit: 20, Time: true}, Row{Name: "a", Ours: 5, Ratio: &half}, 5, true, true, "≤ 20"},
		{Bound{Limit: 1}, Row{Name: "a", Ours: 5}, none, false, false, "≤ ×1"},
		{Bound{Limit: 1}, Row{Name: "dead.postgres.1.vs_floor", Ratio: &nothing}, none, false, false, "≤ ×1"},
	} {
		f, ok := row.bound.figure(row.row)
		if ok == math.IsNaN(row.want) || ok && f != row.want {
			t.Errorf("%+v of %+v = %v, %v; want %v", row.bound, row.row, f, ok, row.want)
		}
		if ok && (row.bound.holds(f, 1) != row.holds || row.bound.holds(f, slack) != row.gate) {
			t.Errorf("%+v holds %v: %v, and twice %v; want %v, %v", row.bound, f, row.bound.holds(f, 1), row.bound.holds(f, slack), row.holds, row.gate)
		}
		if got := row.bound.times(1); got != row.says {
			t.Errorf("%+v says %q, want %q", row.bound, got, row.says)
		}
	}
}

func TestParsePage(t *testing.T) {
	r := full()
	got, err := ParsePage(r.Page(false))
	if err != nil || len(got) != len(r.rows) {
		t.Fatalf("ParsePage = %d rows, %v; want the %d of the page", len(got), err, len(r.rows))
	}
	for i, w := range r.rows {
		if got[i].Name != w.Name || got[i].Unit != w.Unit || (got[i].Ratio == nil) != (w.Ratio == nil) || (got[i].Theirs == nil) != (w.Theirs == nil) {
			t.Errorf("row %+v is read as %+v", w, got[i])
		}
	}
	row := "| `a` | ms | 1.5 | 2 | 0.75 | 3 | 1–2 |  |\n"
	for _, bad := range []struct{ page, says string }{
		{"# Performance\n", "Every row"},
		{"\n## Every row\n" + strings.Replace(row, "| ms ", "", 1), "7 cells"},
		{"\n## Every row\n" + strings.Replace(row, "1.5", "fast", 1), "third cell"},
		{"\n## Every row\n" + strings.Replace(row, "1.5", "", 1), "third cell"},
		{"\n## Every row\n" + strings.Replace(row, "0.75", "×2", 1), "invalid syntax"},
		{"\n## Every row\n" + strings.Replace(row, "0.75", "NaN", 1), "no figure"},
	} {
		if _, err := ParsePage(bad.page); err == nil || !strings.Contains(err.Error(), bad.says) {
			t.Errorf("ParsePage(%q) = %v, want %q", bad.page, err, bad.says)
		}
	}
}

func FuzzParsePage(f *testing.F) {
	f.Add(full().Page(true))
	f.Add("\n## Every row\n| `a` | ms | 1.5 |  |  | 3 | 1–2 |  |\n")
	f.Fuzz(func(t *testing.T, page string) {
		rows, err := ParsePage(page)
		if err != nil {
			return
		}
		for _, w := range rows {
			for _, f := range []*float64{&w.Ours, w.Theirs, w.Ratio} {
				if f != nil && (math.IsNaN(*f) || math.IsInf(*f, 0)) {
					t.Errorf("row %+v was taken", w)
				}
			}
		}
		if _, err := Promises(promisesBegin+promisesEnd, rows); err != nil {
			t.Error(err)
		}
	})
}
