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
	"time"

	"github.com/go-json-experiment/json"
	"github.com/pawlsec/pawl/broker"
)

// Difference is a question that two bundles answer differently. The ids of the deciding policies and their remedies
// are not compared.
type Difference struct {
	Question  broker.Question
	Live      broker.Decision
	Candidate broker.Decision
}

// String formats the question and the two answers in one line, without the arguments.
func (d Difference) String() string {
	return fmt.Sprintf("%s %s %q: live %s, candidate %s", d.Question.Caller.ID, d.Question.Action, d.Question.Tool.Name,
		describe(d.Live), describe(d.Candidate))
}

// describe formats a decision in a few words: "allow (approval: 2 of oncall) by ci".
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
	for _, l := range d.Limits {
		s += fmt.Sprintf(" (limit: %d per %v)", l.Steps, l.Window)
	}
	if caps := describeCaps(d.Caps); caps != "" {
		s += " (" + caps + ")"
	}
	return fmt.Sprintf("%s by %q", s, d.Policies)
}

// compare evaluates the candidate and compares its answer with the live one.
func compare(candidate *Policy, q broker.Question, live broker.Decision) (Difference, bool) {
	d := Difference{q, live, candidate.Decide(q)}
	a, b := d.Live, d.Candidate
	a.Policies, b.Policies, a.Remedy, b.Remedy = nil, nil, "", ""
	return d, !reflect.DeepEqual(a, b)
}

// Diff asks both bundles the same questions, such as those of a test file or of an audit log. It returns those with
// different answers.
func Diff(live, candidate *Policy, questions ...broker.Question) (found []Difference) {
	for _, q := range questions {
		if d, differs := compare(candidate, q, live.Decide(q)); differs {
			found = append(found, d)
		}
	}
	return found
}

// Shadow evaluates a candidate bundle beside a live one, to try it on real questions before it is put in force. It
// never decides: the live answer is returned first. One goroutine then evaluates the candidate, from a queue of
// bounded length. Create one with [NewShadow]; it is safe for concurrent use.
type Shadow struct {
	report    ShadowReport
	candidate atomic.Pointer[Policy]
	asked     chan answered
	done      chan struct{} // closed when the goroutine has ended
	stop      chan struct{} // closed by Close
	closing   sync.Once
}

// ShadowReport receives the findings of a [Shadow]. Both fields are required.
type ShadowReport struct {
	Differs func(Difference) // called for one difference at a time
	Missed  func(error)      // a question was not compared: the queue was full, or the candidate panicked. Must be quick and safe for concurrent use
}

// ErrShadowBusy reports that questions arrive faster than the candidate answers them.
var ErrShadowBusy = errors.New("more questions than the candidate can keep up with")

// shadowQueue is the number of questions that can wait for the candidate.
const shadowQueue = 1024

// answered is a question with its live answer and the candidate to compare.
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

// Close stops the comparison and waits for its goroutine. It may be called more than once.
func (s *Shadow) Close() {
	s.closing.Do(func() { close(s.stop) })
	<-s.done
}

// Try makes p the candidate. Nil removes the candidate.
func (s *Shadow) Try(p *Policy) { s.candidate.Store(p) }

// Beside returns a policy that answers with live alone. If there is a candidate, the shadow asks it the same
// questions.
func (s *Shadow) Beside(live *Policy) broker.Policy {
	if c := s.candidate.Load(); c != nil {
		return shadowed{live, c, s}
	}
	return live
}

// shadowed is a live bundle with a candidate for comparison.
type shadowed struct {
	*Policy
	candidate *Policy
	shadow    *Shadow
}

// Decide returns the live answer.
func (p shadowed) Decide(q broker.Question) broker.Decision {
	live := p.Policy.Decide(q)
	q.History = maps.Clone(q.History) // the engine counts the step in the original
	select {
	case p.shadow.asked <- answered{p.candidate, q, live}:
	default:
		p.shadow.report.Missed(ErrShadowBusy)
	}
	return live
}

// CallerWindows returns the windows of both, so that the candidate sees the histories that it needs.
func (p shadowed) CallerWindows() []time.Duration {
	all := slices.Clone(p.Policy.windows)
	for _, w := range p.candidate.windows {
		if !slices.Contains(all, w) {
			all = append(all, w)
		}
	}
	return all
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

// compare evaluates the candidate. It recovers a panic of the candidate and reports it.
func (s *Shadow) compare(a answered) {
	defer func() {
		if p := recover(); p != nil {
			s.report.Missed(fmt.Errorf("the candidate panicked: %v", p))
		}
	}()
	if d, differs := compare(a.candidate, a.question, a.live); differs {
		s.report.Differs(d)
	}
}

// Change is one difference between two bundles.
type Change struct {
	What string `json:"what"`           // "tool", "policy", "violation", "issuer", "schema" or "version"
	Name string `json:"name,omitempty"` // which one; empty for schema and version
	How  string `json:"how"`            // "added", "removed" or "changed"
}

func (c Change) String() string { return fmt.Sprintf("%s %s %s", c.How, c.What, c.Name) }

// Changes lists the differences between two loaded bundles, in order. Policies are compared as Cedar, so comments and
// layout do not count.
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
	for _, what := range []string{"version", "tool", "policy", "violation", "issuer", "schema"} {
		add(what, a[what], b[what])
	}
	return found
}

// parts returns the parts of a bundle by kind and name, each as comparable bytes.
func (p *Policy) parts() map[string]map[string][]byte {
	c := p.bundle.content
	parts := map[string]map[string][]byte{"version": {"": fmt.Append(nil, c.Version)},
		"tool": {}, "policy": {}, "violation": {}, "issuer": {}, "schema": {}}
	for _, t := range c.Tools {
		parts["tool"][t.Name], _ = json.Marshal(t, json.Deterministic(true)) // cannot fail: it was decoded from JSON
	}
	for _, r := range p.rules {
		parts["policy"][string(r.id)] = r.policy.MarshalCedar()
	}
	for code, consequence := range c.Violations {
		parts["violation"][string(code)] = []byte(consequence)
	}
	for _, i := range c.Issuers {
		parts["issuer"][i.Issuer], _ = json.Marshal(i, json.Deterministic(true)) // the same
	}
	if c.Schema != nil {
		parts["schema"][""] = []byte(c.Schema.Text)
	}
	return parts
}
