package broker

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"time"
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
func (b *Broker) Plan(ctx context.Context, o Operator, s Selector) (Plan, error) {
	const op = "plan"
	if err := o.check(op); err != nil {
		return Plan{}, err
	}
	plan := Plan{Selector: s.String(), Made: b.cfg.Now()}
	var set []string
	err := b.view(ctx, op, func(tx Tx) (err error) {
		plan = Plan{Selector: plan.Selector, Made: plan.Made}
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
		return Plan{}, err
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
func (b *Broker) meant(tx Tx, s Selector, now time.Time) (rv Revocation, err error) {
	t, err := resolve(tx, s)
	if err != nil {
		return rv, err
	}
	rv = Revocation{Selector: s.String(), Node: t.node, Grant: t.grant, Fenced: now}
	if t.node != "" || t.grant != "" {
		rv.Chain, err = chainOf(tx, t)
	}
	return rv, err
}

// resolved lists the ids of the delegations and grants that a revocation means now, and counts
// them into plan.
func (b *Broker) resolved(tx Tx, rv Revocation, plan *Plan) (set []string, err error) {
	grants, _, err := b.under(tx, rv)
	if err != nil {
		return nil, err
	}
	static, err := b.worksOn(tx, rv)
	if err != nil {
		return nil, err
	}
	tasks := map[ChainID]*PlannedTask{}
	if err := b.openUnder(tx, rv, plan, func(p path) {
		set = append(set, string(p.leaf().ID))
		plan.Nodes++
		taskOf(tasks, p.chain).Delegations++
	}); err != nil {
		return nil, err
	}
	plan.count(grants, rv.Fenced)
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
	plan.list(tasks)
	slices.Sort(set)
	return set, nil
}

// openUnder calls f with the delegations under rv that are still open, and counts those whose later steps a
// rule may meet.
func (b *Broker) openUnder(tx Tx, rv Revocation, plan *Plan, f func(path)) error {
	covers, err := b.covering(tx, rv)
	if err != nil || rv.Grant != "" {
		return err
	}
	var rule *queryFence
	if rv.Node == "" {
		s, err := ParseSelector(rv.Selector)
		if err != nil {
			return err
		}
		rule = &queryFence{selector: s}
	}
	policy := b.cfg.Policy()
	return b.eachOpen(tx, rv.Chain, rv.Fenced, func(p path) error {
		if covers(p, Subject{}) {
			f(p)
		} else if rule != nil && rule.mayCover(p, policy, rv.Fenced) {
			plan.Later++
		}
		return nil
	})
}

func taskOf(tasks map[ChainID]*PlannedTask, c Chain) *PlannedTask {
	t, ok := tasks[c.ID]
	if !ok {
		t = &PlannedTask{Chain: c.ID, Task: c.Task}
		tasks[c.ID] = t
	}
	return t
}

// list takes over the tasks that lose most, and how many more there are.
func (p *Plan) list(tasks map[ChainID]*PlannedTask) {
	p.Chains, p.Tasks = len(tasks), nil
	for _, t := range tasks {
		p.Tasks = append(p.Tasks, *t)
	}
	slices.SortFunc(p.Tasks, func(a, b PlannedTask) int {
		return cmp.Or(cmp.Compare(b.Grants, a.Grants), cmp.Compare(b.Delegations, a.Delegations), cmp.Compare(a.Chain, b.Chain))
	})
	if more := len(p.Tasks) - MaxPlannedTasks; more > 0 {
		p.Tasks, p.TasksMore = p.Tasks[:MaxPlannedTasks], more
	}
}

func chainOf(tx Tx, t target) (ChainID, error) {
	if t.node != "" {
		d, ok, err := load[Delegation](tx, keyDelegation(t.node))
		if err == nil && !ok {
			err = unknownDelegation("plan")
		}
		return d.Chain, err
	}
	g, ok, err := load[Grant](tx, keyGrant(t.grant))
	if err == nil && !ok {
		err = unknownGrant("plan")
	}
	return g.Chain, err
}

func (p *Plan) count(grants []Grant, now time.Time) {
	p.ByTool, p.ByBackend, p.ByLabel, p.ByCaller = map[ToolName]int{}, map[string]int{}, map[string]int{}, map[string]int{}
	for _, g := range grants {
		p.Grants++
		if g.State == StateIssued {
			p.Issued++
		}
		if g.State == StateIssued && g.Ending == "" && now.Before(g.Expires) {
			p.Live++
		}
		if g.Narrowing == NarrowNone {
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
	rv    Revocation
	known map[string]bool // keys of what there was
}

// comparePlan refuses a plan that is not known, is for something else, or whose set has grown. It gives nil when
// what is new is meant too.
func (b *Broker) comparePlan(ctx context.Context, r RevokeRequest) (*compared, error) {
	const op = "revoke"
	made, ok := b.plans.get(r.Plan)
	if !ok || b.cfg.Now().Sub(made.at) > planLife {
		return nil, Errorf(Conflict, op, "the plan is not known or older than %s", planLife).With(CodePlanUnknown).
			Lacks("make the plan again", "plan")
	}
	if made.selector != r.Selector.String() {
		return nil, Errorf(Conflict, op, "the plan is for another selector").With(CodePlanUnknown).Lacks("make the plan again", "plan")
	}
	if r.IncludeNew {
		return nil, nil
	}
	var c *compared
	err := b.view(ctx, op, func(tx Tx) (err error) {
		c = &compared{known: map[string]bool{}}
		if c.rv, err = b.meant(tx, r.Selector, b.cfg.Now()); err != nil {
			return err
		}
		set, err := b.resolved(tx, c.rv, &Plan{})
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
func (b *Broker) grown(tx Tx, c *compared) error {
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
		id := key[len(key)-idLength:]
		var g Grant
		d := DelegationID(id)
		if key[0] == 'l' {
			if g, _, err = load[Grant](tx, keyGrant(GrantID(id))); err != nil {
				return err
			}
			d = g.Delegation
		}
		p, err := b.readPath(tx, "revoke", d)
		if err != nil {
			return err
		}
		s := Subject{}
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
func eachKey(tx Tx, rv Revocation, f func(key string)) error {
	if err := eachRecent(tx, rv.Chain, rv.Fenced, func(id DelegationID) error { f("m/" + string(id)); return nil }); err != nil {
		return err
	}
	prefix := "l/"
	if rv.Chain != "" {
		prefix += string(rv.Chain) + "/"
	}
	return tx.Scan(prefix, "", func(key string, _ []byte) bool { f("l/" + key[len(key)-idLength:]); return true })
}

func grownBy(added []string) error {
	if len(added) == 0 {
		return nil
	}
	e := Errorf(Conflict, "revoke", "the set has grown by %d since the plan; nothing was revoked", len(added)).With(CodePlanStale)
	return e.Lacks("make the plan again, or say that what is new is meant too", added[:min(len(added), 20)]...)
}
