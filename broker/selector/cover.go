package selector

import (
	"fmt"
	"slices"

	"github.com/pawlsec/pawl/broker"
)

// OfGrant returns the Subject of a grant under the last delegation of path. The root is first in path.
func OfGrant(c broker.Chain, path []broker.Delegation, g broker.Grant) Subject {
	return Subject{Chain: c, Path: path, Grant: g.ID, Tool: g.Tool, Args: g.Args, Vault: g.Path, Bundle: g.Bundle,
		Leaked: g.Lease.Digests, At: g.Created}
}

// Covering returns the test whether a revocation covers a subject. The subject is a delegation if its Grant is empty,
// and otherwise a grant. It is the one rule for the plan, the fence, the counts and the report.
func Covering(rv broker.Revocation) (covers func(Subject) bool, err error) {
	switch {
	case rv.Node != "":
		return func(s Subject) bool {
			return slices.ContainsFunc(s.Path, func(d broker.Delegation) bool { return d.ID == rv.Node })
		}, nil
	case rv.Grant != "":
		return func(s Subject) bool { return s.Grant == rv.Grant }, nil
	}
	s, err := ParseRecorded(rv.Selector)
	if err != nil {
		return nil, fmt.Errorf("selector of %s: %w", rv.ID, err)
	}
	mark := broker.Fence{At: rv.Fenced, Frozen: rv.Freeze}
	return func(subject Subject) bool { return s.Covers(mark, subject) }, nil
}

// Covers reports whether a rule with this selector and mark covers a subject: a delegation on its path, or its grant. A
// final rule covers the chains that were open when it was written; a freeze covers later ones as well.
func (s Selector) Covers(mark broker.Fence, subject Subject) bool {
	if !mark.Frozen && subject.Chain.Opened.After(mark.At) {
		return false
	}
	for i, d := range subject.Path {
		if s.Matches(Subject{Chain: subject.Chain, Path: subject.Path[:i+1], At: d.Created}) {
			return true
		}
	}
	return subject.Grant != "" && s.Matches(subject)
}
