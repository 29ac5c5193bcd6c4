package engine

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// planBook keeps the sets that plans were made of, so that executing one can show what has
// been added. Plans are forgotten with the process; then they must be made again.
type planBook struct {
	mu    sync.Mutex // guards made
	made  map[string]planned
	order []string
}

type planned struct {
	selector string
	set      map[string]bool
	at       time.Time
}

const (
	maxPlans = 64
	planLife = 15 * time.Minute
)

func (p *planBook) put(token string, made planned) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.made == nil {
		p.made = map[string]planned{}
	}
	if _, known := p.made[token]; !known {
		p.order = append(p.order, token)
	}
	p.made[token] = made
	if len(p.order) > maxPlans {
		delete(p.made, p.order[0])
		p.order = p.order[1:]
	}
}

func (p *planBook) get(token string) (planned, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	made, ok := p.made[token]
	return made, ok
}

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
	err := b.view(ctx, op, func(tx broker.Tx) (err error) {
		plan = broker.Plan{Selector: plan.Selector, Made: plan.Made}
		if plan.Revision, err = tx.Head(); err != nil {
			return err
		}
		if err := canaryOf(tx, s); err != nil {
			return err
		}
		rv, err := b.meant(tx, s, plan.Made)
		if err == nil {
			set, err = b.resolved(tx, rv, &plan)
		}
		return err
	})
	if err != nil {
		return broker.Plan{}, err
	}
	if len(set) == 0 && plan.Later == 0 {
		return plan, matchesNothing(op)
	}
	hash := sha256.New()
	fmt.Fprintln(hash, plan.Selector, plan.Made.UnixNano())
	for _, id := range set {
		fmt.Fprintln(hash, id)
	}
	plan.Token = "pl" + hex.EncodeToString(hash.Sum(nil)[:16])
	b.plans.put(plan.Token, planned{selector: plan.Selector, set: asSet(set), at: plan.Made})
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
func (b *Engine) meant(tx broker.Tx, s selector.Selector, now time.Time) (rv broker.Revocation, err error) {
	t, err := resolve(tx, s)
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
func (b *Engine) resolved(tx broker.Tx, rv broker.Revocation, plan *broker.Plan) (set []string, err error) {
	grants, _, err := b.under(tx, rv)
	if err != nil {
		return nil, err
	}
	static, err := b.worksOn(tx, rv)
	if err != nil {
		return nil, err
	}
	tasks := map[broker.ChainID]*broker.PlannedTask{}
	if err := b.openUnder(tx, rv, plan, func(p path) {
		set = append(set, string(p.leaf().ID))
		plan.Nodes++
		taskOf(tasks, p.chain).Delegations++
	}); err != nil {
		return nil, err
	}
	countGrants(plan, grants, rv.Fenced)
	for _, g := range grants {
		set = append(set, string(g.ID))
		c, _, err := b.chains.load(tx, keyChain(g.Chain))
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
func (b *Engine) openUnder(tx broker.Tx, rv broker.Revocation, plan *broker.Plan, f func(path)) error {
	covers, err := b.covering(tx, rv)
	if err != nil || rv.Grant != "" {
		return err
	}
	var rule *queryFence
	if rv.Node == "" {
		s, err := selector.Parse(rv.Selector)
		if err != nil {
			return err
		}
		rule = &queryFence{selector: s}
	}
	policy := b.cfg.Policy()
	return b.eachOpen(tx, rv.Chain, rv.Fenced, func(p path) error {
		if covers(p, selector.Subject{}) {
			f(p)
		} else if rule != nil && rule.mayCover(p, policy, rv.Fenced) {
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

func chainOf(tx broker.Tx, t target) (broker.ChainID, error) {
	if t.node != "" {
		d, ok, err := load[broker.Delegation](tx, keyDelegation(t.node))
		if err == nil && !ok {
			err = unknownDelegation("plan")
		}
		return d.Chain, err
	}
	g, ok, err := load[broker.Grant](tx, keyGrant(t.grant))
	if err == nil && !ok {
		err = unknownGrant("plan")
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
	known map[string]bool // keys of what there was
}

// comparePlan refuses a plan that is not known, is for something else, or whose set has grown. It gives nil when
// what is new is meant too.
func (b *Engine) comparePlan(ctx context.Context, r selector.Request) (*compared, error) {
	const op = "revoke"
	made, ok := b.plans.get(r.Plan)
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
	err := b.view(ctx, op, func(tx broker.Tx) (err error) {
		c = &compared{known: map[string]bool{}}
		if c.rv, err = b.meant(tx, r.Selector, b.cfg.Now()); err != nil {
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
		return eachKey(tx, c.rv, func(key string) { c.known[key] = true })
	})
	return c, err
}

// grown refuses, in the fence's transaction, what came under the plan's selector since it was compared.
func (b *Engine) grown(tx broker.Tx, c *compared) error {
	covers, err := b.covering(tx, c.rv)
	if err != nil {
		return err
	}
	var fresh, added []string
	if err := eachKey(tx, c.rv, func(key string) {
		if !c.known[key] {
			fresh = append(fresh, key)
		}
	}); err != nil {
		return err
	}
	for _, key := range fresh {
		id := key[len(key)-broker.IDLength:]
		var g broker.Grant
		d := broker.DelegationID(id)
		if key[0] == 'l' {
			if g, _, err = load[broker.Grant](tx, keyGrant(broker.GrantID(id))); err != nil {
				return err
			}
			d = g.Delegation
		}
		p, err := b.readPath(tx, "revoke", d)
		if err != nil {
			return err
		}
		s := selector.Subject{}
		if g.ID != "" {
			s = p.subject(g)
		}
		if covers(p, s) {
			added = append(added, id)
		}
	}
	return grownBy(added)
}

// eachKey calls f with the keys of all that can be under rv.
func eachKey(tx broker.Tx, rv broker.Revocation, f func(key string)) error {
	if err := eachRecent(tx, rv.Chain, rv.Fenced, func(id broker.DelegationID) error { f("m/" + string(id)); return nil }); err != nil {
		return err
	}
	prefix := "l/"
	if rv.Chain != "" {
		prefix += string(rv.Chain) + "/"
	}
	return tx.Scan(prefix, "", func(key string, _ []byte) bool { f("l/" + key[len(key)-broker.IDLength:]); return true })
}

func grownBy(added []string) error {
	if len(added) == 0 {
		return nil
	}
	e := broker.Errorf(broker.Conflict, "revoke", "the set has grown by %d since the plan; nothing was revoked", len(added)).With(broker.CodePlanStale)
	return e.Lacks("make the plan again, or say that what is new is meant too", added[:min(len(added), 20)]...)
}
