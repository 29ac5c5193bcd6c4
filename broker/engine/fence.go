package engine

import (
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/selector"
)

// target is the place of a fence: one node, or one grant. When both are empty, the fence is a rule over everything that
// the selector matches.
type target struct {
	node  broker.DelegationID
	grant broker.GrantID
}

// fencing is one fence to write.
type fencing struct {
	by, reason, selector string
	target               target
	freeze               bool
	now                  time.Time
	check                bool // refuse a final rule that covers nothing and never can
	matched              *matched
}

// matched is the match of a rule before its transaction: see matchOf.
type matched struct {
	first broker.RevocationID // of the rule with the same selector that was in force; empty: there was none
	match records.Match

	refusal *broker.Error // where it matches nothing
}

// fence is step 1 of Revoke, inside the caller's transaction: one mark, for any number of grants below. When the same
// mark exists already, or a final mark where a freeze is requested, it writes nothing and returns the existing
// revocation. So neither a thief's further attempts nor a repeated signal makes the ledger grow.
func (e *Engine) fence(tx *records.Tx, f fencing) (broker.Revocation, error) {
	id, err := e.newID("rv")
	if err != nil {
		return broker.Revocation{}, err
	}
	rv := broker.Revocation{ID: broker.RevocationID(id), Selector: f.selector, Reason: f.reason, By: f.by,
		Freeze: f.freeze, Asked: f.now, Fenced: f.now, Closure: broker.ClosureUnknown, Uncounted: true}
	op := broker.OpFence
	if f.freeze {
		op = broker.OpFreeze
	}
	entry := broker.Entry{At: f.now, Actor: f.by, Op: op, Revocation: rv.ID, Detail: f.reason}
	switch {
	case f.target.node != "":
		return e.fenceNode(tx, f, rv, entry)
	case f.target.grant != "":
		return e.fenceGrant(tx, f, rv, entry)
	}
	return e.fenceRule(tx, f, rv, entry)
}

// fenceRule writes a rule. A selector has at most one rule of each kind. A final rule covers the chains that were open
// when it was written, so a repeated one replaces the first when it would cover more.
func (e *Engine) fenceRule(tx *records.Tx, f fencing, rv broker.Revocation, entry broker.Entry,
) (broker.Revocation, error) {
	s, err := selector.Parse(f.selector)
	if err != nil {
		return broker.Revocation{}, broker.Errorf(broker.Malformed, "revoke", "%v", err)
	}
	first, err := tx.RuleLike(s.String(), f.freeze)
	if err != nil {
		return broker.Revocation{}, err
	}
	mark := broker.Fence{At: f.now, Revocation: rv.ID, Frozen: f.freeze}
	if f.freeze && first != nil {
		rv, _, err := existing(tx, first, true)
		return rv, err
	}
	if f.check {
		m := f.matched
		if m == nil || m.first != revocationOfMark(first) { // another operator was faster
			if m, err = matchOf(tx, e.cfg.Policy(), s, f, e.started); err != nil {
				return broker.Revocation{}, err
			}
		}
		match := m.match
		if match == records.MatchesNothing && first != nil {
			rv, _, err := existing(tx, first, false)
			return rv, err
		}
		if match == records.MatchesNothing && !f.freeze {
			return broker.Revocation{}, m.refusal
		}
		rv.Nothing = match != records.MatchesNow
	}
	if rv.Revision, err = tx.Enter(entry); err != nil {
		return broker.Revocation{}, err
	}
	if first != nil {
		if err := tx.DropRule(first.Revocation); err != nil {
			return broker.Revocation{}, err
		}
	}
	mark.Generation = rv.Revision
	if err := tx.AddRule(records.NewRule(s, mark)); err != nil {
		return broker.Revocation{}, err
	}
	return rv, tx.PutRevocation(rv)
}

// matchOf finds the records that the rule of a selector covers and that the rule in force does not. Revoke calls it before its
// transaction, since all others wait for that one: with many chains in which only later steps can match, it takes long.
func matchOf(tx *records.Tx, policy broker.Policy, s selector.Selector, f fencing, started time.Time) (*matched, error) {
	first, err := tx.RuleLike(s.String(), f.freeze)
	if err != nil {
		return nil, err
	}
	var since time.Time
	if first != nil {
		since = first.At
	}
	rule := records.NewRule(s, broker.Fence{At: f.now, Frozen: f.freeze})
	m := &matched{first: revocationOfMark(first)}
	if m.match, err = tx.MatchOf(rule, policy, since, f.now); err == nil && m.match == records.MatchesNothing {
		m.refusal, err = tx.NothingMatches("revoke", s, started)
	}
	return m, err
}

func revocationOfMark(mark *broker.Fence) broker.RevocationID {
	if mark == nil {
		return ""
	}
	return mark.Revocation
}

// existing returns the revocation of the mark in force, when the mark is at least as strong as the requested one.
func existing(tx *records.Tx, mark *broker.Fence, freeze bool) (rv broker.Revocation, exists bool, err error) {
	if mark == nil || mark.Frozen && !freeze {
		return broker.Revocation{}, false, nil
	}
	rv, exists, err = tx.Revocation(mark.Revocation)
	rv.Repeated = exists
	return rv, exists, err
}

func (e *Engine) fenceNode(tx *records.Tx, f fencing, rv broker.Revocation, entry broker.Entry,
) (broker.Revocation, error) {
	d, ok, err := tx.Delegation(f.target.node)
	if err != nil {
		return broker.Revocation{}, err
	}
	if !ok {
		return broker.Revocation{}, records.UnknownDelegation("revoke")
	}
	if old, exists, err := existing(tx, d.Fence, f.freeze); err != nil || exists {
		return old, err
	}
	rv.Chain, rv.Node = d.Chain, d.ID
	if rv.Selector == "" {
		rv.Selector = "subtree:" + string(d.ID)
	}
	entry.Chain, entry.Delegation = d.Chain, d.ID
	if rv.Revision, err = tx.Enter(entry); err != nil {
		return broker.Revocation{}, err
	}
	d.Fence = &broker.Fence{Generation: rv.Revision, At: f.now, Revocation: rv.ID, Frozen: f.freeze}
	if err := tx.PutDelegation(d); err != nil {
		return broker.Revocation{}, err
	}
	return rv, tx.PutRevocation(rv)
}

func (e *Engine) fenceGrant(tx *records.Tx, f fencing, rv broker.Revocation, entry broker.Entry,
) (broker.Revocation, error) {
	g, ok, err := tx.Grant(f.target.grant)
	if err != nil {
		return broker.Revocation{}, err
	}
	if !ok {
		return broker.Revocation{}, records.UnknownGrant("revoke")
	}
	if old, exists, err := existing(tx, g.Fence, f.freeze); err != nil || exists {
		return old, err
	}
	rv.Chain, rv.Grant = g.Chain, g.ID
	if rv.Selector == "" {
		rv.Selector = "grant:" + string(g.ID)
	}
	entry.Chain, entry.Delegation, entry.Grant, entry.Tool = g.Chain, g.Delegation, g.ID, g.Tool
	if rv.Revision, err = tx.Enter(entry); err != nil {
		return broker.Revocation{}, err
	}
	g.Fence = &broker.Fence{Generation: rv.Revision, At: f.now, Revocation: rv.ID, Frozen: f.freeze}
	if err := tx.PutGrant(g); err != nil {
		return broker.Revocation{}, err
	}
	if !f.freeze {
		if err := tx.MarkFenced(g); err != nil {
			return broker.Revocation{}, err
		}
	}
	return rv, tx.PutRevocation(rv)
}

// targetOf finds the one node or grant that a selector names. The zero target is that of a rule.
func targetOf(tx *records.Tx, s selector.Selector) (target, error) {
	chain, node, grant, ok := s.Target()
	if !ok {
		return target{}, nil
	}
	if chain != "" {
		c, known, err := tx.Chain(chain)
		if err == nil && !known {
			err = records.UnknownChain("revoke", chain)
		}
		return target{node: c.Root}, err
	}
	return target{node: node, grant: grant}, nil
}
