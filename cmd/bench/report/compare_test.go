package report

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseRows(t *testing.T) {
	for _, row := range []struct {
		text string
		want int    // rows
		says string // the error; empty: none
	}{
		{`[]`, 0, ""},
		{`null`, 0, ""}, // a run without a row
		{`[{"name": "a", "unit": "ms", "ours": 1, "theirs": null, "ratio": null, "later": {}}]`, 1, ""},
		{`[{"name": "a"}, {"name": "b"}]`, 2, ""},
		{`[{"name": "a"}, {"name": "a"}]`, 0, "row a is there twice"},
		{`[{"unit": "ms"}]`, 0, `row 1 has the name ""`},
		{`[{"name": "a b"}]`, 0, `row 1 has the name "a b"`},
		{`[{"name": "a", "ours": "fast"}]`, 0, "no rows of a measurement"},
		{`{"name": "a"}`, 0, "no rows of a measurement"},
		{``, 0, "no rows of a measurement"},
		{`[{"name": "a"}] x`, 0, "no rows of a measurement"},
	} {
		got, err := ParseRows([]byte(row.text))
		if len(got) != row.want || (err == nil) != (row.says == "") || err != nil && !strings.Contains(err.Error(), row.says) {
			t.Errorf("ParseRows(%s) = %v, %v; want %d rows and %q", row.text, got, err, row.want, row.says)
		}
	}
	file := filepath.Join(t.TempDir(), "bench.json")
	if err := full().WriteJSON(file); err != nil {
		t.Fatal(err)
	}
	got, err := ReadRows(file)
	if err != nil || len(got) != len(full().rows) || got[0].Name != full().rows[0].Name {
		t.Errorf("ReadRows = %d rows, %v; want those that were written", len(got), err)
	}
	if _, err := ReadRows(filepath.Join(t.TempDir(), "none")); !os.IsNotExist(err) {
		t.Errorf("ReadRows of no file = %v", err)
	}
}

func FuzzParseRows(f *testing.F) {
	f.Add([]byte(`[{"name": "fence.flatness", "unit": "ms, p50", "ours": 1.5, "theirs": 1, "ratio": 1.5}]`))
	f.Add([]byte(`[{"name": "a"}, {"name": "a"}]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		rows, err := ParseRows(raw)
		if err != nil {
			return
		}
		for _, w := range rows {
			if w.Name == "" || math.IsNaN(w.Ours) || math.IsInf(w.Ours, 0) {
				t.Errorf("row %+v was taken", w)
			}
		}
		for _, p := range Compare([][]Row{rows}, [][]Row{rows}) {
			if p.Rounds != 1 || p.OnlyIn != "" || p.New != 0 && (p.Ratio == nil || *p.Ratio != 1) {
				t.Errorf("%+v beside itself", p)
			}
		}
		again, err := json.Marshal(rows)
		if err != nil {
			t.Fatal(err)
		}
		if twice, err := ParseRows(again); err != nil || len(twice) != len(rows) {
			t.Errorf("written again: %d rows, %v; want %d", len(twice), err, len(rows))
		}
	})
}

// rounds are the figures of one row, one for each round; NaN: it was not measured.
func rounds(name, unit string, figures ...float64) (all [][]Row) {
	for _, f := range figures {
		var rows []Row
		if !math.IsNaN(f) {
			rows = []Row{{Name: name, Unit: unit, Ours: f}}
		}
		all = append(all, rows)
	}
	return all
}

func TestCompare(t *testing.T) {
	none := math.NaN()
	for _, row := range []struct {
		name             string
		newer, older     [][]Row
		now, then        float64
		ratio, min, most float64 // zero: none
		rounds           int
		onlyIn, note     string
	}{
		{"medians, and the spread of the rounds", rounds("a", "ms", 2, 4, 9), rounds("a", "ms", 1, 2, 3), 4, 2, 2, 2, 3, 3, "", ""},
		{"two rounds", rounds("a", "ms", 10, 20), rounds("a", "ms", 40, 20), 15, 30, 0.5, 0.25, 1, 2, "", ""},
		{"a round without the row", rounds("a", "ms", 1, none, 3), rounds("a", "ms", 2, 100, 6), 2, 4, 0.5, 0.5, 0.5, 2, "", ""},
		{"never in one round", rounds("a", "ms", 1, none), rounds("a", "ms", none, 1), 0, 0, 0, 0, 0, 0, "", "in no round"},
		{"new", rounds("a", "ms", 1), rounds("b", "ms", none), 0, 0, 0, 0, 0, 0, "new", ""},
		{"old", rounds("b", "ms", none), rounds("a", "ms", 1), 0, 0, 0, 0, 0, 0, "old", ""},
		{"another unit", rounds("a", "ms", 1), rounds("a", "s", 1), 0, 0, 0, 0, 0, 0, "", "one build measures ms, the other s"},
		{"nothing before", rounds("a", "ms", 1, 1), rounds("a", "ms", 0, 0), 1, 0, 0, 0, 0, 2, "", ""},
	} {
		pairs := Compare(row.newer, row.older)
		if len(pairs) != 1 {
			t.Errorf("%s: %d pairs, want 1: %+v", row.name, len(pairs), pairs)
			continue
		}
		p := pairs[0]
		value := func(f *float64) float64 {
			if f == nil {
				return 0
			}
			return *f
		}
		if p.Name != "a" || p.New != row.now || p.Old != row.then || value(p.Ratio) != row.ratio || value(p.Min) != row.min ||
			value(p.Max) != row.most || p.Rounds != row.rounds || p.OnlyIn != row.onlyIn || !strings.Contains(p.Note, row.note) ||
			row.note == "" && p.Note != "" {
			t.Errorf("%s: %+v", row.name, p)
		}
	}
}
