package broker

import (
	"fmt"
	"time"
)

// Budget limits the steps under a delegation and its descendants. A zero field sets no limit of its own; an ancestor's
// limit still applies.
type Budget struct {
	Steps     int              `json:"steps,omitempty"`      // steps in all
	Live      int              `json:"live,omitempty"`       // live secrets at one time, mints in flight included
	PerMinute int              `json:"per_minute,omitempty"` // steps that start in one minute of the clock
	Tools     map[ToolName]int `json:"tools,omitempty"`      // steps in all with one tool
}

// Wider names the limits of child that are wider than those of b: "budget:steps", "budget:tools:deploy". None means
// that child is within b.
func (b Budget) Wider(child Budget) (wider []string) {
	check := func(name string, parent, child int) {
		if parent > 0 && (child == 0 || child > parent) {
			wider = append(wider, "budget:"+name)
		}
	}
	check("steps", b.Steps, child.Steps)
	check("live", b.Live, child.Live)
	check("per_minute", b.PerMinute, child.PerMinute)
	for tool, n := range b.Tools {
		check("tools:"+string(tool), n, child.Tools[tool])
	}
	return wider
}

// Limited reports whether b sets any limit.
func (b Budget) Limited() bool {
	return b.Steps > 0 || b.Live > 0 || b.PerMinute > 0 || len(b.Tools) > 0
}

// Check refuses a negative limit, a name that is no tool name, and limits for more than [MaxRights] tools.
func (b Budget) Check() error {
	bad := b.Steps < 0 || b.Live < 0 || b.PerMinute < 0 || len(b.Tools) > MaxRights
	for tool, n := range b.Tools {
		if _, err := ParseToolName(string(tool)); err != nil {
			return err
		}
		bad = bad || n < 0
	}
	if bad {
		return fmt.Errorf("a budget has no negative limit and limits for at most %d tools", MaxRights)
	}
	return nil
}

// Past is the use of one tool in a chain so far.
type Past struct {
	Count int       `json:"count"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
}
