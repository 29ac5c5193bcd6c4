package engine

import (
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/selector"
)

// target is what a fence is put on: one node, one grant, or, when both are empty, whatever the
// selector matches.
type target struct {
	node  broker.DelegationID
	grant broker.GrantID
}

// fencing is one fence to be written.
type fencing struct {
	by, reason, selector string
	target               target
	freeze               bool
	now                  time.Time
	check                bool // find out whether a rule covers anything, and refuse a final one that cannot
}

// fence is step 1 of revoke, inside the caller's transaction: one mark, whatever hangs below. Where the
// same exists already, or a final mark where a freeze is asked for, nothing is written and the revocation
// that exists is given: neither a thief who tries again nor a signal that is repeated makes the ledger grow.
func (e *Engine) fence(tx *records.Tx, f fencing) (broker.Revocation, error) {
	id, err := e.newID("rv")
	if err != nil {
		return broker.Revocation{}, err
	}
	rv := broker.Revocation{ID: broker.RevocationID(id), Selector: f.selector, Reason: f.reason, By: f.by, Freeze: f.freeze,
		Asked: f.now, Fenced: f.now, Closure: broker.ClosureUnknown, Grants: -1}
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

// fenceRule writes a rule. There is one of each kind for a selector: a final rule is about the chains that
// were open when it was written, so a repeated one takes the place of the first when there are others now.
func (e *Engine) fenceRule(tx *records.Tx, f fencing, rv broker.Revocation, entry broker.Entry) (broker.Revocation, error) {
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
	var since time.Time
	if first != nil {
		since = first.At
	}
	if f.check {
		how, err := tx.MatchOf(records.NewRule(s, mark), e.cfg.Policy(), since, f.now)
		if err != nil {
			return broker.Revocation{}, err
		}
		if how == records.MatchesNothing && first != nil {
			rv, _, err := existing(tx, first, false)
			return rv, err
		}
		if how == records.MatchesNothing && !f.freeze {
			return broker.Revocation{}, nothingMatches("revoke")
		}
		rv.Nothing = how != records.MatchesNow
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

func nothingMatches(op string) *broker.Error {
	return broker.Errorf(broker.NotFound, op, "the selector matches nothing that is open or alive, and no step that can still be taken").
		With(broker.CodeSelectorEmpty).Lacks("check its spelling; pawl chain list shows what there is", "selector")
}

// existing gives the revocation whose mark is in force, when that is as hard as what is asked for.
func existing(tx *records.Tx, mark *broker.Fence, freeze bool) (rv broker.Revocation, exists bool, err error) {
	if mark == nil || mark.Frozen && !freeze {
		return broker.Revocation{}, false, nil
	}
	rv, exists, err = tx.Revocation(mark.Revocation)
	rv.Repeated = exists
	return rv, exists, err
}

func (e *Engine) fenceNode(tx *records.Tx, f fencing, rv broker.Revocation, entry broker.Entry) (broker.Revocation, error) {
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

func (e *Engine) fenceGrant(tx *records.Tx, f fencing, rv broker.Revocation, entry broker.Entry) (broker.Revocation, error) {
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

// targetOf finds the one node or grant that a selector names; the zero target exists for a rule.
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
