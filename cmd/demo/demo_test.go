package demo_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/pawlsec/pawl/cmd/demo"
	"github.com/pawlsec/pawl/cmd/parts"
)

// TestDemo plays the demonstration and reads its timeline as a script would.
func TestDemo(t *testing.T) {
	parts.NeedPostgreSQL(t)
	play(t, false, 10)
}

// TestDemoWithoutPostgreSQL: on a machine without one the other scenes still play.
func TestDemoWithoutPostgreSQL(t *testing.T) { play(t, true, 10) }

func play(t *testing.T, noPostgres bool, secrets int) {
	t.Helper()
	parts.NeedVault(t)
	path := filepath.Join(t.TempDir(), "timeline.json")
	if err := demo.Run(t.Context(), demo.Config{Out: testWriter{t}, JSON: path, NoPostgres: noPostgres}); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Events     []demo.Event
		AliveAfter *int `json:"alive_after"`
		Secrets    int
	}
	if err := json.Unmarshal(raw, &got); err != nil {
		t.Fatal(err)
	}
	if got.AliveAfter == nil || *got.AliveAfter != 0 || got.Secrets != secrets || len(got.Events) < 8 {
		t.Errorf("timeline = %s, want %d secrets and none alive", raw, secrets)
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) { w.t.Logf("%s", b); return len(b), nil }
