package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/pawlsec/pawl/broker"
)

// Explanation gives the reasons for a decision and lists the conditions that a grant still needs. It names policies
// and repeats values of the question. It contains no policy text and nothing about other callers.
type Explanation struct {
	Decision broker.Decision `json:"decision"`
	Granted  bool            `json:"granted"`         // allowed, and nothing is missing
	Why      string          `json:"why"`             // one line for people
	Unmet    []string        `json:"unmet,omitempty"` // ids of permits for exactly this caller, action and tool with unmet conditions
	// Missing is such as "tool:x", "permit:use:x", "approval:2 of oncall", "narrowing:native",
	// "domains:a.example b.example", "budget:steps", "limit:writes".
	Missing []string `json:"missing,omitempty"`
	Limits  []string `json:"limits,omitempty"` // of an allow, with the steps that count: "writes: 3 of 10 in 1h0m0s"
	Remedy  string   `json:"remedy,omitempty"` // how to ask; the @remedy of the policies if they have one
}

// Explain answers a question like [Policy.Decide] and gives the reasons. It compares the history of the caller with the
// limits too, which the broker does by its ledger.
func (p *Policy) Explain(q broker.Question) Explanation {
	if p.isCanary(&q) {
		return Explanation{Decision: p.Decide(q), Why: "the tool is a canary; no caller may use it",
			Remedy: "no permit can allow this; do not disclose to agents which tools are canaries"}
	}
	v := p.evaluate(&q, p.relevant)
	e := Explanation{Decision: p.conclude(&q, v)}
	_, known := p.toolOf(&q)
	by := strings.Join(e.Decision.Policies, ", ")
	switch {
	case q.Caller.ID.IsZero() || !slices.Contains(actions(), q.Action):
		e.Why = "a question needs a caller and an action"
	case !known:
		e.Why = fmt.Sprintf("the bundle declares no tool %q", q.Tool.Name)
		e.lacks("ask the platform team to declare the tool", "tool:"+string(q.Tool.Name))
	case e.Decision.Failed:
		e.Why = "denied because this policy failed to evaluate: " + ids(v.failed)[0]
		e.Remedy = "give every argument and label that the policy reads, or ask the platform team to fix the policy"
	case e.Decision.Allow:
		e.allowed(p, &q)
	case len(v.decided) > 0:
		e.Why = "forbidden by " + by
		e.Remedy = remedies(v.decided, "ask the platform team; no permit overrides a forbid")
	default:
		unmet := v.unmet()
		e.Unmet = ids(unmet)
		e.Why = "no permit holds"
		if len(unmet) > 0 {
			e.Why += "; conditions not met: " + strings.Join(e.Unmet, ", ")
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

// allowed adds the requirements that an allow leaves open: narrowing, trust domains, caps, limits, approval.
func (e *Explanation) allowed(p *Policy, q *broker.Question) {
	d := e.Decision
	e.Why = "permitted by " + strings.Join(d.Policies, ", ")
	if t, _ := p.toolOf(q); t.Narrowing < d.Narrowing {
		e.lacks("use a tool with stronger narrowing", "narrowing:"+d.Narrowing.String())
	}
	if lacksDomains(q, d) {
		e.lacks("ask the platform team for a permit that names both trust domains", "domains:"+strings.Join(bothDomains(q), " "))
	}
	if q.Action == broker.ActionOpen && q.Open != nil {
		_, beyond := q.Open.Capped(d.Caps, q.Chain.SignedLabels())
		for _, x := range beyond {
			e.lacks("ask for "+x.Remedy, x.What)
		}
	}
	for _, l := range d.Limits {
		n := p.counted(q, l)
		e.Limits = append(e.Limits, fmt.Sprintf("%s: %d of %d in %s", l.Policy, n, l.Steps, l.Window))
		if n >= l.Steps {
			e.lacks("wait, or ask the platform team for a higher limit", "limit:"+l.Policy)
		}
	}
	if d.Approval != "" {
		e.lacks(cmp.Or(d.Remedy, "ask "+d.Approval+" to approve"), "approval:"+d.Approval)
	}
	e.Granted = len(e.Missing) == 0
}

// counted returns how many steps of the caller's history count under a limit: those with a tool for which the same
// question has that limit. The broker counts each step as it was decided, and its own arguments may decide otherwise.
func (p *Policy) counted(q *broker.Question, l broker.Limit) (n int) {
	for tool, past := range q.CallerHistory[l.Window] {
		if past.Count == 0 {
			continue
		}
		asked := *q
		asked.Tool, _ = p.Tool(tool)
		if slices.Contains(p.Decide(asked).Limits, l) {
			n += past.Count
		}
	}
	return n
}

// lacksDomains reports whether no permit names both trust domains of an allowed delegation.
func lacksDomains(q *broker.Question, d broker.Decision) bool {
	return crosses(q) && !all(bothDomains(q), func(td string) bool { return slices.Contains(d.Domains, td) })
}

// remedies joins the @remedy texts of the rules up to [broker.MaxRemedy] bytes. Without any it returns otherwise.
func remedies(rules []*rule, otherwise string) string {
	var texts []string
	for _, r := range rules {
		if r.remedy != "" && !slices.Contains(texts, r.remedy) {
			texts = append(texts, r.remedy)
		}
	}
	if len(texts) == 0 {
		return otherwise
	}
	slices.Sort(texts)
	all := texts[0] // at most 256 bytes
	for _, more := range texts[1:] {
		if len(all)+len("; ")+len(more) <= broker.MaxRemedy {
			all += "; " + more
		}
	}
	return all
}
