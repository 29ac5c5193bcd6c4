package engine

import (
	"cmp"
	"context"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// permit asks policy about one tool. It records any decision but an allow, applies its consequence, and returns it as
// the error.
func (e *Engine) permit(ctx context.Context, op string, policy broker.Policy, q broker.Question, tool broker.ToolName,
	l records.Lineage) (broker.Decision, error) {
	t, known := policy.Tool(tool)
	if !known {
		return broker.Decision{}, e.recordDenial(ctx, q.Caller, l, tool,
			broker.Errorf(broker.Denied, op, "there is no tool %q", tool).With(broker.CodeToolUnknown).
				Lacks("ask the platform team which tools exist", "tool:"+string(tool)))
	}
	q.Tool = t
	d := policy.Decide(q)
	if d.Allow && !d.Failed {
		return d, nil
	}
	return broker.Decision{}, e.refuseForbidden(ctx, op, q, d, l)
}

// refuseForbidden records a deny, applies its consequence, and returns it as the error.
func (e *Engine) refuseForbidden(ctx context.Context, op string, q broker.Question, d broker.Decision,
	l records.Lineage) error {
	refusal := policyDenied(op, q, d)
	if d.Consequence == broker.ConsequenceDeny {
		return e.recordDenial(ctx, q.Caller, l, q.Tool.Name, refusal)
	}
	return e.refuseBreach(ctx, breach{op: op, code: broker.ViolationForbidden, actor: q.Caller.ID.String(), lineage: l,
		tool: q.Tool.Name, decision: d, freeze: q.Caller.ID, noSecret: true, now: e.cfg.Now()},
		refusal.With(broker.CodeViolation))
}

func policyDenied(op string, q broker.Question, d broker.Decision) *broker.Error {
	tool := q.Tool.Name
	return broker.Errorf(broker.Denied, op, "policy does not allow %q to %s tool %q like this",
		q.Caller.ID, q.Action, tool).With(broker.CodePolicyDenied).Decided(d.Policies).
		Lacks(cmp.Or(d.Remedy, "pawl explain lists the policies that were evaluated; ask their owners"),
			"tool:"+string(tool)+":"+string(q.Action))
}

// refuseCanary refuses a request for tools of which one is a canary, before any other check. The answer must not reveal
// the canary. It is otherwise, the refusal that the request deserves anyhow, or else that of a policy without a permit.
func (e *Engine) refuseCanary(ctx context.Context, op string, policy broker.Policy, q broker.Question,
	l records.Lineage, otherwise *broker.Error, tools ...broker.ToolName) error {
	for _, name := range tools {
		t, _ := policy.Tool(name)
		if !t.Canary {
			continue
		}
		q.Tool = t
		refusal := cmp.Or(otherwise, policyDenied(op, q, broker.Decision{}))
		d := policy.Decide(violationQuestion(q.Caller, l, broker.ViolationCanary, t, q.Now))
		err := e.refuseBreach(ctx, breach{op: op, code: broker.ViolationCanary, actor: q.Caller.ID.String(), lineage: l,
			tool: name, decision: d, freeze: q.Caller.ID, noSecret: true, now: e.cfg.Now()}, refusal)
		refusal.Revocation = ""
		e.cfg.Alarm("canary", broker.Errorf(broker.Internal, op, "%s asked for the canary tool %q: %s", q.Caller.ID, name,
			d.Consequence))
		return err
	}
	return nil
}

// recordDenial records a refusal and returns it. The request is refused even when the ledger does not record it.
func (e *Engine) recordDenial(ctx context.Context, c broker.Caller, l records.Lineage, tool broker.ToolName,
	refusal *broker.Error) error {
	entry := broker.Entry{At: e.cfg.Now(), Actor: c.ID.String(), Op: broker.OpDenied, Chain: l.Chain.ID, Tool: tool,
		Code: refusal.Code, Policies: refusal.Policies, Detail: refusal.Op}
	if len(l.Nodes) > 0 {
		entry.Delegation = l.Leaf().ID
	}
	if !e.refusals.Record(entry) {
		return refusal
	}
	err := e.update(ctx, refusal.Op, func(tx *records.Tx) error { _, err := tx.Enter(entry); return err })
	if err != nil {
		e.cfg.Alarm("recording a denial", err)
	}
	return refusal
}

// refuseViolation asks policy for the consequence of a breach that the broker noticed in a request, applies it, and
// returns the refusal.
func (e *Engine) refuseViolation(ctx context.Context, c broker.Caller, l records.Lineage, v broker.ViolationCode,
	tool broker.ToolName, refusal *broker.Error) error {
	policy, now := e.cfg.Policy(), e.cfg.Now()
	t, _ := policy.Tool(tool) // the zero Tool when it is not known
	d := policy.Decide(violationQuestion(c, l, v, t, now))
	if d.Consequence == broker.ConsequenceDeny {
		return e.recordDenial(ctx, c, l, tool, refusal)
	}
	refusal.Code = broker.CodeViolation
	return e.refuseBreach(ctx, breach{op: refusal.Op, code: v, actor: c.ID.String(), lineage: l, tool: tool, decision: d,
		freeze: c.ID, noSecret: true, now: now}, refusal)
}

// refuseStranger refuses a delegation or grant that is not the caller's. The answer is the same whether it exists or
// not, and so is what precedes the answer: one read and one durable entry. An existing one is a replay: always recorded
// as a violation, because responders search for these. [broker.ConsequenceFreezeCaller] stops the caller alone, since an
// id is no secret: whoever reads it in a log could otherwise stop its holder.
func (e *Engine) refuseStranger(ctx context.Context, c broker.Caller, l records.Lineage, tool broker.ToolName,
	unknown *broker.Error) error {
	if len(l.Nodes) == 0 {
		return e.recordDenial(ctx, c, l, tool, unknown)
	}
	policy, now := e.cfg.Policy(), e.cfg.Now()
	t, _ := policy.Tool(tool) // the zero Tool when the request names none
	if _, err := e.applyConsequence(ctx, breach{op: unknown.Op, code: broker.ViolationHolder, actor: c.ID.String(),
		lineage: l, tool: tool, decision: policy.Decide(violationQuestion(c, l, broker.ViolationHolder, t, now)),
		freeze: c.ID, noSecret: true, now: now}); err != nil {
		e.cfg.Alarm("recording a violation", err)
	}
	return unknown
}

// isStranger reports whether a delegation of which the lineage was read is unknown, or not the caller's.
func isStranger(c broker.Caller, l records.Lineage, err error) bool {
	return isUnknown(err) || len(l.Nodes) > 0 && l.Leaf().Holder != c.ID
}

// isUnknown reports whether a read found no such record.
func isUnknown(err error) bool { return broker.KindOf(err) == broker.NotFound }
