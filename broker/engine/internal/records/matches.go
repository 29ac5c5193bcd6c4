package records

import (
	"errors"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// Match says whether a rule covers delegations or grants when it is written.
type Match int8

// The matches.
const (
	MatchesNothing Match = iota // it covers none, and no later step under an open delegation
	MayMatchLater               // it covers none, but may cover a later step under an open delegation
	MatchesNow                  // it covers an open delegation or a grant with a secret that may work
)

// errFound ends a scan early.
var errFound = errors.New("found")

// MatchOf returns the match of r among the chains opened after since. It stops at the first match, so only a rule that
// matches nothing costs a full scan.
func (t *Tx) MatchOf(r Rule, policy broker.Policy, since, now time.Time) (match Match, err error) {
	check := func(g broker.Grant) error {
		l, err := t.Lineage("revoke", g.Delegation)
		if err == nil && l.Chain.Opened.After(since) && r.Covers(l, l.Subject(g)) {
			match, err = MatchesNow, errFound
		}
		return err
	}
	places, err := t.Places(broker.Revocation{Selector: r.Selector}, now, policy)
	if err != nil {
		return match, err
	}
	for _, scan := range []func() error{
		func() error { return t.EachLive(places, check) },
		func() error { return t.EachStatic(places, check) },
		func() error {
			return t.EachOpen(places, now, func(l Lineage) error {
				switch {
				case !l.Chain.Opened.After(since):
				case r.Covers(l, noGrant):
					match = MatchesNow
					return errFound
				case r.MayCoverStep(l, policy, now):
					match = MayMatchLater
				}
				return nil
			})
		},
	} {
		if err := scan(); errors.Is(err, errFound) {
			return MatchesNow, nil
		} else if err != nil {
			return match, err
		}
	}
	return match, nil
}

// MayCoverStep reports whether the rule may cover a later step of the leaf's holder, with a tool as policy declares it
// now.
func (r Rule) MayCoverStep(l Lineage, policy broker.Policy, now time.Time) bool {
	for _, right := range l.Leaf().Scope {
		t, known := policy.Tool(right.Tool)
		if !known || !right.Use {
			continue
		}
		s := selector.Subject{Chain: l.Chain, Path: l.Nodes, Tool: t.Name, Vault: t.Path,
			Bundle: policy.Digest(), At: now}
		if r.parsed.MayMatchLater(s, t.Arguments) {
			return true
		}
	}
	return false
}

// NothingMatches refuses a selector that matches nothing. Of a leaked value it says whether secrets live of which the ledger
// has no digest: one of them may be the value. The broker's process began at started.
func (t *Tx) NothingMatches(op string, s selector.Selector, started time.Time) (*broker.Error, error) {
	refusal := broker.Errorf(broker.NotFound, op,
		"the selector matches nothing that is open or alive, and no step that can still be taken").
		With(broker.CodeSelectorEmpty).Lacks("check its spelling; pawl chain list shows the open chains", "selector")
	if _, leaked := s.LeakedValue(); !leaked {
		return refusal, nil
	}
	n, latest := 0, time.Time{}
	err := t.EachLive(Everywhere, func(g broker.Grant) error {
		if g.Unrecorded(started) {
			n++
			if end := g.LatestEnd(); end.After(latest) {
				latest = end
			}
		}
		return nil
	})
	if err != nil || n == 0 {
		return refusal, err
	}
	return broker.Errorf(broker.NotFound, op, "no secret that is recorded has this value, but %d that may have it are not "+
		"recorded: the broker is ending them, and the last ends at %s", n, latest.UTC().Format(time.RFC3339)).
		With(broker.CodeSelectorEmpty).Lacks("revoke the chain in whose hands it was, or ask again after that time", "selector"), nil
}
