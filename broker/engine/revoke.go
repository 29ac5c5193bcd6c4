package engine

import (
	"context"
	"time"

	"github.com/pawlsec/pawl/broker"
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
	look                 bool // say of a rule whether anything falls under it, and refuse a final one without sense
}

// fence is step 1 of revoke, inside the caller's transaction: one mark, whatever hangs below. Where the
// same stands already, or a final mark where a freeze is asked for, nothing is written and the revocation
// that stands is given: neither a thief who tries again nor a signal that is repeated makes the ledger grow.
func (b *Engine) fence(tx broker.Tx, f fencing) (broker.Revocation, error) {
	id, err := b.newID("rv")
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
		return b.fenceNode(tx, f, rv, entry)
	case f.target.grant != "":
		return b.fenceGrant(tx, f, rv, entry)
	}
	return b.fenceRule(tx, f, rv, entry)
}

// fenceRule writes a rule. There is one of each kind for a selector: a final rule is about the chains that
// were open when it was written, so a repeated one takes the place of the first when there are others now.
func (b *Engine) fenceRule(tx broker.Tx, f fencing, rv broker.Revocation, entry broker.Entry) (broker.Revocation, error) {
	s, err := selector.Parse(f.selector)
	if err != nil {
		return broker.Revocation{}, broker.Errorf(broker.Malformed, "revoke", "%v", err)
	}
	first, err := b.sameRule(tx, s.String(), f.freeze)
	if err != nil {
		return broker.Revocation{}, err
	}
	mark := broker.Fence{At: f.now, Revocation: rv.ID, Frozen: f.freeze}
	if f.freeze && first != nil {
		rv, _, err := alreadyBy(tx, first, true)
		return rv, err
	}
	var since time.Time
	if first != nil {
		since = first.At
	}
	if f.look {
		how, err := b.reachOf(tx, queryFence{Fence: mark, Selector: s.String(), selector: s}, since, f.now)
		if err != nil {
			return broker.Revocation{}, err
		}
		if how == reachNothing && first != nil {
			rv, _, err := alreadyBy(tx, first, false)
			return rv, err
		}
		if how == reachNothing && !f.freeze {
			return broker.Revocation{}, matchesNothing("revoke")
		}
		rv.Nothing = how != reachNow
	}
	if rv.Revision, err = enter(tx, entry); err != nil {
		return broker.Revocation{}, err
	}
	if first != nil {
		if err := tx.Put(keyRule(first.Revocation), nil); err != nil {
			return broker.Revocation{}, err
		}
	}
	mark.Generation = rv.Revision
	if err := save(tx, keyRule(rv.ID), queryFence{Fence: mark, Selector: s.String()}); err != nil {
		return broker.Revocation{}, err
	}
	return rv, save(tx, keyRevocation(rv.ID), rv)
}

func matchesNothing(op string) *broker.Error {
	return broker.Errorf(broker.NotFound, op, "the selector matches nothing that is open or alive, and no step that can still be taken").
		With(broker.CodeSelectorEmpty).Lacks("check its spelling; pawl chain list shows what there is", "selector")
}

// sameRule gives the mark of the rule in force with this selector and of this kind.
func (b *Engine) sameRule(tx broker.Tx, selector string, freeze bool) (*broker.Fence, error) {
	rules, err := b.rules.read(tx)
	for i := range rules {
		if rules[i].Selector == selector && rules[i].Fence.Frozen == freeze {
			return &rules[i].Fence, err
		}
	}
	return nil, err
}

// alreadyBy gives the revocation whose mark is in force, when that is as hard as what is asked for.
func alreadyBy(tx broker.Tx, mark *broker.Fence, freeze bool) (rv broker.Revocation, stands bool, err error) {
	if mark == nil || mark.Frozen && !freeze {
		return broker.Revocation{}, false, nil
	}
	rv, stands, err = load[broker.Revocation](tx, keyRevocation(mark.Revocation))
	rv.Repeated = stands
	return rv, stands, err
}

func (b *Engine) fenceNode(tx broker.Tx, f fencing, rv broker.Revocation, entry broker.Entry) (broker.Revocation, error) {
	d, ok, err := load[broker.Delegation](tx, keyDelegation(f.target.node))
	if err != nil {
		return broker.Revocation{}, err
	}
	if !ok {
		return broker.Revocation{}, unknownDelegation("revoke")
	}
	if old, stands, err := alreadyBy(tx, d.Fence, f.freeze); err != nil || stands {
		return old, err
	}
	rv.Chain, rv.Node = d.Chain, d.ID
	if rv.Selector == "" {
		rv.Selector = "subtree:" + string(d.ID)
	}
	entry.Chain, entry.Delegation = d.Chain, d.ID
	if rv.Revision, err = enter(tx, entry); err != nil {
		return broker.Revocation{}, err
	}
	d.Fence = &broker.Fence{Generation: rv.Revision, At: f.now, Revocation: rv.ID, Frozen: f.freeze}
	if err := save(tx, keyDelegation(d.ID), d); err != nil {
		return broker.Revocation{}, err
	}
	return rv, save(tx, keyRevocation(rv.ID), rv)
}

func (b *Engine) fenceGrant(tx broker.Tx, f fencing, rv broker.Revocation, entry broker.Entry) (broker.Revocation, error) {
	g, ok, err := load[broker.Grant](tx, keyGrant(f.target.grant))
	if err != nil {
		return broker.Revocation{}, err
	}
	if !ok {
		return broker.Revocation{}, unknownGrant("revoke")
	}
	if old, stands, err := alreadyBy(tx, g.Fence, f.freeze); err != nil || stands {
		return old, err
	}
	rv.Chain, rv.Grant = g.Chain, g.ID
	if rv.Selector == "" {
		rv.Selector = "grant:" + string(g.ID)
	}
	entry.Chain, entry.Delegation, entry.Grant, entry.Tool = g.Chain, g.Delegation, g.ID, g.Tool
	if rv.Revision, err = enter(tx, entry); err != nil {
		return broker.Revocation{}, err
	}
	g.Fence = &broker.Fence{Generation: rv.Revision, At: f.now, Revocation: rv.ID, Frozen: f.freeze}
	if err := save(tx, keyGrant(g.ID), g); err != nil {
		return broker.Revocation{}, err
	}
	if !f.freeze {
		if err := tx.Put(keyCut(g.Delegation, g.ID), []byte{}); err != nil {
			return broker.Revocation{}, err
		}
	}
	return rv, save(tx, keyRevocation(rv.ID), rv)
}

// Revoke fences what the selector means and returns: from then on nothing under it is handed
// out. Cutting and proving go on in the background; [Broker.Revocation] tells how far they are.
// With Freeze nothing is cut and an operator can lift it. A command that stands already is answered with
// its revocation, Repeated.
//
// A final rule is about what is open: one that matches nothing open, and no step that can still be taken, is
// refused with CodeSelectorEmpty. A freeze by a rule is about later chains as well; Nothing says that it covers
// nothing yet.
//
// A leaked value that is a canary's was handed out by no grant: it is recorded as touched, and the answer is the
// revocation that policy has follow; where none does, NotFound with CodeCanaryValue.
//
// Errors: Malformed, Unauthenticated, NotFound, Conflict (the plan is stale), Unavailable.
func (b *Engine) Revoke(ctx context.Context, o broker.Operator, r selector.Request) (broker.Revocation, error) {
	const op = "revoke"
	if err := o.Check(op); err != nil {
		return broker.Revocation{}, err
	}
	if err := checkText(op, "reason", r.Reason, 1, broker.MaxTask); err != nil {
		return broker.Revocation{}, err
	}
	if rv, canary, err := b.touchedBy(ctx, o, r.Selector); canary {
		return rv, err
	}
	var plan *compared
	if r.Plan != "" {
		var err error
		if plan, err = b.comparePlan(ctx, r); err != nil {
			return broker.Revocation{}, err
		}
	}
	f := fencing{by: o.Name, reason: r.Reason, selector: r.Selector.String(), freeze: r.Freeze, now: b.cfg.Now(), look: true}
	var rv broker.Revocation
	err := b.update(ctx, op, func(tx broker.Tx) (err error) {
		if f.target, err = resolve(tx, r.Selector); err != nil {
			return err
		}
		if plan != nil {
			if err := b.grown(tx, plan); err != nil {
				return err
			}
		}
		rv, err = b.fence(tx, f)
		return err
	})
	if broker.KindOf(err) == broker.Unavailable {
		b.pursueUnsure(rv, err)
		return broker.Revocation{}, b.cutUnrecorded(ctx, r, f, err)
	}
	if err != nil {
		return broker.Revocation{}, err
	}
	b.pursue(rv)
	return rv, nil
}

// cutUnrecorded does what can be done when the ledger takes no fence: issuing has stopped with
// it, so that what is known is all there is, and it is cut now (revoking works when everything
// else is broken). The command must be repeated, since nothing keeps the fence.
func (b *Engine) cutUnrecorded(ctx context.Context, r selector.Request, f fencing, cause error) error {
	if r.Freeze {
		return cause
	}
	clean, cancel := after(ctx, 30*time.Second)
	defer cancel()
	var grants []broker.Grant
	var nodes []broker.Delegation
	err := b.view(clean, "revoke", func(tx broker.Tx) (err error) {
		if f.target, err = resolve(tx, r.Selector); err != nil {
			return err
		}
		grants, nodes, err = b.under(tx, broker.Revocation{Selector: f.selector, Node: f.target.node, Grant: f.target.grant, Fenced: f.now})
		return err
	})
	if err != nil {
		return cause
	}
	failed := b.cutNow(clean, grants, nodes)
	return broker.Errorf(broker.Unavailable, "revoke", "the ledger takes no fence: %d secrets known to it were cut without a record, %d calls failed; nothing keeps later ones from being handed out once the ledger is back", len(grants), failed).
		With(broker.CodeLedgerDown).Because(cause).Lacks("repeat the command until it is acknowledged", "ledger")
}

// cutNow severs and kills without looking at the ledger, and gives how many calls failed.
func (b *Engine) cutNow(ctx context.Context, grants []broker.Grant, nodes []broker.Delegation) (failed int) {
	by := map[string][]broker.Grant{}
	var tokens []broker.Handle
	for _, d := range nodes {
		tokens = append(tokens, d.Tokens...)
	}
	for _, g := range grants {
		by[g.Backend] = append(by[g.Backend], g)
		if g.Token.Accessor != "" {
			tokens = append(tokens, g.Token)
		}
	}
	for name, cut := range by {
		if s, ok := b.cfg.Backends[name].(broker.Severer); ok && s.Sever(ctx, cut) != nil {
			failed++
		}
	}
	for _, t := range tokens {
		if b.cfg.Vault.Kill(ctx, t.Accessor) != nil {
			failed++
		}
	}
	return failed
}

// resolve finds the one node or grant that a selector names; the zero target stands for a rule.
func resolve(tx broker.Tx, s selector.Selector) (target, error) {
	chain, node, grant, ok := s.Target()
	if !ok {
		return target{}, nil
	}
	if chain != "" {
		c, known, err := load[broker.Chain](tx, keyChain(chain))
		if err == nil && !known {
			err = broker.Errorf(broker.NotFound, "revoke", "there is no chain %s", chain)
		}
		return target{node: c.Root}, err
	}
	return target{node: node, grant: grant}, nil
}

// unfreezeLifted is the detail of the entry that lifts a freeze, and not of the one that first asks for it.
const unfreezeLifted = "lifted"

// Unfreeze lifts a freeze once a second operator has asked for it; the first call records the
// first. What was revoked stays revoked.
//
// Errors: Unauthenticated, NotFound, Conflict (it is no freeze, or is lifted), Denied with
// CodeSecondPerson after the first call.
func (b *Engine) Unfreeze(ctx context.Context, o broker.Operator, id broker.RevocationID) (rv broker.Revocation, err error) {
	const op = "unfreeze"
	if err := o.Check(op); err != nil {
		return broker.Revocation{}, err
	}
	second := false
	err = b.update(ctx, op, func(tx broker.Tx) error {
		var ok bool
		if rv, ok, err = load[broker.Revocation](tx, keyRevocation(id)); err != nil || !ok {
			return orUnknownRevocation(op, err)
		}
		if !rv.Freeze || rv.Lifted {
			return broker.Errorf(broker.Conflict, op, "%s is not a freeze that is in force", id)
		}
		if second = rv.Unfreezer != "" && rv.Unfreezer != o.Name; !second {
			rv.Unfreezer = o.Name
		} else if err := b.lift(tx, &rv); err != nil {
			return err
		}
		if _, err := enter(tx, broker.Entry{At: b.cfg.Now(), Actor: o.Name, Op: broker.OpUnfreeze, Chain: rv.Chain, Delegation: rv.Node,
			Grant: rv.Grant, Revocation: id, Detail: map[bool]string{false: "asked for", true: unfreezeLifted}[second]}); err != nil {
			return err
		}
		return save(tx, keyRevocation(id), rv)
	})
	if err == nil && !second {
		err = broker.Errorf(broker.Denied, op, "recorded; a second operator must ask for the same").With(broker.CodeSecondPerson).
			Lacks("another operator repeats this command", "operator")
	}
	return rv, err
}

// lift takes a freeze's mark away where it is still that freeze's.
func (b *Engine) lift(tx broker.Tx, rv *broker.Revocation) error {
	rv.Lifted, rv.Settled = true, b.cfg.Now()
	switch {
	case rv.Node != "":
		d, _, err := load[broker.Delegation](tx, keyDelegation(rv.Node))
		if err != nil || d.Fence == nil || d.Fence.Revocation != rv.ID {
			return err
		}
		d.Fence = nil
		return save(tx, keyDelegation(d.ID), d)
	case rv.Grant != "":
		g, _, err := load[broker.Grant](tx, keyGrant(rv.Grant))
		if err != nil || g.Fence == nil || g.Fence.Revocation != rv.ID {
			return err
		}
		g.Fence = nil
		return save(tx, keyGrant(g.ID), g)
	}
	return tx.Put(keyRule(rv.ID), nil)
}

func orUnknownRevocation(op string, err error) error {
	if err != nil {
		return err
	}
	return broker.Errorf(broker.NotFound, op, "there is no such revocation").With(broker.CodeRevocationUnknown)
}
