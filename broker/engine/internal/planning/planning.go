// Package planning counts the delegations and grants that a revocation would hit.
package planning

import (
	"cmp"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Counter fills in the counts of a plan. [New] makes one; [Counter.Finish] must be called last.
type Counter struct {
	plan  *broker.Plan
	tasks map[broker.ChainID]*broker.PlannedTask
}

// New makes a Counter for a plan without counts.
func New(plan *broker.Plan) *Counter {
	plan.ByTool, plan.ByBackend = map[broker.ToolName]int{}, map[string]int{}
	plan.ByLabel, plan.ByCaller = map[string]int{}, map[string]int{}
	return &Counter{plan: plan, tasks: map[broker.ChainID]*broker.PlannedTask{}}
}

// AddDelegation counts an open delegation of a chain.
func (c *Counter) AddDelegation(chain broker.Chain) {
	c.plan.Nodes++
	c.taskOf(chain).Delegations++
}

// AddGrant counts a grant of a chain that is not closed at the time now.
func (c *Counter) AddGrant(g broker.Grant, chain broker.Chain, now time.Time) {
	c.taskOf(chain).Grants++
	plan := c.plan
	plan.Grants++
	if g.State == broker.StateIssued {
		plan.Issued++
	}
	if g.State == broker.StateIssued && g.Ending == "" && now.Before(g.Expires) {
		plan.Live++
	}
	if g.Narrowing == broker.NarrowNone {
		plan.Static++
	}
	plan.ByTool[g.Tool]++
	plan.ByBackend[g.Backend]++
	plan.ByLabel[g.Narrowing.String()]++
	plan.ByCaller[g.Caller.String()]++
	if end := g.LatestEnd(); end.After(plan.LatestEnd) {
		plan.LatestEnd = end
	}
}

// AddStatic counts closed grants with a static secret that still works.
func (c *Counter) AddStatic(n int) { c.plan.Static += n }

// Finish lists the tasks with the most grants in the plan, and counts the others.
func (c *Counter) Finish() {
	plan := c.plan
	plan.Chains, plan.Tasks = len(c.tasks), nil
	for _, t := range c.tasks {
		plan.Tasks = append(plan.Tasks, *t)
	}
	slices.SortFunc(plan.Tasks, func(a, b broker.PlannedTask) int {
		return cmp.Or(cmp.Compare(b.Grants, a.Grants), cmp.Compare(b.Delegations, a.Delegations),
			cmp.Compare(a.Chain, b.Chain))
	})
	if more := len(plan.Tasks) - broker.MaxPlannedTasks; more > 0 {
		plan.Tasks, plan.TasksMore = plan.Tasks[:broker.MaxPlannedTasks], more
	}
}

func (c *Counter) taskOf(chain broker.Chain) *broker.PlannedTask {
	t, ok := c.tasks[chain.ID]
	if !ok {
		t = &broker.PlannedTask{Chain: chain.ID, Task: chain.Task}
		if chain.Envelope != nil {
			t.SignedTask, t.Behalf = chain.Envelope.Task, chain.Envelope.Behalf
		}
		c.tasks[chain.ID] = t
	}
	return t
}
