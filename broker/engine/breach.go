package engine

import (
	"cmp"
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// breach is one violation of policy, noticed by the broker or reported to it, with the consequence that policy
// attaches to it. Every violation goes through [Broker.applyConsequence], so that none of them can forget a step.
type breach struct {
	op       string // the procedure that found it
	code     broker.ViolationCode
	actor    string          // of the audit entry: who broke policy, or who reported it
	lineage  records.Lineage // where in the tree; without nodes: the chain was still to be opened
	tool     broker.ToolName
	decision broker.Decision // of policy: the consequence, and the policies that decided it
	freeze   spiffeid.ID     // the caller that freeze-caller freezes
	now      time.Time

	// grant is the step in which policy was broken. Empty: none in particular, and revoke-step ends everything below
	// the records.Lineage's leaf.
	grant broker.GrantID
	// noSecret says that the step in question left no secret alive: it was refused, or has ended. revoke-step then
	// has nothing to fence.
	noSecret bool

	by     string                                   // of the revocation; empty: "pawl"
	reason string                                   // of the revocation; empty: "violation: " and the code
	detail string                                   // of the audit entry; empty: the consequence
	record func(*records.Tx) (stop bool, err error) // further changes of the same transaction, before all others; nil: none
}

// applyConsequence records a violation and carries out its consequence. The audit entry, the fence and the freeze are
// one transaction; ending what the fence covers follows in the background. It gives the revocation, the zero one
// when nothing was revoked.
//
// When the outcome of the commit is unknown, the fence may be in the ledger, and the requester may never ask again.
// So the error is returned and the revocation is carried out nevertheless, if it exists.
func (e *Engine) applyConsequence(ctx context.Context, v breach) (broker.Revocation, error) {
	entry := broker.Entry{At: v.now, Actor: v.actor, Op: broker.OpViolation, Chain: v.lineage.Chain.ID, Grant: v.grant, Tool: v.tool,
		Policies: v.decision.Policies, Code: broker.Code(v.code), Detail: cmp.Or(v.detail, v.decision.Consequence.String())}
	if len(v.lineage.Nodes) > 0 {
		entry.Delegation = v.lineage.Leaf().ID
	}
	f := fencing{by: cmp.Or(v.by, "pawl"), reason: cmp.Or(v.reason, "violation: "+string(v.code)), now: v.now}
	var fences bool
	f.target, fences = v.target()
	var fenced, frozen broker.Revocation
	err := e.update(ctx, v.op, func(tx *records.Tx) (err error) {
		fenced, frozen = broker.Revocation{}, broker.Revocation{}
		if v.record != nil {
			if stop, err := v.record(tx); stop || err != nil {
				return err
			}
		}
		if _, err = tx.Enter(entry); err != nil {
			return err
		}
		if fences {
			if fenced, err = e.fence(tx, f); err != nil {
				return err
			}
		}
		if v.decision.Consequence == broker.ConsequenceFreezeCaller {
			frozen, err = e.fence(tx, fencing{by: f.by, selector: "spiffe:" + v.freeze.String(), freeze: true, reason: f.reason, now: v.now})
		}
		return err
	})
	if err != nil {
		e.reconcileUnconfirmed(fenced, err)
		return broker.Revocation{}, err
	}
	if fenced.ID == "" {
		return frozen, nil
	}
	e.reconcile(fenced)
	return fenced, nil
}

// target is what the consequence fences; ok is false when it fences nothing.
func (v breach) target() (t target, ok bool) {
	if len(v.lineage.Nodes) == 0 {
		return target{}, false
	}
	switch consequence := v.decision.Consequence; {
	case consequence >= broker.ConsequenceRevokeChain:
		return target{node: v.lineage.Root().ID}, true
	case consequence == broker.ConsequenceRevokeSubtree:
		return target{node: v.lineage.Leaf().ID}, true
	case consequence == broker.ConsequenceDeny || v.noSecret:
		return target{}, false
	case v.grant != "":
		return target{grant: v.grant}, true
	}
	return target{node: v.lineage.Leaf().ID}, true
}

// refuseBreach applies the consequence of a breach by a request that is refused with e, and gives e with the revocation in it.
// When the ledger fails, the request is refused all the same: with e where nothing was to be fenced.
func (e *Engine) refuseBreach(ctx context.Context, v breach, refusal *broker.Error) error {
	rv, err := e.applyConsequence(ctx, v)
	switch {
	case err != nil && v.decision.Consequence == broker.ConsequenceDeny:
		e.cfg.Alarm("recording a violation", err)
	case err != nil:
		e.cfg.Alarm("fencing after a violation", err)
		return err
	}
	refusal.Revocation = rv.ID
	return refusal
}

// violationQuestion asks policy for the consequence of a breach.
func violationQuestion(c broker.Caller, l records.Lineage, v broker.ViolationCode, t broker.Tool, now time.Time) broker.Question {
	return broker.Question{Action: broker.ActionReport, Caller: c, Violation: v, Tool: t, Chain: l.Chain, Depth: max(len(l.Nodes)-1, 0), Now: now}
}
