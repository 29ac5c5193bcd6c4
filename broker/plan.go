package broker

import (
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
// Errors: Unauthenticated, NotFound with CodeSelectorEmpty when the selector matches nothing,
// Unavailable.
func (b *Broker) Plan(ctx context.Context, o Operator, s Selector) (Plan, error) {
	const op = "plan"
	if err := o.check(op); err != nil {
		return Plan{}, err
	}
	plan := Plan{Selector: s.String(), Made: b.cfg.Now()}
	set, err := b.resolved(ctx, s, &plan)
	if err != nil {
		return Plan{}, err
	}
	if len(set) == 0 {
		return plan, Errorf(NotFound, op, "the selector matches nothing that is alive").With(CodeSelectorEmpty).
			Lacks("check its spelling; pawl chain list shows what there is", "selector")
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

// resolved lists the ids of the delegations and grants that a selector means now, and counts
// them into plan.
func (b *Broker) resolved(ctx context.Context, s Selector, plan *Plan) (set []string, err error) {
	err = b.view(ctx, "plan", func(tx Tx) error {
		t, err := resolve(tx, s)
		if err != nil {
			return err
		}
		rv := Revocation{Selector: s.String(), Node: t.node, Grant: t.grant, Fenced: b.cfg.Now()}
		if t.node != "" || t.grant != "" {
			if rv.Chain, err = chainOf(tx, t); err != nil {
				return err
			}
		}
		grants, err := b.inScopeOf(tx, rv, plan, &set)
		if err != nil {
			return err
		}
		plan.count(grants)
		for _, g := range grants {
			set = append(set, string(g.ID))
		}
		return nil
	})
	slices.Sort(set)
	return set, err
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

// inScopeOf lists the live grants under rv, and adds the delegations under it that are still open to
// set and plan.
func (b *Broker) inScopeOf(tx Tx, rv Revocation, plan *Plan, set *[]string) ([]Grant, error) {
	grants, _, err := b.under(tx, rv)
	if err != nil {
		return nil, err
	}
	covers, err := b.covering(tx, rv)
	if err != nil {
		return nil, err
	}
	chains := map[ChainID]bool{}
	for _, g := range grants {
		chains[g.Chain] = true
	}
	err = eachMember(tx, rv.Chain, func(id DelegationID) error {
		p, err := b.readPath(tx, "plan", id)
		if err != nil || rv.Grant != "" || !covers(p, Subject{}) || !rv.Fenced.Before(p.leaf().Expires) {
			return err
		}
		if p.leaf().Fence != nil && !p.leaf().Fence.Frozen {
			return nil
		}
		*set = append(*set, string(id))
		chains[p.chain.ID] = true
		plan.Nodes++
		return nil
	})
	plan.Chains = len(chains)
	return grants, err
}

func (p *Plan) count(grants []Grant) {
	p.ByTool, p.ByLabel, p.ByCaller = map[ToolName]int{}, map[string]int{}, map[string]int{}
	for _, g := range grants {
		p.Grants++
		if g.State == StateIssued {
			p.Issued++
		}
		if g.Narrowing == NarrowNone {
			p.Static++
		}
		p.ByTool[g.Tool]++
		p.ByLabel[g.Narrowing.String()]++
		p.ByCaller[g.Caller.String()]++
		if end := g.LatestEnd(); end.After(p.LatestEnd) {
			p.LatestEnd = end
		}
	}
}

// checkPlan refuses a plan that is not known, is for something else, or whose set has grown.
func (b *Broker) checkPlan(ctx context.Context, r RevokeRequest) error {
	const op = "revoke"
	made, ok := b.plans.get(r.Plan)
	if !ok || b.cfg.Now().Sub(made.at) > planLife {
		return Errorf(Conflict, op, "the plan is not known or older than %s", planLife).With(CodePlanUnknown).
			Lacks("make the plan again", "plan")
	}
	if made.selector != r.Selector.String() {
		return Errorf(Conflict, op, "the plan is for another selector").With(CodePlanUnknown).Lacks("make the plan again", "plan")
	}
	var plan Plan
	set, err := b.resolved(ctx, r.Selector, &plan)
	if err != nil || r.IncludeNew {
		return err
	}
	var added []string
	for _, id := range set {
		if !made.set[id] {
			added = append(added, id)
		}
	}
	if len(added) == 0 {
		return nil
	}
	e := Errorf(Conflict, op, "the set has grown by %d since the plan; nothing was revoked", len(added)).With(CodePlanStale)
	return e.Lacks("make the plan again, or say that what is new is meant too", added[:min(len(added), 20)]...)
}
