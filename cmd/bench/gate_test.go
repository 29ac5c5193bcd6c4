package main

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/cmd/bench/report"
)

// measuring is a section that reports a ratio of fence.flatness in each run, and the rows that it was asked for.
func measuring(ratios []float64, asked *[][]string) []section {
	add := func(b *bench, name string, ratio float64) {
		b.report.Add(report.Row{Name: name, Unit: "ms"}, report.Samples{ratio}, report.Samples{1})
	}
	return []section{
		{name: "fence", run: func(_ context.Context, b *bench) error {
			*asked = append(*asked, b.rows)
			add(b, "fence.flatness", ratios[len(*asked)-1])
			return nil
		}},
		{name: "rest", run: func(_ context.Context, b *bench) error {
			for _, bound := range report.Bounds {
				if bound.Row != "fence.flatness" && !bound.Time && bound.Family != "dead" && bound.Family != "closed" {
					add(b, bound.Row, bound.Limit)
				}
			}
			return nil
		}},
		{name: "dead", run: func(context.Context, *bench) error { return errNoPostgres }},
	}
}

func TestHeld(t *testing.T) {
	for _, row := range []struct {
		name   string
		ratios []float64
		tries  []float64 // in bench.json; nil: none, because the gate made one run
		says   string    // the error; empty: none
	}{
		{"at once", []float64{1}, []float64{1}, ""},
		{"in the second run", []float64{4, 1}, []float64{4, 1}, ""},
		{"in the third", []float64{4, 5, 1.5}, []float64{4, 5, 1.5}, ""},
		{"in none", []float64{4, 5, 3.1}, []float64{4, 5, 3.1}, "fence.flatness was ×4.00, ×5.00, ×3.10 in 3 runs out of 3"},
	} {
		t.Run(row.name, func(t *testing.T) {
			root, asked := t.TempDir(), [][]string{}
			err := held(t.Context(), options{root: root, quick: true, only: regexp.MustCompile("")}, measuring(row.ratios, &asked))
			if (err == nil) != (row.says == "") || err != nil && !strings.Contains(err.Error(), row.says) {
				t.Errorf("held = %v, want %q", err, row.says)
			}
			if len(asked) != len(row.ratios) {
				t.Errorf("there were %d runs, want %d", len(asked), len(row.ratios))
			}
			for i, rows := range asked {
				if want := []string{"fence.flatness"}; i == 0 && rows != nil || i > 0 && !slices.Equal(rows, want) {
					t.Errorf("run %d was to measure %v, want everything in the first and %v in the others", i+1, rows, want)
				}
			}
			rows, err := report.ReadRows(filepath.Join(root, "build", "bench.json"))
			if err != nil {
				t.Fatal(err)
			}
			at := slices.IndexFunc(rows, func(w report.Row) bool { return w.Name == "fence.flatness" })
			if len(rows) < 5 || at < 0 || rows[at].Ours != row.ratios[0] || !slices.Equal(rows[at].Tries, row.tries) {
				t.Errorf("bench.json has %+v, want all rows of the first run and the tries", rows)
			}
		})
	}
}

func TestHeldInterrupted(t *testing.T) {
	ctx, interrupt := context.WithCancel(t.Context())
	sections := []section{{name: "fence", run: func(context.Context, *bench) error { interrupt(); return ctx.Err() }}}
	if err := held(ctx, options{root: t.TempDir(), only: regexp.MustCompile("")}, sections); !errors.Is(err, context.Canceled) {
		t.Errorf("an interrupted gate gives %v, want that it held nothing", err)
	}
}

func TestNarrowed(t *testing.T) {
	for _, bound := range report.Bounds {
		if bound.Time {
			continue
		}
		o, err := narrowed(options{page: true}, []report.Bound{bound})
		if err != nil || o.page {
			t.Errorf("%s: %v, page %v", bound.Row, err, o.page)
		}
		if !slices.ContainsFunc(sections, func(s section) bool { return o.only.MatchString(s.name) }) {
			t.Errorf("%s is in no section: %v matches none", bound.Row, o.only)
		}
		b := &bench{options: o}
		if !b.wants(bound.Row[:len(bound.Row)-2]) || b.wants("other.") {
			t.Errorf("%s: a run of it wants %v", bound.Row, b.rows)
		}
	}
	o, err := narrowed(options{}, report.Bounds[len(report.Bounds)-2:])
	if err != nil || o.only.MatchString("dead") || o.only.MatchString("issues") || !o.only.MatchString("issue") || len(o.rows) != 2 {
		t.Errorf("narrowed = %v %v, %v; want the section issue alone", o.only, o.rows, err)
	}
}

func TestTakes(t *testing.T) {
	for _, row := range []struct {
		n     int
		quick bool
		rows  []string
		want  string // labels; the first, empty, is ours
	}{
		{100, true, nil, " vs_vault_best vs_floor vs_revoke_prefix vs_lease_by_lease vs_vault_token"},
		{1000, false, nil, " vs_vault_best vs_floor vs_revoke_prefix vs_lease_by_lease vs_vault_token"},
		{1000, true, nil, " vs_floor"},
		{10_000, false, nil, " vs_vault_best"},
		{100, true, []string{"dead.postgres.100.vs_floor"}, " vs_floor"},
		{1000, true, []string{"dead.postgres.1000.closed_seconds", "fence.flatness"}, ""},
	} {
		b, got := &bench{options: options{quick: row.quick, rows: row.rows}}, []string{}
		for _, way := range ways {
			if b.takes(way, row.n) {
				got = append(got, way.label)
			}
		}
		if strings.Join(got, " ") != row.want {
			t.Errorf("%d credentials, quick %v, rows %v: the ways %q, want %q", row.n, row.quick, row.rows, strings.Join(got, " "), row.want)
		}
	}
}

func TestFlagsThatExclude(t *testing.T) {
	for _, row := range []struct {
		args []string
		says string
	}{
		{[]string{"-against", "HEAD", "-gate"}, "give one of them"},
		{[]string{"issue"}, `"issue" is no flag`},
		{[]string{"-only", "("}, "-only: "},
	} {
		if err := command(t.Context(), row.args); err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("bench %v: %v, want %q", row.args, err, row.says)
		}
	}
}

// TestMakeBench checks the flags that make passes on.
func TestMakeBench(t *testing.T) {
	for _, row := range []struct {
		args []string
		want string
	}{
		{nil, "run ./cmd/bench"},
		{[]string{"QUICK=1"}, "run ./cmd/bench -quick -gate -page=false"},
		{[]string{"QUICK=1", "ONLY=^issue$$"}, "run ./cmd/bench -quick -gate -page=false -only '^issue$'"},
		{[]string{"AGAINST=HEAD~1", "ONLY=^(issue|events)$$"}, "run ./cmd/bench -against HEAD~1 -quick -only '^(issue|events)$'"},
		{[]string{"AGAINST=8532fd1", "QUICK=1"}, "run ./cmd/bench -against 8532fd1 -quick"},
	} {
		cmd := exec.CommandContext(t.Context(), "make", append([]string{"--dry-run", "--no-print-directory", "bench"}, row.args...)...)
		cmd.Dir = filepath.Join("..", "..")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("make bench %v: %v: %s", row.args, err, out)
		}
		_, after, _ := strings.Cut(strings.ReplaceAll(string(out), "\\\n", " "), "run ./cmd/bench")
		if got := strings.Join(strings.Fields("run ./cmd/bench "+after), " "); got != row.want {
			t.Errorf("make bench %v runs %q, want %q", row.args, got, row.want)
		}
	}
}
