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
func (b *Engine) Plan(ctx context.Context, o broker.Operator, s selector.Selector) (broker.Plan, error) {
	const op = "plan"
	if err := o.Check(op); err != nil {
		return broker.Plan{}, err
	}
	plan := broker.Plan{Selector: s.String(), Made: b.cfg.Now()}
	var set []string
	err := b.view(ctx, op, func(tx *records.Tx) (err error) {
		plan = broker.Plan{Selector: plan.Selector, Made: plan.Made}
		if plan.Revision, err = tx.Head(); err != nil {
			return err
		}
		if err := canaryOf(tx, s); err != nil {
			return err
		}
		rv, err := meant(tx, s, plan.Made)
		if err == nil {
			set, err = b.resolved(tx, rv, &plan)
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
	b.plans.Put(plan.Token, planned{selector: plan.Selector, set: asSet(set), at: plan.Made})
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
func meant(tx *records.Tx, s selector.Selector, now time.Time) (rv broker.Revocation, err error) {
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
func (b *Engine) resolved(tx *records.Tx, rv broker.Revocation, plan *broker.Plan) (set []string, err error) {
	grants, _, err := tx.Under(rv)
	if err != nil {
		return nil, err
	}
	static, err := tx.StaticUnder(rv)
	if err != nil {
		return nil, err
	}
	tasks := map[broker.ChainID]*broker.PlannedTask{}
	if err := b.openUnder(tx, rv, plan, func(p records.Lineage) {
		set = append(set, string(p.Leaf().ID))
		plan.Nodes++
		taskOf(tasks, p.Chain).Delegations++
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
func (b *Engine) openUnder(tx *records.Tx, rv broker.Revocation, plan *broker.Plan, f func(records.Lineage)) error {
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
	policy := b.cfg.Policy()
	return tx.EachOpen(rv.Chain, rv.Fenced, func(p records.Lineage) error {
		if covers(p, selector.Subject{}) {
			f(p)
		} else if rule != nil && rule.MayCoverStep(p, policy, rv.Fenced) {
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
func listTasks(p *broker.Plan, tasks map[broker.ChainID]*broker.PlannedTask) {
	p.Chains, p.Tasks = len(tasks), nil
	for _, t := range tasks {
		p.Tasks = append(p.Tasks, *t)
	}
	slices.SortFunc(p.Tasks, func(a, b broker.PlannedTask) int {
		return cmp.Or(cmp.Compare(b.Grants, a.Grants), cmp.Compare(b.Delegations, a.Delegations), cmp.Compare(a.Chain, b.Chain))
	})
	if more := len(p.Tasks) - broker.MaxPlannedTasks; more > 0 {
		p.Tasks, p.TasksMore = p.Tasks[:broker.MaxPlannedTasks], more
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

func countGrants(p *broker.Plan, grants []broker.Grant, now time.Time) {
	p.ByTool, p.ByBackend, p.ByLabel, p.ByCaller = map[broker.ToolName]int{}, map[string]int{}, map[string]int{}, map[string]int{}
	for _, g := range grants {
		p.Grants++
		if g.State == broker.StateIssued {
			p.Issued++
		}
		if g.State == broker.StateIssued && g.Ending == "" && now.Before(g.Expires) {
			p.Live++
		}
		if g.Narrowing == broker.NarrowNone {
			p.Static++
		}
		p.ByTool[g.Tool]++
		p.ByBackend[g.Backend]++
		p.ByLabel[g.Narrowing.String()]++
		p.ByCaller[g.Caller.String()]++
		if end := g.LatestEnd(); end.After(p.LatestEnd) {
			p.LatestEnd = end
		}
	}
}

// compared is a plan that was compared with what there is, outside the fence's transaction: in it only
// what came since has to be looked at.
type compared struct {
	rv    broker.Revocation
	known map[string]bool // ids of what there was
}

// comparePlan refuses a plan that is not known, is for something else, or whose set has grown. It gives nil when
// what is new is meant too.
func (b *Engine) comparePlan(ctx context.Context, r selector.Request) (*compared, error) {
	const op = "revoke"
	made, ok := b.plans.Get(r.Plan)
	if !ok || b.cfg.Now().Sub(made.at) > planLife {
		return nil, broker.Errorf(broker.Conflict, op, "the plan is not known or older than %s", planLife).With(broker.CodePlanUnknown).
			Lacks("make the plan again", "plan")
	}
	if made.selector != r.Selector.String() {
		return nil, broker.Errorf(broker.Conflict, op, "the plan is for another selector").With(broker.CodePlanUnknown).Lacks("make the plan again", "plan")
	}
	if r.IncludeNew {
		return nil, nil
	}
	var c *compared
	err := b.view(ctx, op, func(tx *records.Tx) (err error) {
		c = &compared{known: map[string]bool{}}
		if c.rv, err = meant(tx, r.Selector, b.cfg.Now()); err != nil {
			return err
		}
		set, err := b.resolved(tx, c.rv, &broker.Plan{})
		if err != nil {
			return err
		}
		var added []string
		for _, id := range set {
			if !made.set[id] {
				added = append(added, id)
			}
		}
		if err := grownBy(added); err != nil {
			return err
		}
		return eachID(tx, c.rv, func(id string) { c.known[id] = true })
	})
	return c, err
}

// grown refuses, in the fence's transaction, what came under the plan's selector since it was compared.
func grown(tx *records.Tx, c *compared) error {
	covers, err := records.Covering(c.rv)
	if err != nil {
		return err
	}
	var added []string
	if err := tx.EachRecent(c.rv.Chain, c.rv.Fenced, func(id broker.DelegationID) error {
		if c.known[string(id)] {
			return nil
		}
		p, err := tx.Lineage("revoke", id)
		if err == nil && covers(p, selector.Subject{}) {
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
		p, err := tx.Lineage("revoke", g.Delegation)
		if err == nil && covers(p, p.Subject(g)) {
			added = append(added, string(id))
		}
		return err
	}); err != nil {
		return err
	}
	return grownBy(added)
}

// eachID calls f with the id of each delegation and live grant that a revocation can cover.
func eachID(tx *records.Tx, rv broker.Revocation, f func(id string)) error {
	if err := tx.EachRecent(rv.Chain, rv.Fenced, func(id broker.DelegationID) error { f(string(id)); return nil }); err != nil {
		return err
	}
	return tx.EachLiveID(rv.Chain, func(id broker.GrantID) error { f(string(id)); return nil })
}

func grownBy(added []string) error {
	if len(added) == 0 {
		return nil
	}
	e := broker.Errorf(broker.Conflict, "revoke", "the set has grown by %d since the plan; nothing was revoked", len(added)).With(broker.CodePlanStale)
	return e.Lacks("make the plan again, or say that what is new is meant too", added[:min(len(added), 20)]...)
}
