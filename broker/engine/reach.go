package engine

import (
	"errors"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// reach is what a rule is about at the moment at which it is written.
type reach int8

const (
	reachNothing reach = iota // nothing, and nothing that is open now can come under it
	reachLater                // nothing, but a step under a delegation that is open now may
	reachNow                  // something that is open or works
)

// errReached ends a scan early.
var errReached = errors.New("found")

// reachOf says what r is about in the caller's transaction, among chains opened after since. It stops
// at the first thing found, so that only a rule about nothing has everything looked at.
func (b *Engine) reachOf(tx broker.Tx, r queryFence, since, now time.Time) (how reach, err error) {
	seen := b.sight(tx)
	meant := func(g broker.Grant) error {
		p, err := seen.path("revoke", g.Delegation)
		if err == nil && p.chain.Opened.After(since) && r.covers(p, p.subject(g)) {
			how, err = reachNow, errReached
		}
		return err
	}
	policy := b.cfg.Policy()
	for _, look := range []func() error{
		func() error { return eachLive(tx, "", meant) },
		func() error { return eachStatic(tx, "", meant) },
		func() error {
			return b.eachOpen(tx, "", now, func(p path) error {
				switch {
				case !p.chain.Opened.After(since):
				case r.covers(p, selector.Subject{}):
					how = reachNow
					return errReached
				case r.mayCover(p, policy, now):
					how = reachLater
				}
				return nil
			})
		},
	} {
		if err := look(); errors.Is(err, errReached) {
			return reachNow, nil
		} else if err != nil {
			return how, err
		}
	}
	return how, nil
}

// eachOpen calls f with the path to each delegation under which something can still be handed out.
func (b *Engine) eachOpen(tx broker.Tx, chain broker.ChainID, now time.Time, f func(path) error) error {
	return eachRecent(tx, chain, now, func(id broker.DelegationID) error {
		p, err := b.readPath(tx, "revoke", id)
		if err != nil {
			return err
		}
		fence, err := b.fenceOver(tx, p, selector.Subject{})
		if err != nil || fence != nil && !fence.Frozen || !now.Before(p.leaf().Expires) {
			return err
		}
		return f(p)
	})
}

// eachRecent is eachMember without most of those that are over: a chain lives no longer than MaxChainTTL and its id
// begins with the time, so of all chains the older ones are not read.
func eachRecent(tx broker.Tx, chain broker.ChainID, now time.Time, f func(broker.DelegationID) error) error {
	if chain != "" {
		return eachMember(tx, chain, f)
	}
	return eachMemberAfter(tx, "m/", "m/ch"+broker.IDTime(now.Add(-broker.MaxChainTTL)), f)
}

// mayCover reports whether a step that p's holder can still take, with a tool as policy has it now, can fall
// under the rule.
func (r queryFence) mayCover(p path, policy broker.Policy, now time.Time) bool {
	for _, right := range p.leaf().Scope {
		t, known := policy.Tool(right.Tool)
		if !known || !right.Use {
			continue
		}
		s := selector.Subject{Chain: p.chain, Path: p.nodes, Tool: t.Name, Vault: strings.Join(t.Path, "/"), Bundle: policy.Digest(), At: now}
		if r.selector.MayMatchLater(s, t.Arguments) {
			return true
		}
	}
	return false
}
