package policy

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/pawlsec/pawl/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Decide answers a question. Only the policies whose scope matches are evaluated. A question
// without a caller, with an unknown action, or about a tool that this bundle does not declare,
// is denied; the bundle's own declaration of the tool counts, not the question's.
//
// A delegation into another trust domain is allowed here by any permit, with the Domains of a
// permit that names both sides, or none: the broker refuses it then.
//
// A canary is denied to everybody, with the consequence of the violation; only what follows a
// report about it is for the policies to say.
func (p *Policy) Decide(q broker.Question) broker.Decision {
	if p.bait(&q) {
		return broker.Decision{Consequence: p.violations[broker.ViolationCanary]}
	}
	return p.settle(&q, p.evaluate(&q, p.relevant))
}

// bait reports whether a question reaches for a canary.
func (p *Policy) bait(q *broker.Question) bool {
	t, known := p.tools[q.Tool.Name]
	return known && t.Canary && q.Action != broker.ActionReport
}

// verdict is what evaluating told about the rules that were looked at.
type verdict struct {
	rules   []*rule
	decided []*rule // the forbids that hold; when there are none, the permits that hold
	failed  []*rule // that could not be evaluated
}

// relevant gives the rules whose scope matches.
func (p *Policy) relevant(t *tool, a broker.Action, caller spiffeid.ID) ([]*rule, reads) {
	s := t.relevant[a]
	var subjects [16]cedar.EntityUID // more are no harm
	return s.pick(append(appendGroups(subjects[:0], caller), uid(typeAgent, caller.String()), cedar.EntityUID{})), s.reads
}

// about finds the tool that a question is about.
func (p *Policy) about(q *broker.Question) (*tool, bool) {
	t, ok := p.tools[q.Tool.Name]
	if !ok && q.Action == broker.ActionReport {
		return p.nameless, true
	}
	return t, ok
}

// actions are all there are.
func actions() []broker.Action {
	return []broker.Action{broker.ActionOpen, broker.ActionUse, broker.ActionDelegate, broker.ActionReport}
}

// chooser gives the rules to evaluate and what they look at.
type chooser func(*tool, broker.Action, spiffeid.ID) ([]*rule, reads)

func (p *Policy) evaluate(q *broker.Question, choose chooser) (v verdict) {
	t, ok := p.about(q)
	if !ok || q.Caller.ID.IsZero() || !slices.Contains(actions(), q.Action) {
		return v
	}
	rules, look := choose(t, q.Action, q.Caller.ID)
	if v.rules = rules; len(rules) == 0 {
		return v
	}
	_, found := cedar.Authorize(batch(rules), &world{tool: t}, cedar.Request{
		Principal: uid(typeAgent, q.Caller.ID.String()),
		Action:    uid(typeAction, string(q.Action)),
		Resource:  t.uid,
		Context:   contextOf(q, look),
	})
	v.decided = slices.Grow(v.decided, len(found.Reasons))
	for _, reason := range found.Reasons {
		v.decided = append(v.decided, p.byID[reason.PolicyID])
	}
	for _, err := range found.Errors {
		v.failed = append(v.failed, p.byID[err.PolicyID])
	}
	return v
}

// batch is what Cedar goes through: the conditions of rules whose scope matches.
type batch []*rule

// All implements [cedar.PolicyIterator].
func (b batch) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) {
		for _, r := range b {
			if !yield(r.id, r.when) {
				return
			}
		}
	}
}

// settle makes the decision. Cedar skips a policy that fails; we deny, because what failed may
// have been the forbid. A failed forbid's consequence does not follow: nothing is proven.
func (p *Policy) settle(q *broker.Question, v verdict) broker.Decision {
	d := broker.Decision{
		Policies: ids(v.decided, v.failed),
		Failed:   len(v.failed) > 0,
		Allow:    len(v.decided) > 0 && len(v.failed) == 0 && !v.decided[0].forbid,
	}
	if d.Allow {
		limit(&d, q, v.decided)
	}
	d.Remedy = remedy(d, v)
	d.Consequence = p.consequence(q, v)
	return d
}

// remedy is how to ask, in the words of the policies that stand in the way: the forbids that hold,
// the permits that would do if their conditions held, or those that wait for an approval.
func remedy(d broker.Decision, v verdict) string {
	switch {
	case d.Failed, d.Allow && d.Approval == "":
		return ""
	case d.Allow:
		return remedies(slices.DeleteFunc(slices.Clone(v.decided), func(r *rule) bool { return r.approval.count == 0 }), "")
	case len(v.decided) > 0:
		return remedies(v.decided, "")
	}
	return remedies(v.unmet(), "")
}

// unmet are the permits that do not hold.
func (v verdict) unmet() []*rule {
	return slices.DeleteFunc(slices.Clone(v.rules), func(r *rule) bool { return r.forbid })
}

func ids(lists ...[]*rule) (names []string) {
	for _, list := range lists {
		names = slices.Grow(names, len(list))
		for _, r := range list {
			names = append(names, string(r.id))
		}
	}
	slices.Sort(names)
	return names
}

// consequence is the harshest of the forbids that hold. For a report, the bundle's table speaks
// where no forbid with a consequence does, and also where something failed to evaluate: then
// whatever is harsher follows.
func (p *Policy) consequence(q *broker.Question, v verdict) (worst broker.Consequence) {
	spoken := false
	for _, r := range v.decided {
		worst = max(worst, r.consequence)
		spoken = spoken || r.violation
	}
	if q.Action == broker.ActionReport && (!spoken || len(v.failed) > 0) {
		worst = max(worst, p.violations[q.Violation])
	}
	return worst
}

// limit combines the limits of all permits that hold: the tightest of each kind. Permits that
// name both trust domains stand alone for a delegation across them.
func limit(d *broker.Decision, q *broker.Question, permits []*rule) {
	if crosses(q) {
		naming := slices.DeleteFunc(slices.Clone(permits), func(r *rule) bool { return !r.names(q) })
		if len(naming) > 0 {
			permits, d.Domains, d.Policies = naming, bothDomains(q), ids(naming)
		}
	}
	needed := map[string]int{}
	for _, r := range permits {
		if r.ttl > 0 && (d.TTL == 0 || r.ttl < d.TTL) {
			d.TTL = r.ttl
		}
		d.Narrowing = max(d.Narrowing, r.narrowing)
		if a := r.approval; a.count > needed[a.group] {
			needed[a.group] = a.count
		}
	}
	d.Approval = approvals(needed)
}

// approvals writes "1 of managers and 2 of oncall".
func approvals(needed map[string]int) string {
	var parts []string
	for _, group := range slices.Sorted(maps.Keys(needed)) {
		parts = append(parts, fmt.Sprintf("%d of %s", needed[group], group))
	}
	return strings.Join(parts, " and ")
}

// crosses reports whether the question is about delegating into another trust domain.
func crosses(q *broker.Question) bool {
	return q.Action == broker.ActionDelegate && q.Caller.ID.TrustDomain() != q.Receiver.TrustDomain()
}

func bothDomains(q *broker.Question) []string {
	both := []string{q.Caller.ID.TrustDomain().Name(), q.Receiver.TrustDomain().Name()}
	slices.Sort(both)
	return both
}

// names reports whether the permit names both trust domains of a delegation.
func (r *rule) names(q *broker.Question) bool {
	return all(bothDomains(q), func(d string) bool { return slices.Contains(r.domains, d) })
}
