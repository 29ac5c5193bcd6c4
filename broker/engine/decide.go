package engine

import (
	"cmp"
	"context"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// permit asks policy about one tool; anything but an allow is recorded and returned as the
// error, and what policy wants to follow has followed.
func (e *Engine) permit(ctx context.Context, op string, policy broker.Policy, q broker.Question, tool broker.ToolName, l records.Lineage) (broker.Decision, error) {
	t, known := policy.Tool(tool)
	if !known {
		return broker.Decision{}, e.recordDenial(ctx, q.Caller, l, tool, broker.Errorf(broker.Denied, op, "there is no tool %q", tool).
			With(broker.CodeToolUnknown).Lacks("ask the platform team which tools there are", "tool:"+string(tool)))
	}
	q.Tool = t
	d := policy.Decide(q)
	if d.Allow && !d.Failed {
		return d, nil
	}
	return broker.Decision{}, e.refuseForbidden(ctx, op, q, d, l)
}

// forbidden turns a deny into its error and carries out its consequence.
func (e *Engine) refuseForbidden(ctx context.Context, op string, q broker.Question, d broker.Decision, l records.Lineage) error {
	refusal := policyDenied(op, q, d)
	if d.Consequence == broker.ConsequenceDeny {
		return e.recordDenial(ctx, q.Caller, l, q.Tool.Name, refusal)
	}
	return e.refuseBreach(ctx, breach{op: op, code: broker.ViolationForbidden, actor: q.Caller.ID.String(), lineage: l, tool: q.Tool.Name,
		decision: d, freeze: q.Caller.ID, noSecret: true, now: e.cfg.Now()}, refusal.With(broker.CodeViolation))
}

func policyDenied(op string, q broker.Question, d broker.Decision) *broker.Error {
	return broker.Errorf(broker.Denied, op, "policy does not allow %q to %s tool %q like this", q.Caller.ID, q.Action, q.Tool.Name).
		With(broker.CodePolicyDenied).Decided(d.Policies).
		Lacks(cmp.Or(d.Remedy, "pawl explain says which policies were looked at; ask their owners"), "tool:"+string(q.Tool.Name)+":"+string(q.Action))
}

// refuseCanary refuses whoever reaches for a canary among tools, before anything else is said. The answer
// must not tell what the tool is: it is otherwise, what is wrong with the request anyhow, or that of
// a policy without a permit.
func (e *Engine) refuseCanary(ctx context.Context, op string, policy broker.Policy, q broker.Question, l records.Lineage, otherwise *broker.Error, tools ...broker.ToolName) error {
	for _, name := range tools {
		t, _ := policy.Tool(name)
		if !t.Canary {
			continue
		}
		q.Tool = t
		refusal := cmp.Or(otherwise, policyDenied(op, q, broker.Decision{}))
		d := policy.Decide(violationQuestion(q.Caller, l, broker.ViolationCanary, t, q.Now))
		err := e.refuseBreach(ctx, breach{op: op, code: broker.ViolationCanary, actor: q.Caller.ID.String(), lineage: l, tool: name,
			decision: d, freeze: q.Caller.ID, noSecret: true, now: e.cfg.Now()}, refusal)
		refusal.Revocation = ""
		return err
	}
	return nil
}

// denied records a refusal and gives it back. A refusal stands when it cannot be recorded.
func (e *Engine) recordDenial(ctx context.Context, c broker.Caller, l records.Lineage, tool broker.ToolName, refusal *broker.Error) error {
	entry := broker.Entry{At: e.cfg.Now(), Actor: c.ID.String(), Op: broker.OpDenied, Chain: l.Chain.ID, Tool: tool,
		Code: refusal.Code, Policies: refusal.Policies, Detail: refusal.Op}
	if len(l.Nodes) > 0 {
		entry.Delegation = l.Leaf().ID
	}
	if err := e.update(ctx, refusal.Op, func(tx *records.Tx) error { _, err := tx.Enter(entry); return err }); err != nil {
		e.cfg.Alarm("recording a denial", err)
	}
	return refusal
}

// violated asks policy for the consequence of a breach that the broker noticed in a request, applies it, and refuses the request with e.
func (e *Engine) refuseViolation(ctx context.Context, c broker.Caller, l records.Lineage, v broker.ViolationCode, tool broker.ToolName, refusal *broker.Error) error {
	policy, now := e.cfg.Policy(), e.cfg.Now()
	t, _ := policy.Tool(tool) // the zero Tool when it is not known
	d := policy.Decide(violationQuestion(c, l, v, t, now))
	// Presenting another caller's delegation is a replay, whether policy names a consequence or not: responders
	// search for violations.
	if d.Consequence == broker.ConsequenceDeny && v != broker.ViolationHolder {
		return e.recordDenial(ctx, c, l, tool, refusal)
	}
	if d.Consequence > broker.ConsequenceDeny {
		refusal.Code = broker.CodeViolation
	}
	return e.refuseBreach(ctx, breach{op: refusal.Op, code: v, actor: c.ID.String(), lineage: l, tool: tool, decision: d, freeze: c.ID, noSecret: true, now: now}, refusal)
}
