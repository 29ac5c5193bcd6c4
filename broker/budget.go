package broker

import (
	"fmt"
	"time"
)

// Budget limits what may happen under a delegation, its descendants included. Zero in a field
// means no limit of its own; an ancestor's still counts.
type Budget struct {
	Steps     int              `json:"steps,omitempty"`      // steps in all
	Live      int              `json:"live,omitempty"`       // secrets alive at once, those being minted included
	PerMinute int              `json:"per_minute,omitempty"` // steps begun in any one minute of the clock
	Tools     map[ToolName]int `json:"tools,omitempty"`      // steps in all with one tool
}

// wider names the limits in which child is not within b.
func (b Budget) Wider(child Budget) (wider []string) {
	over := func(name string, parent, child int) {
		if parent > 0 && (child == 0 || child > parent) {
			wider = append(wider, "budget:"+name)
		}
	}
	over("steps", b.Steps, child.Steps)
	over("live", b.Live, child.Live)
	over("per_minute", b.PerMinute, child.PerMinute)
	for tool, n := range b.Tools {
		over("tools:"+string(tool), n, child.Tools[tool])
	}
	return wider
}

// limits reports whether there is any limit.
func (b Budget) Limited() bool {
	return b.Steps > 0 || b.Live > 0 || b.PerMinute > 0 || len(b.Tools) > 0
}

func (b Budget) Check() error {
	bad := b.Steps < 0 || b.Live < 0 || b.PerMinute < 0 || len(b.Tools) > MaxRights
	for tool, n := range b.Tools {
		if _, err := ParseToolName(string(tool)); err != nil {
			return err
		}
		bad = bad || n < 0
	}
	if bad {
		return fmt.Errorf("a budget's limits are not negative and name at most %d tools", MaxRights)
	}
	return nil
}

// Past is what a chain has done with one tool.
type Past struct {
	Count int       `json:"count"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
}
