package policy

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/pawlsec/pawl/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Decide answers a question. It evaluates only the policies with a matching scope. It denies a question without a
// caller, with an unknown action, or about a tool that this bundle does not declare. The bundle's declaration of the
// tool counts, not the question's.
//
// Any permit allows a delegation into another trust domain here. The decision carries the Domains of a permit that
// names both sides. Without such a permit it carries none, and the broker refuses the delegation.
//
// A canary is denied to every caller, with the consequence of the canary violation. Policies decide only about
// reports of one.
func (p *Policy) Decide(q broker.Question) broker.Decision {
	if p.isCanary(&q) {
		return broker.Decision{Consequence: p.violations[broker.ViolationCanary]}
	}
	return p.conclude(&q, p.evaluate(&q, p.relevant))
}

// isCanary reports whether a question requests a canary. A report about one is not a request.
func (p *Policy) isCanary(q *broker.Question) bool {
	t, known := p.tools[q.Tool.Name]
	return known && t.Canary && q.Action != broker.ActionReport
}

// verdict is the result of evaluating the selected rules.
type verdict struct {
	rules   []*rule
	decided []*rule // the forbids that match; without any, the permits that match
	failed  []*rule // could not be evaluated
}

// relevant selects the rules with a matching scope.
func (p *Policy) relevant(t *tool, a broker.Action, caller spiffeid.ID) ([]*rule, reads) {
	s := t.relevant[a]
	var subjects [16]cedar.EntityUID // more are possible and only allocate
	return s.pick(append(appendGroups(subjects[:0], caller), uid(typeAgent, caller.String()), cedar.EntityUID{})), s.reads
}

// toolOf returns the tool that a question is about. A report may name none.
func (p *Policy) toolOf(q *broker.Question) (*tool, bool) {
	t, ok := p.tools[q.Tool.Name]
	if !ok && q.Action == broker.ActionReport {
		return p.unnamed, true
	}
	return t, ok
}

// actions lists every action.
func actions() []broker.Action {
	return []broker.Action{broker.ActionOpen, broker.ActionUse, broker.ActionDelegate, broker.ActionReport}
}

// chooser selects the rules to evaluate and the context members that they read.
type chooser func(*tool, broker.Action, spiffeid.ID) ([]*rule, reads)

func (p *Policy) evaluate(q *broker.Question, choose chooser) (v verdict) {
	t, ok := p.toolOf(q)
	if !ok || q.Caller.ID.IsZero() || !slices.Contains(actions(), q.Action) {
		return v
	}
	rules, members := choose(t, q.Action, q.Caller.ID)
	if v.rules = rules; len(rules) == 0 {
		return v
	}
	request := cedar.Request{
		Principal: uid(typeAgent, q.Caller.ID.String()),
		Action:    uid(typeAction, string(q.Action)),
		Resource:  t.uid,
	}
	var permits []*rule
	for _, part := range p.byWindow(rules) {
		request.Context = contextOf(q, members, part.window)
		_, found := cedar.Authorize(batch(part.rules), &world{tool: t}, request)
		for _, reason := range found.Reasons {
			if r := p.byID[reason.PolicyID]; r.forbid {
				v.decided = append(v.decided, r)
			} else if _, ok := r.limitOf(q); ok {
				permits = append(permits, r)
			}
		}
		for _, err := range found.Errors {
			v.failed = append(v.failed, p.byID[err.PolicyID])
		}
	}
	if len(v.decided) == 0 {
		v.decided = permits
	}
	return v
}

// windowed are rules that see the history of the caller in one window; zero: in none.
type windowed struct {
	window time.Duration
	rules  []*rule
}

// byWindow divides the rules by the window of the caller's history that they see: the context differs only in that.
func (p *Policy) byWindow(rules []*rule) []windowed {
	if len(p.windows) == 0 {
		return []windowed{{0, rules}}
	}
	var parts []windowed
	for _, r := range rules {
		i := slices.IndexFunc(parts, func(w windowed) bool { return w.window == r.window })
		if i < 0 {
			i, parts = len(parts), append(parts, windowed{window: r.window})
		}
		parts[i].rules = append(parts[i].rules, r)
	}
	return parts
}

// batch gives Cedar the rules with their conditions alone, because their scopes match.
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

// conclude turns a verdict into a decision. Cedar skips a policy that fails. Here it denies, because the failed
// policy may be the forbid. The consequence of a failed forbid is not applied: nothing is proven.
func (p *Policy) conclude(q *broker.Question, v verdict) broker.Decision {
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

// remedy joins the @remedy texts of the policies that block the request. These are the forbids that match, the
// permits that need an approval, or the permits with unmet conditions.
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

// unmet returns the permits with unmet conditions.
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

// consequence returns the most severe consequence of the forbids that match. The bundle's table counts for a report
// when no matching forbid sets a consequence. It also counts when a policy failed to evaluate; then the more severe
// consequence applies.
func (p *Policy) consequence(q *broker.Question, v verdict) (worst broker.Consequence) {
	explicit := false
	for _, r := range v.decided {
		worst = max(worst, r.consequence)
		explicit = explicit || r.violation
	}
	if q.Action == broker.ActionReport && (!explicit || len(v.failed) > 0) {
		worst = max(worst, p.violations[q.Violation])
	}
	return worst
}

// limit applies the limits of all permits that match: the tightest of each kind. For a delegation across trust
// domains, only the permits that name both domains count, if there are any.
func limit(d *broker.Decision, q *broker.Question, permits []*rule) {
	if crosses(q) {
		naming := slices.DeleteFunc(slices.Clone(permits), func(r *rule) bool { return !r.namesBoth(q) })
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
		d.Caps.Tighten(r.caps)
		if l, _ := r.limitOf(q); l.Steps > 0 {
			d.Limits = append(d.Limits, l)
		}
		if a := r.approval; a.count > needed[a.group] {
			needed[a.group] = a.count
		}
	}
	slices.SortFunc(d.Limits, func(a, b broker.Limit) int { return strings.Compare(a.Policy, b.Policy) })
	d.Approval = approvals(needed)
}

// approvals formats the approvals needed, for example "1 of managers and 2 of oncall".
func approvals(needed map[string]int) string {
	var parts []string
	for _, group := range slices.Sorted(maps.Keys(needed)) {
		parts = append(parts, fmt.Sprintf("%d of %s", needed[group], group))
	}
	return strings.Join(parts, " and ")
}

// crosses reports whether the question is a delegation into another trust domain.
func crosses(q *broker.Question) bool {
	return q.Action == broker.ActionDelegate && q.Caller.ID.TrustDomain() != q.Receiver.TrustDomain()
}

func bothDomains(q *broker.Question) []string {
	both := []string{q.Caller.ID.TrustDomain().Name(), q.Receiver.TrustDomain().Name()}
	slices.Sort(both)
	return both
}

// namesBoth reports whether the permit names both trust domains of a delegation.
func (r *rule) namesBoth(q *broker.Question) bool {
	return all(bothDomains(q), func(d string) bool { return slices.Contains(r.domains, d) })
}

// limitOf returns the limit of a permit for a question. Without the label by which it counts the permit permits nothing,
// so ok is false.
func (r *rule) limitOf(q *broker.Question) (l broker.Limit, ok bool) {
	l = r.limit
	if l.Label == "" {
		return l, true
	}
	l.Value, ok = q.Chain.SignedLabels()[l.Label]
	return l, ok
}
