package drill_test

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/cmd/drill"
	"github.com/pawlsec/pawl/cmd/parts"
)

// TestDrill runs a small drill, and reads the table, the chart and the figures.
func TestDrill(t *testing.T) {
	for _, row := range []struct {
		name       string
		noPostgres bool
		logins     int
	}{{"logins and certificates", false, 12}, {"certificates alone", true, 0}} {
		t.Run(row.name, func(t *testing.T) {
			parts.NeedVault(t)
			if !row.noPostgres {
				parts.NeedPostgreSQL(t)
			}
			var table strings.Builder
			svg, figures := filepath.Join(t.TempDir(), "out", "drill.svg"), filepath.Join(t.TempDir(), "drill.json")
			got, err := drill.Run(t.Context(), drill.Config{
				Out: &table, Secrets: 16, NoPostgres: row.noPostgres, SVG: svg, JSON: figures})
			if err != nil {
				t.Fatalf("Run = %v\n%s", err, table.String())
			}
			if got.Secrets != 16 || got.Logins != row.logins || len(got.DeadMS) != 16 ||
				len(got.NotifiedMS) != 4 || got.Closure != "CLOSED" {
				t.Errorf("Run = %+v, want 16 secrets, all dead, and 4 notified agents", got)
			}
			if got.FencedMS <= 0 || got.ClosedMS < got.FencedMS || got.DeadMS[0] <= 0 {
				t.Errorf("Run = %+v, want times after the violation", got)
			}
			if want := "Alive: 0 of 16. Closure: CLOSED, with evidence for 16."; !strings.Contains(table.String(), want) {
				t.Errorf("the table is\n%s, want %q in it", table.String(), want)
			}
			raw, err := os.ReadFile(figures)
			var again drill.Result
			if err == nil {
				err = json.Unmarshal(raw, &again)
			}
			if err != nil || again.FencedMS != got.FencedMS || len(again.DeadMS) != 16 {
				t.Errorf("the figures in the file are %+v, %v, want %+v", again, err, got)
			}
			readable(t, svg)
		})
	}
}

// readable fails unless the chart is well-formed XML and has its four marks.
func readable(t *testing.T, path string) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for d := xml.NewDecoder(strings.NewReader(string(raw))); err == nil; {
		_, err = d.Token()
	}
	if !errors.Is(err, io.EOF) {
		t.Errorf("the chart is not XML: %v", err)
	}
	for _, want := range []string{"fenced", "agents notified", "all dead", "closure"} {
		if n := strings.Count(string(raw), ">"+want+" "); n != 1 {
			t.Errorf("the chart has %d marks %q, want one", n, want)
		}
	}
	if strings.Contains(string(raw), "NaN") {
		t.Error("the chart has a coordinate that is not a number")
	}
}

func TestDrillSizes(t *testing.T) {
	for _, n := range []int{-1, 3, drill.MaxSecrets + 1} {
		if _, err := drill.Run(t.Context(), drill.Config{Out: io.Discard, Secrets: n}); err == nil {
			t.Errorf("Run with %d secrets = nil, want an error", n)
		}
	}
}
