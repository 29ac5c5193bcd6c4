package policy

import (
	"bytes"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/go-json-experiment/json"
	"github.com/pawlsec/pawl/broker"
)

// Difference is a question that two bundles answer differently. The ids of the policies that
// decided do not count.
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
	a.Policies, b.Policies = nil, nil
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

// Shadow answers by the live bundle and evaluates a candidate beside it, so that a bundle can be
// tried on real questions before it counts. All fields are required. Report is called in the
// course of a decision, by many at once: it must be quick and safe for concurrent use.
type Shadow struct {
	Live, Candidate *Policy
	Report          func(Difference)
}

var _ broker.Policy = Shadow{}

// Decide gives the live answer.
func (s Shadow) Decide(q broker.Question) broker.Decision {
	live := s.Live.Decide(q)
	if d, differs := compare(s.Candidate, q, live); differs {
		s.Report(d)
	}
	return live
}

// Tool gives the live bundle's tool.
func (s Shadow) Tool(name broker.ToolName) (broker.Tool, bool) { return s.Live.Tool(name) }

// Digest is the live bundle's.
func (s Shadow) Digest() string { return s.Live.Digest() }

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
