package engine

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/volatile"
)

// breach is one violation of policy with the consequence that policy attaches to it. The broker notices it, or a
// reporter reports it. Every violation goes through [Engine.applyConsequence], so that all are recorded and fenced
// alike.
type breach struct {
	op       string // the procedure that found it
	code     broker.ViolationCode
	actor    string          // of the audit entry: the violator or the reporter
	lineage  records.Lineage // of the delegation; without nodes: the request would have opened the chain
	tool     broker.ToolName
	decision broker.Decision // of policy: the consequence, and the policies that decided it
	freeze   spiffeid.ID     // the caller that freeze-caller freezes
	now      time.Time

	// grant is the step that broke policy. Empty: no particular step, and revoke-step fences the lineage's leaf.
	grant broker.GrantID
	// noSecret: the step has no live secret, because it was refused or has ended. revoke-step then fences nothing.
	noSecret bool

	by     string // of the revocation; empty: "pawl"
	reason string // of the revocation; empty: "violation: " and the code
	detail string // of the audit entry; empty: the consequence
	// record makes further changes in the same transaction, before all others. stop: make no others. Nil: none.
	record func(*records.Tx) (stop bool, err error)
}

// applyConsequence records a violation and applies its consequence. The audit entry, the fence and the freeze are one
// transaction. The fenced grants end in the background. It returns the revocation, or the zero Revocation when the
// consequence revokes nothing.
//
// When the outcome of the commit is unknown, the fence may be in the ledger, and the requester may never ask again. So
// it returns the error and reconciles the revocation nevertheless, if it exists.
func (e *Engine) applyConsequence(ctx context.Context, v breach) (broker.Revocation, error) {
	entry := broker.Entry{At: v.now, Actor: v.actor, Op: broker.OpViolation, Chain: v.lineage.Chain.ID, Grant: v.grant,
		Tool: v.tool, Policies: v.decision.Policies, Code: broker.Code(v.code),
		Detail: cmp.Or(v.detail, v.decision.Consequence.String())}
	if len(v.lineage.Nodes) > 0 {
		entry.Delegation = v.lineage.Leaf().ID
	}
	repeated := v.record == nil && !e.refusals.Record(entry)
	f := fencing{by: cmp.Or(v.by, "pawl"), reason: cmp.Or(v.reason, "violation: "+string(v.code)), now: v.now}
	var fences bool
	f.target, fences = v.target()
	var fenced, frozen broker.Revocation
	if fences || v.decision.Consequence == broker.ConsequenceFreezeCaller {
		ctx = broker.Urgent(ctx)
	}
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
			frozen, err = e.fence(tx, fencing{by: f.by, selector: "spiffe:" + v.freeze.String(), freeze: true,
				reason: f.reason, now: v.now})
		}
		if err == nil && repeated && !fenced.Fenced.Equal(v.now) && !frozen.Fenced.Equal(v.now) {
			return volatile.ErrRepeated // it has no new effect, so there is nothing to record
		}
		return err
	})
	if errors.Is(err, volatile.ErrRepeated) {
		err = e.refusals.Repeated(v.op, entry)
	}
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

// target returns the node or grant that the consequence fences; ok is false when it fences none.
func (v breach) target() (t target, ok bool) {
	if len(v.lineage.Nodes) == 0 {
		return target{}, false
	}
	switch consequence := v.decision.Consequence; {
	case v.code == broker.ViolationHolder && consequence == broker.ConsequenceFreezeCaller:
		return target{}, false // the violator is not in the chain
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

// refuseBreach applies the consequence of a breach and returns the refusal of its request, with the revocation in it.
// When the ledger fails, it returns the ledger's error if there was something to fence, and else the refusal.
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

// violationQuestion is the question to policy for the consequence of a breach.
func violationQuestion(c broker.Caller, l records.Lineage, v broker.ViolationCode, t broker.Tool, now time.Time,
) broker.Question {
	return broker.Question{Action: broker.ActionReport, Caller: c, Violation: v, Tool: t, Chain: l.Chain, Depth: l.Depth(),
		Now: now}
}
