package engine

import (
	"context"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Report takes a violation from a reporter: a holder of a delegation in the chain, or whoever
// policy lets report. What follows is policy's to say.
//
// Errors: Malformed, Unauthenticated, NotFound, Denied, Unavailable.
func (b *Engine) Report(ctx context.Context, c broker.Caller, r broker.ReportRequest) (broker.Reported, error) {
	const op = "report"
	now := b.cfg.Now()
	if err := c.Check(op, now); err != nil {
		return broker.Reported{}, err
	}
	if args.CheckName(string(r.Violation)) != nil {
		return broker.Reported{}, broker.Errorf(broker.Malformed, op, "a violation's code is lower-case letters, digits and underscores, at most 64")
	}
	if err := checkText(op, "detail", r.Detail, 0, broker.MaxTask); err != nil {
		return broker.Reported{}, err
	}
	var p records.Lineage
	var g broker.Grant
	err := b.view(ctx, op, func(tx *records.Tx) (err error) {
		if p, err = tx.Lineage(op, r.Delegation); err != nil || r.Grant == "" {
			return err
		}
		var ok bool
		if g, ok, err = tx.Grant(r.Grant); err == nil && (!ok || g.Delegation != r.Delegation) {
			err = records.UnknownGrant(op)
		}
		return err
	})
	if err != nil {
		return broker.Reported{}, err
	}
	if p.Leaf().Holder == c.ID {
		b.watchdog.BeatAgain(r.Delegation, now)
	}
	policy := b.cfg.Policy()
	t, _ := policy.Tool(g.Tool) // the zero Tool when the report names no grant
	d := policy.Decide(violationQuestion(c, p, r.Violation, t, now))
	if !d.Allow {
		if !p.Holds(c) {
			return broker.Reported{}, b.denied(ctx, c, p, "", records.UnknownDelegation(op))
		}
		// A holder may stop its own chain, and nobody beyond it: otherwise an agent could pass a
		// little on to another one and have that frozen everywhere.
		d.Consequence = min(d.Consequence, broker.ConsequenceRevokeChain)
	}
	rv, err := b.applyConsequence(ctx, breach{op: op, code: r.Violation, actor: c.ID.String(), path: p, tool: g.Tool, grant: r.Grant,
		decision: d, freeze: p.Leaf().Holder, by: c.ID.String(), reason: "reported: " + string(r.Violation), detail: r.Detail, now: now})
	if err != nil {
		return broker.Reported{}, err
	}
	return broker.Reported{Consequence: d.Consequence, Revocation: rv.ID}, nil
}
