package wire

import (
	"os"
	"runtime/debug"
)

// collectAt is by how many percent the heap grows between two runs of the garbage collector.
const collectAt = 200

// PaceCollector has the garbage collector run half as often as Go would have it, unless GOGC says how
// often. A broker's heap is small, and what a step leaves in it is gone in a moment; what is bought
// with a few megabytes is a sixth of the steps per second. Whoever runs a broker calls it first, and
// whoever measures one in process, so that the same is measured as is run.
func PaceCollector() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(collectAt)
	}
}
