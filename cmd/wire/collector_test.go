package wire_test

import (
	"runtime/debug"
	"testing"

	"github.com/pawlsec/pawl/cmd/wire"
)

func TestPaceCollector(t *testing.T) {
	was := debug.SetGCPercent(77)
	t.Cleanup(func() { debug.SetGCPercent(was) })
	for _, row := range []struct {
		env  string
		want int
	}{{"50", 77}, {"off", 77}, {"", 200}} {
		t.Setenv("GOGC", row.env)
		debug.SetGCPercent(77) // in place of the runtime's own setting from GOGC
		wire.PaceCollector()
		if got := debug.SetGCPercent(77); got != row.want {
			t.Errorf("with GOGC=%q the collector runs at %d percent, want %d", row.env, got, row.want)
		}
	}
}
