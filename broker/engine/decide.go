package engine

import (
	"cmp"
	"context"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// permit asks policy about one tool; anything but an allow is recorded and returned as the
// error, and what policy wants to follow has followed.
func (b *Engine) permit(ctx context.Context, op string, policy broker.Policy, q broker.Question, tool broker.ToolName, p records.Lineage) (broker.Decision, error) {
	t, known := policy.Tool(tool)
	if !known {
		return broker.Decision{}, b.denied(ctx, q.Caller, p, tool, broker.Errorf(broker.Denied, op, "there is no tool %q", tool).
			With(broker.CodeToolUnknown).Lacks("ask the platform team which tools there are", "tool:"+string(tool)))
	}
	q.Tool = t
	d := policy.Decide(q)
	if d.Allow && !d.Failed {
		return d, nil
	}
	return broker.Decision{}, b.forbidden(ctx, op, q, d, p)
}

// forbidden turns a deny into its error and carries out its consequence.
func (b *Engine) forbidden(ctx context.Context, op string, q broker.Question, d broker.Decision, p records.Lineage) error {
	e := policyDenied(op, q, d)
	if d.Consequence == broker.ConsequenceDeny {
		return b.denied(ctx, q.Caller, p, q.Tool.Name, e)
	}
	return b.refuseBreach(ctx, breach{op: op, code: broker.ViolationForbidden, actor: q.Caller.ID.String(), path: p, tool: q.Tool.Name,
		decision: d, freeze: q.Caller.ID, noSecret: true, now: b.cfg.Now()}, e.With(broker.CodeViolation))
}

func policyDenied(op string, q broker.Question, d broker.Decision) *broker.Error {
	return broker.Errorf(broker.Denied, op, "policy does not allow %q to %s tool %q like this", q.Caller.ID, q.Action, q.Tool.Name).
		With(broker.CodePolicyDenied).Decided(d.Policies).
		Lacks(cmp.Or(d.Remedy, "pawl explain says which policies were looked at; ask their owners"), "tool:"+string(q.Tool.Name)+":"+string(q.Action))
}

// refuseCanary refuses whoever reaches for a canary among tools, before anything else is said. The answer
// must not tell what the tool is: it is otherwise, what is wrong with the request anyhow, or that of
// a policy without a permit.
func (b *Engine) refuseCanary(ctx context.Context, op string, policy broker.Policy, q broker.Question, p records.Lineage, otherwise *broker.Error, tools ...broker.ToolName) error {
	for _, name := range tools {
		t, _ := policy.Tool(name)
		if !t.Canary {
			continue
		}
		q.Tool = t
		e := cmp.Or(otherwise, policyDenied(op, q, broker.Decision{}))
		d := policy.Decide(violationQuestion(q.Caller, p, broker.ViolationCanary, t, q.Now))
		err := b.refuseBreach(ctx, breach{op: op, code: broker.ViolationCanary, actor: q.Caller.ID.String(), path: p, tool: name,
			decision: d, freeze: q.Caller.ID, noSecret: true, now: b.cfg.Now()}, e)
		e.Revocation = ""
		return err
	}
	return nil
}

// denied records a refusal and gives it back. A refusal stands when it cannot be recorded.
func (b *Engine) denied(ctx context.Context, c broker.Caller, p records.Lineage, tool broker.ToolName, e *broker.Error) error {
	entry := broker.Entry{At: b.cfg.Now(), Actor: c.ID.String(), Op: broker.OpDenied, Chain: p.Chain.ID, Tool: tool,
		Code: e.Code, Policies: e.Policies, Detail: e.Op}
	if len(p.Nodes) > 0 {
		entry.Delegation = p.Leaf().ID
	}
	if err := b.update(ctx, e.Op, func(tx *records.Tx) error { _, err := tx.Enter(entry); return err }); err != nil {
		b.cfg.Alarm("recording a denial", err)
	}
	return e
}

// violated asks policy for the consequence of a breach that the broker noticed in a request, applies it, and refuses the request with e.
func (b *Engine) violated(ctx context.Context, c broker.Caller, p records.Lineage, v broker.ViolationCode, tool broker.ToolName, e *broker.Error) error {
	policy, now := b.cfg.Policy(), b.cfg.Now()
	t, _ := policy.Tool(tool) // the zero Tool when it is not known
	d := policy.Decide(violationQuestion(c, p, v, t, now))
	// Presenting another caller's delegation is a replay, whether policy names a consequence or not: responders
	// search for violations.
	if d.Consequence == broker.ConsequenceDeny && v != broker.ViolationHolder {
		return b.denied(ctx, c, p, tool, e)
	}
	if d.Consequence > broker.ConsequenceDeny {
		e.Code = broker.CodeViolation
	}
	return b.refuseBreach(ctx, breach{op: e.Op, code: v, actor: c.ID.String(), path: p, tool: tool, decision: d, freeze: c.ID, noSecret: true, now: now}, e)
}
