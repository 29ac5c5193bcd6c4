package engine

import (
	"context"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/requests"
)

// Report records a violation and applies the consequence that policy attaches to it. The reporter is a holder of the
// delegation or of one of its ancestors, or a caller that policy allows to report.
//
// Errors: Malformed, Unauthenticated, NotFound, Denied, Unavailable.
func (e *Engine) Report(ctx context.Context, c broker.Caller, r broker.ReportRequest) (broker.Reported, error) {
	const op = "report"
	now := e.cfg.Now()
	if err := c.Check(op, now); err != nil {
		return broker.Reported{}, err
	}
	if args.CheckName(string(r.Violation)) != nil {
		return broker.Reported{}, broker.Errorf(broker.Malformed, op,
			"a violation's code is lower-case letters, digits and underscores, at most 64")
	}
	if err := requests.CheckText(op, "detail", r.Detail, 0, broker.MaxTask); err != nil {
		return broker.Reported{}, err
	}
	var l records.Lineage
	var g broker.Grant
	var unknown *broker.Error
	err := e.view(ctx, op, func(tx *records.Tx) (err error) {
		if l, err = tx.Lineage(op, r.Delegation); err != nil || r.Grant == "" {
			return err
		}
		var ok bool
		if g, ok, err = tx.Grant(r.Grant); err == nil && (!ok || g.Delegation != r.Delegation) {
			g, unknown = broker.Grant{}, records.UnknownGrant(op)
		}
		return err
	})
	if isUnknown(err) {
		return broker.Reported{}, e.recordDenial(ctx, c, l, "", records.UnknownDelegation(op))
	}
	if err != nil {
		return broker.Reported{}, err
	}
	if l.Leaf().Holder == c.ID {
		e.watchdog.BeatAgain(r.Delegation, now)
	}
	policy := e.cfg.Policy()
	t, _ := policy.Tool(g.Tool) // the zero Tool when the report names no grant
	d := policy.Decide(violationQuestion(c, l, r.Violation, t, now))
	if !d.Allow {
		if !l.Holds(c) {
			return broker.Reported{}, e.recordDenial(ctx, c, l, "", records.UnknownDelegation(op))
		}
		// A holder without a permit may stop its own chain only. Otherwise an agent could delegate to another workload
		// and then freeze it everywhere.
		d.Consequence = min(d.Consequence, broker.ConsequenceRevokeChain)
	}
	if unknown != nil {
		return broker.Reported{}, unknown
	}
	rv, err := e.applyConsequence(ctx, breach{op: op, code: r.Violation, actor: c.ID.String(), lineage: l, tool: g.Tool,
		grant: r.Grant, decision: d, freeze: l.Leaf().Holder, by: c.ID.String(),
		reason: "reported: " + string(r.Violation), detail: r.Detail, now: now})
	if err != nil {
		return broker.Reported{}, err
	}
	return broker.Reported{Consequence: d.Consequence, Revocation: rv.ID}, nil
}
