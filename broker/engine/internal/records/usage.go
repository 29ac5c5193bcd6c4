package records

import (
	"maps"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Usage counts what has happened under a delegation, descendants included.
type Usage struct {
	Steps  int                             `json:"steps"`
	Live   int                             `json:"live"`
	Minute int64                           `json:"minute"` // minutes since 1970 in which the last step began
	InIt   int                             `json:"in_it"`  // steps begun in that minute
	Tools  map[broker.ToolName]broker.Past `json:"tools,omitempty"`
}

// Exceeded names the limit of b that one more step with tool at now would break; empty: none.
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
	tools := make(map[broker.ToolName]broker.Past, len(u.Tools)+1) // the one before is what others read
	maps.Copy(tools, u.Tools)
	tools[tool] = p
	u.Tools = tools
}

// Usage reads what has happened under a delegation.
func (t *Tx) Usage(id broker.DelegationID) (Usage, error) {
	u, _, err := t.cache.usages.load(t, keyUsage(id))
	return u, err
}

// PutUsage writes it.
func (t *Tx) PutUsage(id broker.DelegationID, u Usage) error {
	return t.cache.usages.save(t, keyUsage(id), u)
}

// GiveBack takes ended grants off the delegations' counts of live ones.
func (t *Tx) GiveBack(ended map[broker.DelegationID]int) error {
	for id, n := range ended {
		u, err := t.Usage(id)
		if err != nil {
			return err
		}
		u.Live = max(0, u.Live-n)
		if err := t.PutUsage(id, u); err != nil {
			return err
		}
	}
	return nil
}
