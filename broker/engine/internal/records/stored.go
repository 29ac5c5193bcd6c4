package records

import (
	"maps"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// The types below are stored and are not part of package broker. Their JSON names are those of builds that wrote JSON.

// Usage counts the steps under a delegation, descendants included.
type Usage struct {
	Steps  int                             `json:"steps"`
	Live   int                             `json:"live"`
	Minute int64                           `json:"minute"` // minutes since 1970 in which the last step began
	InIt   int                             `json:"in_it"`  // steps begun in that minute
	Tools  map[broker.ToolName]broker.Past `json:"tools,omitempty"`
}

// Exceeded names the limit of b that one more step with the tool would exceed now; empty: none.
func (u Usage) Exceeded(b broker.Budget, tool broker.ToolName, now time.Time) string {
	switch {
	case b.Steps > 0 && u.Steps >= b.Steps:
		return "budget:steps"
	case b.Live > 0 && u.Live >= b.Live:
		return "budget:live"
	case b.Tools[tool] > 0 && u.Tools[tool].Count >= b.Tools[tool]:
		return "budget:tools:" + string(tool)
	case b.PerMinute > 0 && u.Minute == now.Unix()/60 && u.InIt >= b.PerMinute:
		return "budget:per_minute"
	}
	return ""
}

// Count adds one more step.
func (u *Usage) Count(tool broker.ToolName, now time.Time) {
	u.Steps++
	u.Live++
	if minute := now.Unix() / 60; minute != u.Minute {
		u.Minute, u.InIt = minute, 0
	}
	u.InIt++
	p := u.Tools[tool]
	if p.Count == 0 {
		p.First = now
	}
	p.Count, p.Last = p.Count+1, now
	u.setPast(tool, p)
}

// setPast replaces the use of a tool.
func (u *Usage) setPast(tool broker.ToolName, p broker.Past) {
	tools := make(map[broker.ToolName]broker.Past, len(u.Tools)+1) // a new map: other readers share the old one
	maps.Copy(tools, u.Tools)
	if tools[tool] = p; p.Count == 0 {
		delete(tools, tool)
	}
	u.Tools = tools
}

// addSteps adds n steps with the tool, of which the first began at a time. The time of the last step stays, although it
// may be that of a step that was taken off: a policy that asks for a pause since then gets a longer one.
func (u *Usage) addSteps(tool broker.ToolName, n int, began time.Time) {
	u.Steps = max(0, u.Steps+n)
	p := u.Tools[tool]
	if p.Count == 0 {
		p.First, p.Last = began, began
	}
	p.Count = max(0, p.Count+n)
	u.setPast(tool, p)
}

// SameHistory reports whether two histories have the same steps.
func SameHistory(a, b map[broker.ToolName]broker.Past) bool {
	return maps.EqualFunc(a, b, func(p, q broker.Past) bool {
		return p.Count == q.Count && p.First.Equal(q.First) && p.Last.Equal(q.Last)
	})
}

// Rule is a fence over everything that a selector matches. A final rule covers the chains that were open when it was
// written. A freeze covers later chains too, until it is lifted.
type Rule struct {
	Fence    broker.Fence `json:"fence"`
	Selector string       `json:"selector"` // in canonical spelling

	parsed selector.Selector
}

// NewRule makes a rule from a selector and a mark.
func NewRule(s selector.Selector, mark broker.Fence) Rule {
	return Rule{Fence: mark, Selector: s.String(), parsed: s}
}

// Scheduled is an item of the list of live grants: when the grant must end after a restart. A restart reads the list
// alone, since there may be a hundred thousand.
type Scheduled struct {
	ID      broker.GrantID `json:"-"` // the key has it
	Backend string         `json:"backend"`
	Expires time.Time      `json:"expires"`
	// Abandoned: it ends at the next start, whatever its expiry. It is in flight, or ending already, or a sealed secret
	// that was not collected, which only the memory of its process has.
	Abandoned bool `json:"abandoned"`
	Held      bool `json:"held"`
}

// scheduledOf returns the item of a grant.
func scheduledOf(g *broker.Grant) Scheduled {
	return Scheduled{ID: g.ID, Backend: g.Backend, Expires: g.Expires, Held: g.Held,
		Abandoned: g.State != broker.StateIssued || g.Ending != "" || g.Sealed != "" && g.Collected.IsZero()}
}

// acknowledged is the record of an acknowledgement.
type acknowledged struct {
	At time.Time `json:"at"`
}

// Bundle is the last policy bundle in force.
type Bundle struct {
	Name    string    `json:"name"`
	Version int64     `json:"version"`
	Digest  string    `json:"digest"`
	Since   time.Time `json:"since"`
	By      string    `json:"by"`
}

// cursor is the record of a subscriber's delivery cursor.
type cursor struct {
	Revision broker.Revision `json:"revision"`
}
