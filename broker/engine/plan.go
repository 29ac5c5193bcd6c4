package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/planning"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/selector"
)

const (
	maxPlans = 64
	planLife = 15 * time.Minute
)

// Plan counts the delegations and grants that revoking the selector would hit, and changes nothing. The plan's token
// names exactly this set: [Engine.Revoke] with the token refuses a set that has grown.
//
// Errors: Unauthenticated, NotFound with CodeSelectorEmpty when the selector matches nothing and with CodeCanaryValue
// when it selects a canary's value, Unavailable.
func (e *Engine) Plan(ctx context.Context, o broker.Operator, s selector.Selector) (broker.Plan, error) {
	const op = "plan"
	if err := o.Check(op); err != nil {
		return broker.Plan{}, err
	}
	plan := broker.Plan{Selector: s.String(), Made: e.cfg.Now()}
	var set []string
	var nothing *broker.Error
	err := e.view(ctx, op, func(tx *records.Tx) (err error) {
		plan, nothing = broker.Plan{Selector: plan.Selector, Made: plan.Made}, nil
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
		if err == nil && len(set) == 0 && plan.Later == 0 {
			nothing, err = tx.NothingMatches(op, s, e.started)
		}
		return err
	})
	if err != nil {
		return broker.Plan{}, err
	}
	if nothing != nil {
		return plan, e.past.NothingMatches(ctx, nothing, s)
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

// revocationOf returns the revocation that the selector would make now.
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

// resolve lists the ids of the delegations and grants that a revocation covers now, and counts them in plan.
func (e *Engine) resolve(tx *records.Tx, rv broker.Revocation, plan *broker.Plan) (set []string, err error) {
	grants, _, err := tx.Under(rv)
	if err != nil {
		return nil, err
	}
	static, err := tx.StaticUnder(rv)
	if err != nil {
		return nil, err
	}
	counter := planning.New(plan)
	if err := e.openUnder(tx, rv, plan, func(l records.Lineage) {
		set = append(set, string(l.Leaf().ID))
		counter.AddDelegation(l.Chain)
	}); err != nil {
		return nil, err
	}
	for _, g := range grants {
		set = append(set, string(g.ID))
		chain, _, err := tx.Chain(g.Chain)
		if err != nil {
			return nil, err
		}
		counter.AddGrant(g, chain, rv.Fenced)
	}
	for _, id := range static {
		set = append(set, string(id))
	}
	counter.AddStatic(len(static))
	counter.Finish()
	slices.Sort(set)
	return set, nil
}

// openUnder calls f with the open delegations that rv covers. It counts as plan.Later the other open delegations under
// which rv's rule may cover a later step.
func (e *Engine) openUnder(tx *records.Tx, rv broker.Revocation, plan *broker.Plan, f func(records.Lineage)) error {
	covers, err := records.Covering(rv)
	if err != nil || rv.Grant != "" {
		return err
	}
	var rule *records.Rule
	if rv.Node == "" {
		s, err := selector.ParseRecorded(rv.Selector)
		if err != nil {
			return err
		}
		r := records.NewRule(s, broker.Fence{})
		rule = &r
	}
	policy := e.cfg.Policy()
	places, err := tx.Places(rv, rv.Fenced, policy)
	if err != nil {
		return err
	}
	return tx.EachOpen(places, rv.Fenced, func(l records.Lineage) error {
		if covers(l, selector.Subject{}) {
			f(l)
		} else if rule != nil && rule.MayCoverStep(l, policy, rv.Fenced) {
			plan.Later++
		}
		return nil
	})
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

// comparison is the result of comparing a plan with the ledger outside the fence's transaction. The transaction then
// reads only the newer delegations and grants.
type comparison struct {
	rv    broker.Revocation
	known map[string]bool // the ids of the compared delegations and grants
}

// comparePlan refuses a plan that is unknown, is for another selector, or has a set that has grown. It returns nil when
// the request includes new delegations and grants.
func (e *Engine) comparePlan(ctx context.Context, r selector.Request) (*comparison, error) {
	const op = "revoke"
	plan, ok := e.plans.Get(r.Plan)
	if !ok || e.cfg.Now().Sub(plan.at) > planLife {
		return nil, broker.Errorf(broker.Conflict, op, "the plan is not known or older than %s", planLife).
			With(broker.CodePlanUnknown).Lacks("make the plan again", "plan")
	}
	if plan.selector != r.Selector.String() {
		return nil, broker.Errorf(broker.Conflict, op, "the plan is for another selector").
			With(broker.CodePlanUnknown).Lacks("make the plan again", "plan")
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

// checkGrown refuses, in the fence's transaction, a set that has grown since comparePlan.
func checkGrown(tx *records.Tx, c *comparison) error {
	covers, err := records.Covering(c.rv)
	if err != nil {
		return err
	}
	places, err := tx.Places(c.rv, c.rv.Fenced, nil)
	if err != nil {
		return err
	}
	var added []string
	if err := tx.EachRecent(places, c.rv.Fenced, func(id broker.DelegationID) error {
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
	if err := tx.EachLiveID(places, func(id broker.GrantID) error {
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
	places, err := tx.Places(rv, rv.Fenced, nil)
	if err != nil {
		return err
	}
	if err := tx.EachRecent(places, rv.Fenced, func(id broker.DelegationID) error { f(string(id)); return nil }); err != nil {
		return err
	}
	return tx.EachLiveID(places, func(id broker.GrantID) error { f(string(id)); return nil })
}

func refuseGrown(added []string) error {
	if len(added) == 0 {
		return nil
	}
	return broker.Errorf(broker.Conflict, "revoke", "the set has grown by %d since the plan; nothing was revoked",
		len(added)).With(broker.CodePlanStale).
		Lacks("make the plan again, or include the new ones", added[:min(len(added), 20)]...)
}
