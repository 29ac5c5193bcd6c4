package engine

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/selector"
)

const (
	maxPlans = 64
	planLife = 15 * time.Minute
)

// Plan says what revoking the selector would hit, and changes nothing. The token stands for
// exactly this set: [Broker.Revoke] with it stops when the set has grown.
//
// Errors: Unauthenticated, NotFound with CodeSelectorEmpty when the selector matches nothing and with
// CodeCanaryValue when it is that of a canary's value, Unavailable.
func (e *Engine) Plan(ctx context.Context, o broker.Operator, s selector.Selector) (broker.Plan, error) {
	const op = "plan"
	if err := o.Check(op); err != nil {
		return broker.Plan{}, err
	}
	plan := broker.Plan{Selector: s.String(), Made: e.cfg.Now()}
	var set []string
	err := e.view(ctx, op, func(tx *records.Tx) (err error) {
		plan = broker.Plan{Selector: plan.Selector, Made: plan.Made}
		if plan.Revision, err = tx.Head(); err != nil {
			return err
		}
		if err := refuseCanaryPlan(tx, s); err != nil {
			return err
		}
		rv, err := revocationOf(tx, s, plan.Made)
		if err == nil {
			set, err = e.resolve(tx, rv, &plan)
		}
		return err
	})
	if err != nil {
		return broker.Plan{}, err
	}
	if len(set) == 0 && plan.Later == 0 {
		return plan, nothingMatches(op)
	}
	hash := sha256.New()
	fmt.Fprintln(hash, plan.Selector, plan.Made.UnixNano())
	for _, id := range set {
		fmt.Fprintln(hash, id)
	}
	plan.Token = "pl" + hex.EncodeToString(hash.Sum(nil)[:16])
	e.plans.Put(plan.Token, planned{selector: plan.Selector, set: asSet(set), at: plan.Made})
	return plan, nil
}

func asSet(ids []string) map[string]bool {
	set := map[string]bool{}
	for _, id := range ids {
		set[id] = true
	}
	return set
}

// meant is the revocation that a selector would be now.
func revocationOf(tx *records.Tx, s selector.Selector, now time.Time) (rv broker.Revocation, err error) {
	t, err := targetOf(tx, s)
	if err != nil {
		return rv, err
	}
	rv = broker.Revocation{Selector: s.String(), Node: t.node, Grant: t.grant, Fenced: now}
	if t.node != "" || t.grant != "" {
		rv.Chain, err = chainOf(tx, t)
	}
	return rv, err
}

// resolved lists the ids of the delegations and grants that a revocation means now, and counts
// them into plan.
func (e *Engine) resolve(tx *records.Tx, rv broker.Revocation, plan *broker.Plan) (set []string, err error) {
	grants, _, err := tx.Under(rv)
	if err != nil {
		return nil, err
	}
	static, err := tx.StaticUnder(rv)
	if err != nil {
		return nil, err
	}
	tasks := map[broker.ChainID]*broker.PlannedTask{}
	if err := e.openUnder(tx, rv, plan, func(l records.Lineage) {
		set = append(set, string(l.Leaf().ID))
		plan.Nodes++
		taskOf(tasks, l.Chain).Delegations++
	}); err != nil {
		return nil, err
	}
	countGrants(plan, grants, rv.Fenced)
	for _, g := range grants {
		set = append(set, string(g.ID))
		c, _, err := tx.Chain(g.Chain)
		if err != nil {
			return nil, err
		}
		taskOf(tasks, c).Grants++
	}
	for _, id := range static {
		set = append(set, string(id))
	}
	plan.Static += len(static)
	listTasks(plan, tasks)
	slices.Sort(set)
	return set, nil
}

// openUnder calls f with the delegations under rv that are still open, and counts those whose later steps a
// rule may meet.
func (e *Engine) openUnder(tx *records.Tx, rv broker.Revocation, plan *broker.Plan, f func(records.Lineage)) error {
	covers, err := records.Covering(rv)
	if err != nil || rv.Grant != "" {
		return err
	}
	var rule *records.Rule
	if rv.Node == "" {
		s, err := selector.Parse(rv.Selector)
		if err != nil {
			return err
		}
		r := records.NewRule(s, broker.Fence{})
		rule = &r
	}
	policy := e.cfg.Policy()
	return tx.EachOpen(rv.Chain, rv.Fenced, func(l records.Lineage) error {
		if covers(l, selector.Subject{}) {
			f(l)
		} else if rule != nil && rule.MayCoverStep(l, policy, rv.Fenced) {
			plan.Later++
		}
		return nil
	})
}

func taskOf(tasks map[broker.ChainID]*broker.PlannedTask, c broker.Chain) *broker.PlannedTask {
	t, ok := tasks[c.ID]
	if !ok {
		t = &broker.PlannedTask{Chain: c.ID, Task: c.Task}
		tasks[c.ID] = t
	}
	return t
}

// listTasks takes over the tasks that lose most, and how many more there are.
func listTasks(plan *broker.Plan, tasks map[broker.ChainID]*broker.PlannedTask) {
	plan.Chains, plan.Tasks = len(tasks), nil
	for _, t := range tasks {
		plan.Tasks = append(plan.Tasks, *t)
	}
	slices.SortFunc(plan.Tasks, func(a, b broker.PlannedTask) int {
		return cmp.Or(cmp.Compare(b.Grants, a.Grants), cmp.Compare(b.Delegations, a.Delegations), cmp.Compare(a.Chain, b.Chain))
	})
	if more := len(plan.Tasks) - broker.MaxPlannedTasks; more > 0 {
		plan.Tasks, plan.TasksMore = plan.Tasks[:broker.MaxPlannedTasks], more
	}
}

func chainOf(tx *records.Tx, t target) (broker.ChainID, error) {
	if t.node != "" {
		d, ok, err := tx.Delegation(t.node)
		if err == nil && !ok {
			err = records.UnknownDelegation("plan")
		}
		return d.Chain, err
	}
	g, ok, err := tx.Grant(t.grant)
	if err == nil && !ok {
		err = records.UnknownGrant("plan")
	}
	return g.Chain, err
}

func countGrants(plan *broker.Plan, grants []broker.Grant, now time.Time) {
	plan.ByTool, plan.ByBackend, plan.ByLabel, plan.ByCaller = map[broker.ToolName]int{}, map[string]int{}, map[string]int{}, map[string]int{}
	for _, g := range grants {
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
}

// compared is a plan that was compared with what there is, outside the fence's transaction: in it only
// what came since has to be looked at.
type comparison struct {
	rv    broker.Revocation
	known map[string]bool // ids of what there was
}

// comparePlan refuses a plan that is not known, is for something else, or whose set has grown. It gives nil when
// what is new is meant too.
func (e *Engine) comparePlan(ctx context.Context, r selector.Request) (*comparison, error) {
	const op = "revoke"
	plan, ok := e.plans.Get(r.Plan)
	if !ok || e.cfg.Now().Sub(plan.at) > planLife {
		return nil, broker.Errorf(broker.Conflict, op, "the plan is not known or older than %s", planLife).With(broker.CodePlanUnknown).
			Lacks("make the plan again", "plan")
	}
	if plan.selector != r.Selector.String() {
		return nil, broker.Errorf(broker.Conflict, op, "the plan is for another selector").With(broker.CodePlanUnknown).Lacks("make the plan again", "plan")
	}
	if r.IncludeNew {
		return nil, nil
	}
	var c *comparison
	err := e.view(ctx, op, func(tx *records.Tx) (err error) {
		c = &comparison{known: map[string]bool{}}
		if c.rv, err = revocationOf(tx, r.Selector, e.cfg.Now()); err != nil {
			return err
		}
		set, err := e.resolve(tx, c.rv, &broker.Plan{})
		if err != nil {
			return err
		}
		var added []string
		for _, id := range set {
			if !plan.set[id] {
				added = append(added, id)
			}
		}
		if err := refuseGrown(added); err != nil {
			return err
		}
		return eachID(tx, c.rv, func(id string) { c.known[id] = true })
	})
	return c, err
}

// grown refuses, in the fence's transaction, what came under the plan's selector since it was compared.
func checkGrown(tx *records.Tx, c *comparison) error {
	covers, err := records.Covering(c.rv)
	if err != nil {
		return err
	}
	var added []string
	if err := tx.EachRecent(c.rv.Chain, c.rv.Fenced, func(id broker.DelegationID) error {
		if c.known[string(id)] {
			return nil
		}
		l, err := tx.Lineage("revoke", id)
		if err == nil && covers(l, selector.Subject{}) {
			added = append(added, string(id))
		}
		return err
	}); err != nil {
		return err
	}
	if err := tx.EachLiveID(c.rv.Chain, func(id broker.GrantID) error {
		if c.known[string(id)] {
			return nil
		}
		g, _, err := tx.Grant(id)
		if err != nil {
			return err
		}
		l, err := tx.Lineage("revoke", g.Delegation)
		if err == nil && covers(l, l.Subject(g)) {
			added = append(added, string(id))
		}
		return err
	}); err != nil {
		return err
	}
	return refuseGrown(added)
}

// eachID calls f with the id of each delegation and live grant that a revocation can cover.
func eachID(tx *records.Tx, rv broker.Revocation, f func(id string)) error {
	if err := tx.EachRecent(rv.Chain, rv.Fenced, func(id broker.DelegationID) error { f(string(id)); return nil }); err != nil {
		return err
	}
	return tx.EachLiveID(rv.Chain, func(id broker.GrantID) error { f(string(id)); return nil })
}

func refuseGrown(added []string) error {
	if len(added) == 0 {
		return nil
	}
	refusal := broker.Errorf(broker.Conflict, "revoke", "the set has grown by %d since the plan; nothing was revoked", len(added)).With(broker.CodePlanStale)
	return refusal.Lacks("make the plan again, or say that what is new is meant too", added[:min(len(added), 20)]...)
}
