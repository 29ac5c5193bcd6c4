package records

import (
	"errors"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// Match is what a rule is about at the moment at which it is written.
type Match int8

// The matches.
const (
	MatchesNothing Match = iota // nothing, and nothing that is open now can come under it
	MayMatchLater               // nothing, but a step under a delegation that is open now may
	MatchesNow                  // something that is open or works
)

// errFound ends a scan early.
var errFound = errors.New("found")

// MatchOf says what r is about in the caller's transaction, among chains opened after since. It stops
// at the first thing found, so that only a rule about nothing has everything looked at.
func (t *Tx) MatchOf(r Rule, policy broker.Policy, since, now time.Time) (how Match, err error) {
	check := func(g broker.Grant) error {
		l, err := t.Lineage("revoke", g.Delegation)
		if err == nil && l.Chain.Opened.After(since) && r.Covers(l, l.Subject(g)) {
			how, err = MatchesNow, errFound
		}
		return err
	}
	for _, scan := range []func() error{
		func() error { return t.EachLive("", check) },
		func() error { return t.EachStatic("", check) },
		func() error {
			return t.EachOpen("", now, func(l Lineage) error {
				switch {
				case !l.Chain.Opened.After(since):
				case r.Covers(l, noGrant):
					how = MatchesNow
					return errFound
				case r.MayCoverStep(l, policy, now):
					how = MayMatchLater
				}
				return nil
			})
		},
	} {
		if err := scan(); errors.Is(err, errFound) {
			return MatchesNow, nil
		} else if err != nil {
			return how, err
		}
	}
	return how, nil
}

// MayCoverStep reports whether a step that p's holder can still take, with a tool as policy has it now, can fall
// under the rule.
func (r Rule) MayCoverStep(l Lineage, policy broker.Policy, now time.Time) bool {
	for _, right := range l.Leaf().Scope {
		t, known := policy.Tool(right.Tool)
		if !known || !right.Use {
			continue
		}
		s := selector.Subject{Chain: l.Chain, Path: l.Nodes, Tool: t.Name, Vault: strings.Join(t.Path, "/"), Bundle: policy.Digest(), At: now}
		if r.parsed.MayMatchLater(s, t.Arguments) {
			return true
		}
	}
	return false
}
