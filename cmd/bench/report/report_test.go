package report

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestQuantile(t *testing.T) {
	s := Samples{5, 1, 4, 2, 3}
	for _, row := range []struct{ q, want float64 }{{0, 1}, {0.2, 1}, {0.5, 3}, {0.8, 4}, {0.81, 5}, {0.99, 5}, {1, 5}} {
		if got := s.Quantile(row.q); got != row.want {
			t.Errorf("%v.Quantile(%v) = %v, want %v", s, row.q, got, row.want)
		}
	}
	if got := (Samples{4, 1, 2, 9}).Median(); got != 3 {
		t.Errorf("median of 1, 2, 4, 9 = %v, want 3", got)
	}
	if s[0] != 5 {
		t.Error("quantile has sorted its receiver")
	}
}

func TestWelch(t *testing.T) {
	// Means 2 and 5, variances 1 and 4: -3 / sqrt(1/3 + 4/3).
	if got := Welch(Samples{1, 2, 3}, Samples{3, 5, 7}); math.Abs(got+2.32379) > 1e-4 {
		t.Errorf("Welch = %v, want -2.32379", got)
	}
}

// full is a report with a row of each kind.
func full() *Report {
	var r Report
	r.Add(Row{Name: "dead.postgres.1000.seconds", Unit: "s", Against: "vault"}, Samples{0.3, 0.2, 0.4}, Samples{2})
	r.Add(Row{Name: "dead.postgres.10000.seconds", Unit: "s"}, Samples{3}, nil)
	r.Add(Row{Name: "dead.postgres.1000.vs_vault_best", Unit: "s"}, Samples{0.5}, Samples{2})
	r.Add(Row{Name: "issue.kv.c1.added_of_commit_ms", Unit: "ms"}, Samples{1, 2, 3}, Samples{1.25})
	r.Add(Row{Name: "issue.jwt.c1.added_of_commit_ms", Unit: "ms"}, Samples{1, 2.1, 3}, Samples{1.25})
	r.Add(Row{Name: "dead.postgres.100.vs_floor", Unit: "s"}, Samples{2}, Samples{2})
	r.Add(Row{Name: "dead.postgres.1000.vs_floor", Unit: "s"}, Samples{2}, Samples{1.75})
	r.Add(Row{Name: "dead.postgres.1000.closed_seconds", Unit: "s"}, Samples{3.2}, Samples{2})
	r.Add(Row{Name: "issue.postgres.c16.throughput", Unit: "per second"}, Samples{95}, Samples{100})
	r.Add(Row{Name: "idle.rss_mb", Unit: "MB"}, Samples{30}, Samples{100})
	r.AddQuantile(Row{Name: "flood.other.p99_ms", Unit: "ms"}, 0.99, Samples{20, 79}, Samples{10})
	r.AddQuantile(Row{Name: "flood.revoke.socket.p99_ms", Unit: "ms", Failed: 41, Note: "41 backend_down"}, 0.99, Samples{20}, Samples{10})
	r.AddQuantile(Row{Name: "fence.10.p99_ms", Unit: "ms"}, 0.99, Samples{1, 2, 30}, Samples{1, 2, 30})
	r.Add(Row{Name: "resume.100000.seconds", Unit: "s"}, nil, nil)
	r.LeaveOut("events", errors.New("there was no time"))
	r.Judge()
	return &r
}

func TestJudge(t *testing.T) {
	r := full()
	for _, want := range []struct {
		name    string
		ratio   float64
		verdict string
	}{
		{"dead.postgres.1000.seconds", 0.15, "≤ 0.4 met"},
		{"dead.postgres.1000.vs_vault_best", 4, "≥ ×5 missed"},
		{"issue.kv.c1.added_of_commit_ms", 1.6, "≤ ×1.2 + 0.5 met"},
		{"issue.jwt.c1.added_of_commit_ms", 1.68, "≤ ×1.2 + 0.5 missed"},
		{"dead.postgres.100.vs_floor", 1, ""},
		{"dead.postgres.1000.vs_floor", 0.875, "≥ ×0.87 met"},
		{"dead.postgres.1000.closed_seconds", 1.6, "≤ ×1.5 missed"},
		{"issue.postgres.c16.throughput", 0.95, "≥ ×0.95 met"},
		{"idle.rss_mb", 0.3, ""},
		{"fence.10.p99_ms", 1, "≤ 20 missed"},
		{"flood.other.p99_ms", 7.9, "≤ ×3 + 50 met"},
		{"flood.revoke.socket.p99_ms", 2, "≤ 250 missed: 41 failed"},
	} {
		w, ok := r.row(want.name)
		if !ok || w.Ratio == nil || *w.Ratio-want.ratio > 1e-9 || want.ratio-*w.Ratio > 1e-9 || w.verdict() != want.verdict {
			t.Errorf("row %s = %v, want a ratio of %v and %q", want.name, w.cells(), want.ratio, want.verdict)
		}
	}
	if w, _ := r.row("dead.postgres.10000.seconds"); w.verdict() != "≤ 4 met" || w.Ratio != nil {
		t.Errorf("row = %v, want the aim of its own size and no ratio", w.cells())
	}
	if w, _ := r.row("dead.postgres.1000.seconds"); w.Min != 0.2 || w.Max != 0.4 || w.N != 3 {
		t.Errorf("row = %v, want the spread of three rounds", w.cells())
	}
	if _, ok := r.row("resume.100000.seconds"); ok || len(r.left) != 2 {
		t.Errorf("a row without a round is in the report, or is not listed as left out: %v", r.left)
	}
}

func TestJSON(t *testing.T) {
	file := filepath.Join(t.TempDir(), "bench.json")
	if err := full().WriteJSON(file); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var rows []map[string]any
	if err := json.Unmarshal(raw, &rows); err != nil {
		t.Fatal(err)
	}
	for _, w := range rows {
		for _, member := range []string{"name", "unit", "ours", "theirs", "ratio", "n", "min", "max"} {
			if _, ok := w[member]; !ok {
				t.Errorf("row %v has no member %q", w["name"], member)
			}
		}
	}
}

func TestChartIsXML(t *testing.T) {
	chart := full().Chart()
	for d := xml.NewDecoder(strings.NewReader(chart)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the chart is not XML: %v", err)
		}
	}
	if !strings.Contains(chart, "0.3 s") || strings.Contains(chart, "NaN") || strings.Contains(chart, "Inf") {
		t.Error("the chart lacks a bar, or has one without a length")
	}
}

func TestPage(t *testing.T) {
	page := full().Page(true)
	for _, want := range []string{"`dead.postgres.1000.vs_vault_best`: target ≥ ×5, measured ×4.00.", "| `idle.rss_mb` | MB | 30.0 | 100 | 0.3 |",
		"- `events`: there was no time", "quick run", "compared with vault",
		"- `flood.revoke.socket.p99_ms`: target ≤ 250, measured 20.0 ms, 41 failed."} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
}
