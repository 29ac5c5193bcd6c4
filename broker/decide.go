package broker

import (
	"cmp"
	"context"
	"time"
)

// permit asks policy about one tool; anything but an allow is recorded and returned as the
// error, and what policy wants to follow has followed.
func (b *Broker) permit(ctx context.Context, op string, policy Policy, q Question, tool ToolName, p path) (Decision, error) {
	t, known := policy.Tool(tool)
	if !known {
		return Decision{}, b.denied(ctx, q.Caller, p, tool, Errorf(Denied, op, "there is no tool %q", tool).
			With(CodeToolUnknown).Lacks("ask the platform team which tools there are", "tool:"+string(tool)))
	}
	q.Tool = t
	d := policy.Decide(q)
	if d.Allow && !d.Failed {
		return d, nil
	}
	return Decision{}, b.forbidden(ctx, op, q, d, p)
}

// forbidden turns a deny into its error and carries out its consequence.
func (b *Broker) forbidden(ctx context.Context, op string, q Question, d Decision, p path) error {
	e := policyDenied(op, q, d)
	if d.Consequence == ConsequenceDeny {
		return b.denied(ctx, q.Caller, p, q.Tool.Name, e)
	}
	return b.punish(ctx, q.Caller, p, d.Consequence, ViolationForbidden, q.Tool.Name, e)
}

func policyDenied(op string, q Question, d Decision) *Error {
	return Errorf(Denied, op, "policy does not allow %q to %s tool %q like this", q.Caller.ID, q.Action, q.Tool.Name).
		With(CodePolicyDenied).Decided(d.Policies).
		Lacks(cmp.Or(d.Remedy, "pawl explain says which policies were looked at; ask their owners"), "tool:"+string(q.Tool.Name)+":"+string(q.Action))
}

// baited refuses whoever reaches for a canary among tools, before anything else is said. The answer
// must not tell what the tool is: it is otherwise, what is wrong with the request anyhow, or that of
// a policy without a permit.
func (b *Broker) baited(ctx context.Context, op string, policy Policy, q Question, p path, otherwise *Error, tools ...ToolName) error {
	for _, name := range tools {
		t, _ := policy.Tool(name)
		if !t.Canary {
			continue
		}
		q.Tool = t
		e := cmp.Or(otherwise, policyDenied(op, q, Decision{}))
		d := policy.Decide(noticed(q.Caller, p, ViolationCanary, t, q.Now))
		if err := b.follow(ctx, q.Caller, p, d.Consequence, ViolationCanary, name, e); err != nil {
			return err
		}
		e.Revocation = ""
		return e
	}
	return nil
}

// noticed is the question of what follows a breach.
func noticed(c Caller, p path, v ViolationCode, t Tool, now time.Time) Question {
	return Question{Action: ActionReport, Caller: c, Violation: v, Tool: t, Chain: p.chain, Depth: max(len(p.nodes)-1, 0), Now: now}
}

// denied records a refusal and gives it back. A refusal stands when it cannot be recorded.
func (b *Broker) denied(ctx context.Context, c Caller, p path, tool ToolName, e *Error) error {
	entry := Entry{At: b.cfg.Now(), Actor: c.ID.String(), Op: OpDenied, Chain: p.chain.ID, Tool: tool,
		Code: e.Code, Policies: e.Policies, Detail: e.Op}
	if len(p.nodes) > 0 {
		entry.Delegation = p.leaf().ID
	}
	if err := b.update(ctx, e.Op, func(tx Tx) error { _, err := enter(tx, entry); return err }); err != nil {
		b.cfg.Alarm("recording a denial", err)
	}
	return e
}

// violated asks policy what follows a breach that the broker noticed, and carries it out.
func (b *Broker) violated(ctx context.Context, c Caller, p path, v ViolationCode, tool ToolName, e *Error) error {
	policy := b.cfg.Policy()
	t, _ := policy.Tool(tool) // the zero Tool when it is not known
	what := policy.Decide(noticed(c, p, v, t, b.cfg.Now())).Consequence
	// Somebody else's delegation is a replay, whether policy has a word for it or not: responders
	// look for violations.
	if what != ConsequenceDeny || v == ViolationHolder {
		return b.punish(ctx, c, p, what, v, tool, e)
	}
	return b.denied(ctx, c, p, tool, e)
}

// punish carries a consequence out and gives e, which says so when there is one.
func (b *Broker) punish(ctx context.Context, c Caller, p path, what Consequence, v ViolationCode, tool ToolName, e *Error) error {
	answer := *e
	if what > ConsequenceDeny {
		answer.Code = CodeViolation
	}
	if err := b.follow(ctx, c, p, what, v, tool, &answer); err != nil {
		return err
	}
	return &answer
}

// follow records a violation and fences what the consequence names; e gets the revocation. Both are
// one transaction. When that fails the request is refused all the same: with its own refusal where
// nothing was to be fenced.
func (b *Broker) follow(ctx context.Context, c Caller, p path, what Consequence, v ViolationCode, tool ToolName, e *Error) error {
	now := b.cfg.Now()
	entry := Entry{At: now, Actor: c.ID.String(), Op: OpViolation, Chain: p.chain.ID, Tool: tool, Policies: e.Policies,
		Code: Code(v), Detail: what.String()}
	var over target // nothing, when the chain was still to be opened
	if len(p.nodes) > 0 {
		entry.Delegation, over.node = p.leaf().ID, p.leaf().ID
		if what >= ConsequenceRevokeChain {
			over.node = p.root().ID
		}
	}
	var first, frozen Revocation
	err := b.update(ctx, e.Op, func(tx Tx) (err error) {
		first = Revocation{}
		if _, err = enter(tx, entry); err != nil {
			return err
		}
		// Of a step that was refused nothing was handed out.
		if what > ConsequenceRevokeStep && over.node != "" {
			if first, err = b.fence(tx, fencing{by: "pawl", target: over, reason: "violation: " + string(v), now: now}); err != nil {
				return err
			}
		}
		if what == ConsequenceFreezeCaller {
			frozen, err = b.fence(tx, fencing{by: "pawl", selector: `spiffe:` + c.ID.String(), freeze: true,
				reason: "violation: " + string(v), now: now})
		}
		return err
	})
	switch {
	case err != nil && what == ConsequenceDeny:
		b.cfg.Alarm("recording a violation", err)
		return nil
	case err != nil:
		b.cfg.Alarm("fencing after a violation", err)
		b.pursueUnsure(first, err)
		return err
	}
	if first.ID != "" {
		b.pursue(first)
	}
	e.Revocation = cmp.Or(first.ID, frozen.ID)
	return nil
}

// Report takes a violation from a reporter: a holder of a delegation in the chain, or whoever
// policy lets report. What follows is policy's to say.
//
// Errors: Malformed, Unauthenticated, NotFound, Denied, Unavailable.
func (b *Broker) Report(ctx context.Context, c Caller, r ReportRequest) (Reported, error) {
	const op = "report"
	now := b.cfg.Now()
	if err := c.authentic(op, now); err != nil {
		return Reported{}, err
	}
	if checkArgName(string(r.Violation)) != nil {
		return Reported{}, Errorf(Malformed, op, "a violation's code is lower-case letters, digits and underscores, at most 64")
	}
	if err := checkText(op, "detail", r.Detail, 0, MaxTask); err != nil {
		return Reported{}, err
	}
	var p path
	var g Grant
	err := b.view(ctx, op, func(tx Tx) (err error) {
		if p, err = b.readPath(tx, op, r.Delegation); err != nil || r.Grant == "" {
			return err
		}
		var ok bool
		if g, ok, err = load[Grant](tx, keyGrant(r.Grant)); err == nil && (!ok || g.Delegation != r.Delegation) {
			err = unknownGrant(op)
		}
		return err
	})
	if err != nil {
		return Reported{}, err
	}
	if p.leaf().Holder == c.ID {
		b.watchdog.again(r.Delegation, now)
	}
	policy := b.cfg.Policy()
	q := Question{Action: ActionReport, Caller: c, Violation: r.Violation, Chain: p.chain, Depth: len(p.nodes) - 1, Now: now}
	q.Tool, _ = policy.Tool(g.Tool) // the zero Tool when the report names no grant
	d := policy.Decide(q)
	if !d.Allow {
		if !p.holds(c) {
			return Reported{}, b.denied(ctx, c, p, "", unknownDelegation(op))
		}
		// A holder may stop its own chain, and nobody beyond it: otherwise an agent could pass a
		// little on to another one and have that frozen everywhere.
		d.Consequence = min(d.Consequence, ConsequenceRevokeChain)
	}
	return b.carryOutReport(ctx, c, r, p, d.Consequence, now)
}

func (p path) holds(c Caller) bool {
	for _, d := range p.nodes {
		if d.Holder == c.ID {
			return true
		}
	}
	return false
}

func (b *Broker) carryOutReport(ctx context.Context, c Caller, r ReportRequest, p path, what Consequence, now time.Time) (Reported, error) {
	entry := Entry{At: now, Actor: c.ID.String(), Op: OpViolation, Chain: p.chain.ID, Delegation: r.Delegation,
		Grant: r.Grant, Code: Code(r.Violation), Detail: r.Detail}
	f := fencing{by: c.ID.String(), reason: "reported: " + string(r.Violation), now: now, target: target{node: r.Delegation}}
	switch {
	case what >= ConsequenceRevokeChain:
		f.target.node = p.root().ID
	case what == ConsequenceRevokeStep && r.Grant != "":
		f.target = target{grant: r.Grant}
	}
	var rv Revocation
	err := b.update(ctx, "report", func(tx Tx) (err error) {
		if _, err = enter(tx, entry); err != nil || what == ConsequenceDeny {
			return err
		}
		if rv, err = b.fence(tx, f); err != nil || what != ConsequenceFreezeCaller {
			return err
		}
		_, err = b.fence(tx, fencing{by: f.by, selector: "spiffe:" + p.leaf().Holder.String(), freeze: true, reason: f.reason, now: now})
		return err
	})
	if err != nil {
		b.pursueUnsure(rv, err)
		return Reported{}, err
	}
	if rv.ID != "" {
		b.pursue(rv)
	}
	return Reported{Consequence: what, Revocation: rv.ID}, nil
}
