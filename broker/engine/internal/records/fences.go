package records

import (
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// noGrant is the subject of a delegation alone.
var noGrant selector.Subject

// Covers reports whether the rule covers the delegation, or the subject if that has a grant.
func (r Rule) Covers(l Lineage, subject selector.Subject) bool {
	return r.parsed.Covers(r.Fence, l.place(subject))
}

// Rules returns the rules in force.
func (t *Tx) Rules() (rules []Rule, err error) {
	if !t.rulesRead {
		if t.rules, err = t.cache.rules.read(t); err != nil {
			return nil, err
		}
		t.rulesRead = true
	}
	return t.rules, nil
}

// AddRule writes a rule, by its fence's revocation.
func (t *Tx) AddRule(r Rule) error {
	t.rulesRead = false
	return save(t, keyRule(r.Fence.Revocation), r)
}

// SpentRules returns the final rules of which every covered chain has expired.
func (t *Tx) SpentRules(now time.Time) (spent []broker.RevocationID, err error) {
	rules, err := t.Rules()
	for _, r := range rules {
		if !r.Fence.Frozen && now.Sub(r.Fence.At) > broker.MaxChainTTL {
			spent = append(spent, r.Fence.Revocation)
		}
	}
	return spent, err
}

// DropRule deletes a revocation's rule.
func (t *Tx) DropRule(id broker.RevocationID) error {
	t.rulesRead = false
	return t.drop(keyRule(id))
}

// RuleLike returns the mark of the rule in force with this selector and of this kind; nil: there is none.
func (t *Tx) RuleLike(s string, freeze bool) (*broker.Fence, error) {
	rules, err := t.Rules()
	for i := range rules {
		if rules[i].Selector == s && rules[i].Fence.Frozen == freeze {
			return &rules[i].Fence, err
		}
	}
	return nil, err
}

// FenceOver returns the fence that covers a delegation or the subject: one on a node, or a rule that covers a node or
// the subject. A final fence comes before a freeze; nil: there is none.
func (t *Tx) FenceOver(l Lineage, subject selector.Subject) (found *broker.Fence, err error) {
	rules, err := t.Rules()
	if err != nil {
		return nil, err
	}
	for i := range l.Nodes {
		found = stronger(found, l.Nodes[i].Fence)
	}
	for i := range rules {
		if rules[i].Covers(l, subject) {
			found = stronger(found, &rules[i].Fence)
		}
	}
	return found, nil
}

func stronger(a, b *broker.Fence) *broker.Fence {
	if a == nil || b != nil && a.Frozen && !b.Frozen {
		return b
	}
	return a
}

// FinalFences returns every final fence over a delegation: those on the lineage's nodes, and the rules that cover one.
func (t *Tx) FinalFences(l Lineage) (fences []broker.Fence, err error) {
	for _, d := range l.Nodes {
		if d.Fence != nil && !d.Fence.Frozen {
			fences = append(fences, *d.Fence)
		}
	}
	rules, err := t.Rules()
	for _, r := range rules {
		if !r.Fence.Frozen && r.Covers(l, noGrant) {
			fences = append(fences, r.Fence)
		}
	}
	return fences, err
}

// StillOpen reports whether no node is revoked or past its end. A freeze may be lifted, so it does not count.
func (t *Tx) StillOpen(l Lineage, now time.Time) (bool, error) {
	fences, err := t.FinalFences(l)
	return err == nil && len(fences) == 0 && !l.Expired(now), err
}

// CheckUsable refuses a lineage with a fence over it or with an expired node. The subject is the step to take under it.
// For a further delegation the subject's Grant is empty.
//
// Errors: Revoked, Expired.
func (t *Tx) CheckUsable(op string, l Lineage, subject selector.Subject, now time.Time) error {
	f, err := t.FenceOver(l, subject)
	if err != nil {
		return err
	}
	if f != nil {
		return Fenced(op, f)
	}
	if end, expired := l.expired(now); expired {
		return broker.Errorf(broker.Expired, op, "the delegation ended at %s", end.UTC().Format(time.RFC3339)).
			With(broker.CodeExpired)
	}
	return nil
}

// EachOpen calls f with the lineage of each open delegation: it has not expired, and no final fence covers it. A
// freeze may be lifted, so it does not count.
func (t *Tx) EachOpen(chains []broker.ChainID, now time.Time, f func(Lineage) error) error {
	return t.EachRecent(chains, now, func(id broker.DelegationID) error {
		l, err := t.Lineage("revoke", id)
		if err != nil {
			return err
		}
		fence, err := t.FenceOver(l, noGrant)
		if err != nil || fence != nil && !fence.Frozen || !now.Before(l.Leaf().Expires) {
			return err
		}
		return f(l)
	})
}

// EachFenced calls f with each grant directly under the lineage's leaf that was fenced by itself or by a rule. The
// ledger lists the grants with a fence of their own. The live grants are read only when a final rule is in force. So in
// a chain with thousands of grants the agents learn of a fence at once.
func (t *Tx) EachFenced(l Lineage, f func(broker.GrantID)) error {
	leaf := l.Leaf().ID
	listed := map[broker.GrantID]bool{}
	err := t.eachMarkedFenced(leaf, func(id broker.GrantID) error { listed[id] = true; f(id); return nil })
	if err != nil {
		return err
	}
	rules, err := t.Rules()
	if err != nil || !slices.ContainsFunc(rules, func(r Rule) bool { return !r.Fence.Frozen }) {
		return err
	}
	return t.EachLive([]broker.ChainID{l.Chain.ID}, func(g broker.Grant) error {
		if g.Delegation != leaf || listed[g.ID] {
			return nil
		}
		fence, err := t.FenceOver(l, l.Subject(g))
		if err == nil && fence != nil && !fence.Frozen {
			f(g.ID)
		}
		return err
	})
}
