package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/pawlsec/pawl/broker"
)

// Explanation says why a question was answered as it was, and what a request would need to be
// granted. It names policies and repeats the question's own words; it holds no policy text
// and nothing of other callers.
type Explanation struct {
	Decision broker.Decision `json:"decision"`
	Granted  bool            `json:"granted"`           // allowed, and nothing is missing
	Why      string          `json:"why"`               // one line for people
	Unmet    []string        `json:"unmet,omitempty"`   // ids of permits for just this caller, action and tool whose conditions did not hold
	Missing  []string        `json:"missing,omitempty"` // "tool:x", "permit:use:x", "approval:2 of oncall", "narrowing:native", "domains:a.example b.example"
	Remedy   string          `json:"remedy,omitempty"`  // how to ask; the policies' own @remedy where they have one
}

// Explain answers a question like [Policy.Decide] and says why.
func (p *Policy) Explain(q broker.Question) Explanation {
	if p.bait(&q) {
		return Explanation{Decision: p.Decide(q), Why: "the tool is a canary: nobody has business with it",
			Remedy: "there is nothing to ask for; do not tell agents which tools are canaries"}
	}
	v := p.evaluate(&q, p.relevant)
	e := Explanation{Decision: p.settle(&q, v)}
	_, known := p.about(&q)
	by := strings.Join(e.Decision.Policies, ", ")
	switch {
	case q.Caller.ID.IsZero() || !slices.Contains(actions(), q.Action):
		e.Why = "a question needs a caller and an action"
	case !known:
		e.Why = fmt.Sprintf("the bundle declares no tool %q", q.Tool.Name)
		e.lacks("ask the platform team to declare the tool", "tool:"+string(q.Tool.Name))
	case e.Decision.Failed:
		e.Why = "could not be evaluated, so it is a deny: " + ids(v.failed)[0]
		e.Remedy = "give every argument and label that the policy looks at, or have the platform team mend it"
	case e.Decision.Allow:
		e.allowed(p, &q)
	case len(v.decided) > 0:
		e.Why = "forbidden by " + by
		e.Remedy = remedies(v.decided, "ask the platform team; a forbid cannot be outvoted by another permit")
	default:
		unmet := v.unmet()
		e.Unmet = ids(unmet)
		e.Why = "no permit holds"
		if len(unmet) > 0 {
			e.Why += "; conditions were not met of " + strings.Join(e.Unmet, ", ")
		}
		e.lacks(remedies(unmet, fmt.Sprintf("ask the platform team for a permit for %s to %s %q", q.Caller.ID, q.Action, q.Tool.Name)),
			fmt.Sprintf("permit:%s:%s", q.Action, q.Tool.Name))
	}
	return e
}

func (e *Explanation) lacks(remedy, missing string) {
	e.Missing = append(e.Missing, missing)
	if e.Remedy == "" {
		e.Remedy = remedy
	}
}

// allowed says what an allow still asks for.
func (e *Explanation) allowed(p *Policy, q *broker.Question) {
	d := e.Decision
	e.Why = "permitted by " + strings.Join(d.Policies, ", ")
	if t, _ := p.about(q); t.Narrowing < d.Narrowing {
		e.lacks("use a tool whose secret is narrowed more strongly", "narrowing:"+d.Narrowing.String())
	}
	if foreign(q, d) {
		e.lacks("ask the platform team for a permit that names both trust domains", "domains:"+strings.Join(bothDomains(q), " "))
	}
	if d.Approval != "" {
		e.lacks(cmp.Or(d.Remedy, "ask "+d.Approval+" to approve"), "approval:"+d.Approval)
	}
	e.Granted = len(e.Missing) == 0
}

// foreign reports whether an allow leaves a delegation into another trust domain unnamed.
func foreign(q *broker.Question, d broker.Decision) bool {
	return crosses(q) && !all(bothDomains(q), func(td string) bool { return slices.Contains(d.Domains, td) })
}

// remedies are what the rules say, as much of it as fits, or else otherwise.
func remedies(rules []*rule, otherwise string) string {
	var said []string
	for _, r := range rules {
		if r.remedy != "" && !slices.Contains(said, r.remedy) {
			said = append(said, r.remedy)
		}
	}
	if len(said) == 0 {
		return otherwise
	}
	slices.Sort(said)
	all := said[0] // at most 256 bytes
	for _, more := range said[1:] {
		if len(all)+len("; ")+len(more) <= broker.MaxRemedy {
			all += "; " + more
		}
	}
	return all
}
