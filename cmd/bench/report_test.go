package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestQuantile(t *testing.T) {
	s := samples{5, 1, 4, 2, 3}
	for _, row := range []struct{ q, want float64 }{{0, 1}, {0.2, 1}, {0.5, 3}, {0.8, 4}, {0.81, 5}, {0.99, 5}, {1, 5}} {
		if got := s.quantile(row.q); got != row.want {
			t.Errorf("%v.quantile(%v) = %v, want %v", s, row.q, got, row.want)
		}
	}
	if got := (samples{4, 1, 2, 9}).median(); got != 3 {
		t.Errorf("median of 1, 2, 4, 9 = %v, want 3", got)
	}
	if s[0] != 5 {
		t.Error("quantile has sorted its receiver")
	}
}

func TestClosedLoop(t *testing.T) {
	l := closedLoop(4, time.Minute, 100, func(int) error { return nil })
	if len(l.latencies) != 100 || l.err != nil {
		t.Errorf("closedLoop made %d calls, %v; want the 100 that it may, and no error", len(l.latencies), l.err)
	}
	no := errors.New("no")
	l = closedLoop(4, time.Minute, 1<<30, func(int) error { return no })
	if len(l.latencies) != 0 || !errors.Is(l.err, no) {
		t.Errorf("closedLoop counts %d calls that failed, with %v", len(l.latencies), l.err)
	}
}

func TestEach(t *testing.T) {
	seen := make([]bool, 50)
	if err := each(7, len(seen), func(i int) error { seen[i] = true; return nil }); err != nil {
		t.Fatal(err)
	}
	for i, ok := range seen {
		if !ok {
			t.Errorf("each left out %d", i)
		}
	}
	no := errors.New("no")
	if err := each(2, 5, func(int) error { return no }); !errors.Is(err, no) {
		t.Errorf("each = %v, want %v", err, no)
	}
}

// full is a report with a row of each kind.
func full() *report {
	var r report
	r.add(row{Name: "dead.postgres.1000.seconds", Unit: "s", Against: "vault"}, samples{0.3, 0.2, 0.4}, samples{2})
	r.add(row{Name: "dead.postgres.10000.seconds", Unit: "s"}, samples{3}, nil)
	r.add(row{Name: "dead.postgres.1000.vs_vault_best", Unit: "s"}, samples{0.5}, samples{2})
	r.add(row{Name: "issue.kv.c1.added_p50_ms", Unit: "ms"}, samples{1, 2, 3}, samples{0.4})
	r.add(row{Name: "issue.postgres.c16.throughput", Unit: "per second"}, samples{95}, samples{100})
	r.add(row{Name: "idle.rss_mb", Unit: "MB"}, samples{30}, samples{100})
	r.addQuantile(row{Name: "fence.10.p99_ms", Unit: "ms"}, 0.99, samples{1, 2, 30}, samples{1, 2, 30})
	r.add(row{Name: "resume.100000.seconds", Unit: "s"}, nil, nil)
	r.leaveOut("events", errors.New("there was no time"))
	r.judge()
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
		{"issue.kv.c1.added_p50_ms", 5, "≤ 2 met"},
		{"issue.postgres.c16.throughput", 0.95, "≥ ×0.9 met"},
		{"idle.rss_mb", 0.3, ""},
		{"fence.10.p99_ms", 1, "≤ 20 missed"},
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
	if err := full().writeJSON(file); err != nil {
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
	chart := full().chart()
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
	page := full().page(true)
	for _, want := range []string{"`dead.postgres.1000.vs_vault_best`: target ≥ ×5, measured ×4.00.", "| `idle.rss_mb` | MB | 30.0 | 100 | 0.3 |",
		"- `events`: there was no time", "quick run", "compared with vault"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
}
