package report

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// good is a quick run in which each bound holds exactly.
func good() (rows []Row) {
	for _, b := range Bounds {
		ratio := b.Limit
		if sooner(b.Row) {
			ratio = 1 / b.Limit
		}
		rows = append(rows, Row{Name: b.Row, Ours: 1, Ratio: &ratio})
	}
	return rows
}

// with changes the ratio of a row to a multiple of its bound, in the bad direction; zero: the row is left out.
func with(rows []Row, name string, times float64) []Row {
	rows = slices.Clone(rows)
	for i := range rows {
		if rows[i].Name != name {
			continue
		}
		if times == 0 {
			return slices.Delete(rows, i, i+1)
		}
		b := Bounds[slices.IndexFunc(Bounds, func(b Bound) bool { return b.Row == name })]
		ratio := *rows[i].Ratio * times
		if b.Least || sooner(name) {
			ratio = *rows[i].Ratio / times
		}
		rows[i].Ratio = &ratio
		if b.Time {
			rows[i].Ours = b.Limit * times
		}
		return rows
	}
	panic("there is no row " + name)
}

// alone keeps one row, as a further run does.
func alone(rows []Row, name string) []Row {
	w, ok := find(rows, name)
	if !ok {
		return nil
	}
	return []Row{w}
}

func TestGate(t *testing.T) {
	const row = "fence.flatness"
	again := func(times float64) []Row { return alone(with(good(), row, times), row) }
	for _, c := range []struct {
		name   string
		runs   [][]Row
		repeat []string // rows that a further run must measure after the runs
		says   string   // the error; empty: none
	}{
		{"all hold", [][]Row{good()}, nil, ""},
		{"within twice", [][]Row{with(good(), row, 1.99)}, nil, ""},
		{"a miss is repeated alone", [][]Row{with(good(), row, 2.01)}, []string{row}, ""},
		{"two misses are repeated", [][]Row{with(good(), row, 3), again(3)}, []string{row}, ""},
		{"three misses break the bound", [][]Row{with(good(), row, 3), again(2.5), again(2.01)}, nil, "fence.flatness was ×4.50, ×3.75, ×3.01 in 3 runs"},
		{"the last run holds", [][]Row{with(good(), row, 3), again(3), again(1)}, nil, ""},
		{"the second run holds", [][]Row{with(good(), row, 3), again(1)}, nil, ""},
		{"a run that left it out is no miss", [][]Row{with(good(), row, 3), again(3), again(0)}, nil, ""},
		{"a least", [][]Row{with(good(), "issue.kv.c16.throughput", 2.01)}, []string{"issue.kv.c16.throughput"}, ""},
		{"a ratio of how many times sooner", [][]Row{with(good(), "dead.postgres.100.vs_floor", 2.01)}, []string{"dead.postgres.100.vs_floor"}, ""},
		{"a time is never held", [][]Row{with(good(), "fence.100000.p99_ms", 1000)}, nil, ""},
		{"one of a family is left out", [][]Row{with(good(), "dead.postgres.1000.vs_floor", 0)}, nil, ""},
		{"a family is left out", [][]Row{with(good(), row, 0)}, []string{row}, ""},
		{"a family is left out thrice", [][]Row{with(good(), row, 0), nil, nil}, nil, `no run measured a row of "fence"`},
	} {
		g := NewGate()
		for _, rows := range c.runs {
			g.Run(rows)
		}
		var repeat []string
		for _, b := range g.Again() {
			repeat = append(repeat, b.Row)
		}
		if !slices.Equal(repeat, c.repeat) {
			t.Errorf("%s: another run measures %v, want %v", c.name, repeat, c.repeat)
		}
		if err := g.Err(); (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", c.name, err, c.says)
		}
	}
}

// TestGateOfEachBound breaks each bound in three runs, and then holds it in the last.
func TestGateOfEachBound(t *testing.T) {
	for _, b := range Bounds {
		if b.Time {
			continue
		}
		bad := alone(with(good(), b.Row, 2.1), b.Row)
		g := NewGate()
		g.Run(with(good(), b.Row, 2.1))
		g.Run(bad)
		if len(g.Again()) != 1 || g.Again()[0].Section == "" {
			t.Errorf("%s: after two misses a run measures %v, want the row and its section", b.Row, g.Again())
		}
		g.Run(bad)
		if err := g.Err(); err == nil || !strings.Contains(err.Error(), b.Row) || strings.Count(err.Error(), "may be") != 1 {
			t.Errorf("%s: three misses give %v", b.Row, err)
		}
	}
}

func TestGateWithout(t *testing.T) {
	rows := slices.DeleteFunc(good(), func(w Row) bool { return strings.Contains(w.Name, "postgres") })
	g := NewGate()
	g.Without("there is no PostgreSQL on this machine", "dead", "closed")
	for range Tries {
		g.Run(rows)
	}
	if err := g.Err(); err != nil || len(g.Again()) != 0 {
		t.Errorf("a machine without PostgreSQL: %v, %v", err, g.Again())
	}
	var out strings.Builder
	if g.Print(&out); !strings.Contains(out.String(), "gate: not measured: dead.postgres.1.vs_floor: there is no PostgreSQL on this machine\n") {
		t.Errorf("the gate hides what it did not hold:\n%s", out.String())
	}
}

// TestGateInFile checks that bench.json keeps the figures of the gate.
func TestGateInFile(t *testing.T) {
	const row = "issue.ssh.c16.throughput"
	rows := with(good(), row, 4)
	g := NewGate()
	g.Run(rows)
	g.Run(alone(with(good(), row, 1), row))
	g.Mark(rows)
	file := filepath.Join(t.TempDir(), "bench.json")
	if err := WriteRows(file, rows); err != nil {
		t.Fatal(err)
	}
	got, err := ReadRows(file)
	if err != nil {
		t.Fatal(err)
	}
	w, _ := find(got, row)
	if w.Held == nil || !*w.Held || !slices.Equal(w.Tries, []float64{0.05, 0.2}) || w.Bound != "≥ ×0.2" {
		t.Errorf("row = %+v, want both figures and that it was held", w)
	}
	if w, _ := find(got, "fence.100000.p99_ms"); w.Held != nil || w.Bound != "" {
		t.Errorf("row = %+v, want no bound of a time", w)
	}
}
