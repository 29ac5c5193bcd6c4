package policy

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/go-json-experiment/json"
	"github.com/pawlsec/pawl/broker"
)

// Difference is a question that two bundles answer differently. The ids of the policies that
// decided, and their words on how to ask, do not count.
type Difference struct {
	Question  broker.Question
	Live      broker.Decision
	Candidate broker.Decision
}

// String tells the question and the two answers in one line, without the arguments.
func (d Difference) String() string {
	return fmt.Sprintf("%s %s %q: live %s, candidate %s", d.Question.Caller.ID, d.Question.Action, d.Question.Tool.Name,
		describe(d.Live), describe(d.Candidate))
}

// describe is a decision in a few words: "allow (approval: 2 of oncall) by ci".
func describe(d broker.Decision) string {
	s := "allow"
	switch {
	case d.Failed:
		s = "deny (failed)"
	case !d.Allow:
		s = "deny"
	}
	if d.Consequence != broker.ConsequenceDeny {
		s += " (" + d.Consequence.String() + ")"
	}
	if d.Approval != "" {
		s += " (approval: " + d.Approval + ")"
	}
	if d.TTL > 0 {
		s += fmt.Sprintf(" (ttl: %v)", d.TTL)
	}
	if d.Narrowing > broker.NarrowNone {
		s += " (narrowing: " + d.Narrowing.String() + ")"
	}
	return fmt.Sprintf("%s by %q", s, d.Policies)
}

// compare evaluates the candidate beside a live answer.
func compare(candidate *Policy, q broker.Question, live broker.Decision) (Difference, bool) {
	d := Difference{q, live, candidate.Decide(q)}
	a, b := d.Live, d.Candidate
	a.Policies, b.Policies, a.Remedy, b.Remedy = nil, nil, "", ""
	return d, !reflect.DeepEqual(a, b)
}

// Diff asks both bundles the same questions, such as those of a test file or of an audit log,
// and gives those that they answer differently.
func Diff(live, candidate *Policy, questions ...broker.Question) (found []Difference) {
	for _, q := range questions {
		if d, differs := compare(candidate, q, live.Decide(q)); differs {
			found = append(found, d)
		}
	}
	return found
}

// Shadow evaluates a candidate bundle beside a live one, so that it can be tried on real questions
// before it counts. It never decides: the live answer is given first, and what it is compared with
// is worked out behind it, by one goroutine, from a queue of bounded length. Make one with
// [NewShadow]; it is safe for concurrent use.
type Shadow struct {
	report    ShadowReport
	candidate atomic.Pointer[Policy]
	asked     chan answered
	done      chan struct{} // closed when the goroutine is gone
	stop      chan struct{} // closed by Close
	closing   sync.Once
}

// ShadowReport is told what a [Shadow] finds. Both fields are required.
type ShadowReport struct {
	Differs func(Difference) // one at a time
	Missed  func(error)      // a question was not compared: there were too many, or the candidate broke on it. Must be quick and safe for concurrent use
}

// ErrShadowBusy says that questions come faster than a candidate answers them.
var ErrShadowBusy = errors.New("more questions than the candidate can keep up with")

// shadowQueue is how many questions wait for a candidate's answer.
const shadowQueue = 1024

// answered is a question, its live answer, and who is to be asked, too.
type answered struct {
	candidate *Policy
	question  broker.Question
	live      broker.Decision
}

// NewShadow starts without a candidate.
func NewShadow(report ShadowReport) *Shadow {
	s := &Shadow{report: report, asked: make(chan answered, shadowQueue), done: make(chan struct{}), stop: make(chan struct{})}
	go s.run()
	return s
}

// Close ends the comparing and waits for it. It may be called more than once.
func (s *Shadow) Close() {
	s.closing.Do(func() { close(s.stop) })
	<-s.done
}

// Try makes p the candidate; nil: there is none.
func (s *Shadow) Try(p *Policy) { s.candidate.Store(p) }

// Beside gives a policy that answers by live alone, and has the candidate, if there is one, asked
// the same.
func (s *Shadow) Beside(live *Policy) broker.Policy {
	if c := s.candidate.Load(); c != nil {
		return shadowed{live, c, s}
	}
	return live
}

// shadowed is a live bundle whose answers are compared.
type shadowed struct {
	*Policy
	candidate *Policy
	shadow    *Shadow
}

// Decide gives the live answer.
func (p shadowed) Decide(q broker.Question) broker.Decision {
	live := p.Policy.Decide(q)
	q.History = maps.Clone(q.History) // the engine counts the step in it
	select {
	case p.shadow.asked <- answered{p.candidate, q, live}:
	default:
		p.shadow.report.Missed(ErrShadowBusy)
	}
	return live
}

func (s *Shadow) run() {
	defer close(s.done)
	for {
		select {
		case a := <-s.asked:
			s.compare(a)
		case <-s.stop:
			return
		}
	}
}

// compare asks the candidate. Whatever it does stays here.
func (s *Shadow) compare(a answered) {
	defer func() {
		if p := recover(); p != nil {
			s.report.Missed(fmt.Errorf("the candidate broke: %v", p))
		}
	}()
	if d, differs := compare(a.candidate, a.question, a.live); differs {
		s.report.Differs(d)
	}
}

// Change is one thing that is not the same in two bundles.
type Change struct {
	What string `json:"what"`           // "tool", "policy", "violation", "schema" or "version"
	Name string `json:"name,omitempty"` // which one; empty for schema and version
	How  string `json:"how"`            // "added", "removed" or "changed"
}

func (c Change) String() string { return fmt.Sprintf("%s %s %s", c.How, c.What, c.Name) }

// Changes lists what differs between two loaded bundles, in order. Policies are compared as
// Cedar, so that comments and layout are no change.
func Changes(from, to *Policy) []Change {
	var found []Change
	add := func(what string, old, new map[string][]byte) {
		names := slices.AppendSeq(slices.Collect(maps.Keys(old)), maps.Keys(new))
		slices.Sort(names)
		for _, name := range slices.Compact(names) {
			before, had := old[name]
			after, has := new[name]
			switch {
			case !had:
				found = append(found, Change{what, name, "added"})
			case !has:
				found = append(found, Change{what, name, "removed"})
			case !bytes.Equal(before, after):
				found = append(found, Change{what, name, "changed"})
			}
		}
	}
	a, b := from.parts(), to.parts()
	for _, what := range []string{"version", "tool", "policy", "violation", "schema"} {
		add(what, a[what], b[what])
	}
	return found
}

// parts are a bundle's, by kind and name, each as comparable bytes.
func (p *Policy) parts() map[string]map[string][]byte {
	c := p.bundle.content
	parts := map[string]map[string][]byte{"version": {"": fmt.Append(nil, c.Version)},
		"tool": {}, "policy": {}, "violation": {}, "schema": {}}
	for _, t := range c.Tools {
		parts["tool"][t.Name], _ = json.Marshal(t, json.Deterministic(true)) // it came from JSON
	}
	for _, r := range p.rules {
		parts["policy"][string(r.id)] = r.policy.MarshalCedar()
	}
	for code, consequence := range c.Violations {
		parts["violation"][string(code)] = []byte(consequence)
	}
	if c.Schema != nil {
		parts["schema"][""] = []byte(c.Schema.Text)
	}
	return parts
}
