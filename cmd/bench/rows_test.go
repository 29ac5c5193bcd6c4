package main

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/bench/process"
	"github.com/pawlsec/pawl/cmd/bench/report"
)

// TestTakeAndClose checks that each step was closed, and that the ledger keeps it.
func TestTakeAndClose(t *testing.T) {
	const n = 20
	path := filepath.Join(t.TempDir(), "steps.db")
	for range 2 {
		if err := takeAndClose(t.Context(), path, n); err != nil {
			t.Fatal(err)
		}
	}
	e, err := newEngine(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{} // of records by their kind
	if err := e.ledger.View(t.Context(), func(tx broker.Tx) error {
		return tx.Scan("", "", func(key string, _ []byte) bool {
			kind, _, _ := strings.Cut(key, "/")
			count[kind]++
			return true
		})
	}); err != nil {
		t.Error(err)
	}
	if err := e.close(); err != nil {
		t.Fatal(err)
	}
	if count["g"] != 2*n || count["p"] != 2*n || count["l"] != 0 {
		t.Errorf("the ledger has %v, want %d closed steps and no live one", count, 2*n)
	}
	if used, err := process.UsedBytes(path); err != nil || used < 2*n*500 {
		t.Errorf("%d steps use %v bytes, %v; want at least 500 for each", 2*n, used, err)
	}
}

func TestCommit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "commit.db")
	for range 2 { // each round opens the same file
		took, err := commit(path, 5)
		if err != nil || len(took) != 5 || took.Quantile(0) <= 0 {
			t.Fatalf("commit = %v, %v; want five times", took, err)
		}
	}
	db, records, entries, err := bare(path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close() //nolint:errcheck // it was only read
	tx, err := db.Begin(false)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback() //nolint:errcheck // it was only read
	if r, e := tx.Bucket(records).Stats().KeyN, tx.Bucket(entries).Stats().KeyN; r != 10 || e != 10 {
		t.Errorf("the file has %d records and %d entries, want 10 of each", r, e)
	}
}

// TestRowsOfIssue checks the arithmetic of the rows that set a step beside something else.
func TestRowsOfIssue(t *testing.T) {
	round := func(latencies ...float64) turn { return turn{loop: loop{latencies: latencies, took: 1e9}} }
	b := &bench{world: &world{}}
	kv := target{name: "kv"}
	ours, theirs := []turn{round(3, 3), round(5, 5), round(4, 4)}, []turn{round(1, 1), round(2, 2), round(1, 1)}
	b.reportIssue(kv, 1, ours, theirs, report.Samples{1.5, 1, 2})
	b.reportIssue(kv, 16, ours, theirs, nil)
	b.report.Judge()
	for _, row := range []struct {
		name         string
		ours, theirs float64
		met          bool
	}{
		{"issue.kv.c1.added_of_commit_ms", 3, 1.5, false}, // 1.2 × 1.5 + 0.5 is 2.3
		{"issue.kv.c16.added_p99_ms", 3, 1, true},
	} {
		at := slices.IndexFunc(b.report.Rows(), func(w report.Row) bool { return w.Name == row.name })
		if at < 0 {
			t.Errorf("there is no row %s", row.name)
			continue
		}
		w := b.report.Rows()[at]
		if w.Ours != row.ours || w.Theirs == nil || *w.Theirs != row.theirs || w.Met == nil || *w.Met != row.met {
			t.Errorf("row = %+v, want %v beside %v, met %v", w, row.ours, row.theirs, row.met)
		}
	}
}
