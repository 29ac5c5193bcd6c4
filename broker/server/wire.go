package server

import (
	"cmp"
	"log/slog"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/args"
)

// pathID parses the id in the path and adds it to the log line.
func pathID[ID ~string](x *exchange, name string, parse func(string) (ID, error)) (ID, error) {
	id, err := parse(x.PathValue("id"))
	if err != nil {
		return "", malformed("%v", err)
	}
	x.note(slog.String(name, string(id)))
	return id, nil
}

// maxSeconds bounds a duration before it is multiplied. The broker's own limits are far lower.
const maxSeconds = int64(366 * 24 * time.Hour / time.Second)

func seconds(member string, n int64) (time.Duration, error) {
	if n < 0 || n > maxSeconds {
		return 0, malformed("%s is out of range", member)
	}
	return time.Duration(n) * time.Second, nil
}

func rightsOf(in []api.Right) ([]broker.Right, error) {
	out := make([]broker.Right, 0, len(in))
	for _, r := range in {
		name, err := broker.ParseToolName(r.Tool)
		if err != nil {
			return nil, malformed("%v", err)
		}
		right := broker.Right{Tool: name, Use: r.Use, Delegate: r.Delegate}
		for arg, raw := range r.Args {
			c, err := args.ParseConstraint(raw)
			if err != nil {
				return nil, malformed("argument %.70q of tool %q: %v", arg, name, err)
			}
			if right.Args == nil {
				right.Args = map[string]args.Constraint{}
			}
			right.Args[arg] = c
		}
		out = append(out, right)
	}
	return out, nil
}

func budgetOf(in api.Budget) broker.Budget {
	out := broker.Budget{Steps: in.Steps, Live: in.Live, PerMinute: in.PerMinute}
	for tool, n := range in.Tools {
		if out.Tools == nil {
			out.Tools = map[broker.ToolName]int{}
		}
		out.Tools[broker.ToolName(tool)] = n // the broker parses the names with the rest of the budget
	}
	return out
}

// each maps a list. The result is never nil, so that it encodes as [].
func each[A, B any](in []A, f func(A) B) []B {
	out := make([]B, 0, len(in))
	for _, a := range in {
		out = append(out, f(a))
	}
	return out
}

func texts[T ~string](in []T) []string { return each(in, func(t T) string { return string(t) }) }

func counts[T ~string](in map[T]int) map[string]int {
	out := make(map[string]int, len(in))
	for name, n := range in {
		out[string(name)] = n
	}
	return out
}

// utc converts a time to UTC. It leaves the zero time zero.
func utc(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return t.UTC()
}

func wireRight(r broker.Right) api.Right {
	out := api.Right{Tool: string(r.Tool), Use: r.Use, Delegate: r.Delegate}
	for arg, c := range r.Args {
		raw, err := c.MarshalJSON()
		if err != nil {
			panic("a parsed constraint always encodes")
		}
		if out.Args == nil {
			out.Args = map[string]api.Constraint{}
		}
		out.Args[arg] = raw
	}
	return out
}

func wireDelegation(d broker.Delegation) api.Delegation {
	b := d.Budget
	out := api.Delegation{
		ID: string(d.ID), Chain: string(d.Chain), Parent: string(d.Parent), Holder: d.Holder.String(),
		Rights: each(d.Scope, wireRight), Budget: api.Budget{Steps: b.Steps, Live: b.Live, PerMinute: b.PerMinute},
		Depth: d.Depth, Created: utc(d.Created), Expires: utc(d.Expires), Fence: wireFence(d.Fence),
		HeartbeatSeconds: int64(d.Heartbeat / time.Second),
	}
	if len(b.Tools) > 0 {
		out.Budget.Tools = counts(b.Tools)
	}
	return out
}

func wireFence(f *broker.Fence) *api.Fence {
	if f == nil {
		return nil
	}
	return &api.Fence{At: utc(f.At), Revocation: string(f.Revocation), Frozen: f.Frozen}
}

func wireGrant(g broker.Grant) api.Grant {
	expires := g.Expires
	if end := g.Lease.Expires; !end.IsZero() && end.Before(expires) {
		expires = end
	}
	return api.Grant{
		ID: string(g.ID), Chain: string(g.Chain), Delegation: string(g.Delegation), Tool: string(g.Tool),
		Narrowing: g.Narrowing.String(), State: string(g.State), Created: utc(g.Created), Expires: utc(expires),
		Bundle: g.Bundle, Policies: g.Policies, Ending: string(g.Ending), Ended: utc(g.Ended), Outcome: string(g.Outcome),
		ArgsDigest: g.ArgsDigest,
		Sealed:     g.Sealed, Collector: idText(g.Collector), Collected: utc(g.Collected),
	}
}

func idText(id spiffeid.ID) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}

func wireRecord(g broker.Grant) api.GrantRecord {
	return api.GrantRecord{
		Grant: wireGrant(g), Caller: g.Caller.String(), Args: jsontext.Value(g.Args.Canonical()), Purpose: g.Purpose,
		Path: g.Path.String(), Lease: g.Lease.ID, Ref: g.Lease.Ref, Request: g.Lease.Request, Fence: wireFence(g.Fence),
		Evidence: each(g.Evidence, func(e broker.Evidence) api.Evidence {
			return api.Evidence{At: utc(e.At), Check: e.Check, Outcome: string(e.Outcome), Answer: e.Answer}
		}),
	}
}

func wireChain(c broker.Chain) api.Chain {
	return api.Chain{ID: string(c.ID), Task: c.Task, Opener: c.Opener.String(), Opened: utc(c.Opened), Labels: c.Labels, Root: string(c.Root), Envelope: wireEnvelope(c.Envelope)}
}

func wireEnvelope(e *broker.Envelope) *api.Envelope {
	if e == nil {
		return nil
	}
	return &api.Envelope{Issuer: e.Issuer, ID: e.ID, Digest: e.Digest, Task: e.Task, Labels: e.Labels, OnBehalfOf: e.Behalf,
		Issued: utc(e.Issued), Expires: utc(e.Expires)}
}

func wireSummary(s broker.ChainSummary) api.ChainSummary {
	return api.ChainSummary{Chain: wireChain(s.Chain), Delegations: s.Delegations, Live: s.Live, Steps: s.Steps, Fence: wireFence(s.Fence)}
}

func wirePlan(p broker.Plan) api.Plan {
	return api.Plan{
		Plan: p.Token, Selector: p.Selector, Revision: uint64(p.Revision), Made: utc(p.Made),
		Chains: p.Chains, Delegations: p.Nodes, Later: p.Later, Grants: p.Grants, Issued: p.Issued, Live: p.Live,
		ByTool: counts(p.ByTool), ByBackend: counts(p.ByBackend), ByNarrowing: counts(p.ByLabel), ByCaller: counts(p.ByCaller),
		Tasks: each(p.Tasks, func(t broker.PlannedTask) api.PlannedTask {
			return api.PlannedTask{Chain: string(t.Chain), Task: t.Task, SignedTask: t.SignedTask, OnBehalfOf: t.Behalf,
				Delegations: t.Delegations, Grants: t.Grants}
		}), TasksMore: p.TasksMore,
		Static: p.Static, LatestEnd: utc(p.LatestEnd),
	}
}

func wireRevocation(r broker.Revocation) api.Revocation {
	return api.Revocation{
		ID: string(r.ID), Selector: r.Selector, Reason: r.Reason, By: r.By, Freeze: r.Freeze, Unfreezer: r.Unfreezer, Lifted: r.Lifted,
		LiftedAlone: r.LiftedAlone, Uncounted: r.Uncounted,
		Asked: utc(r.Asked), Fenced: utc(r.Fenced), Revision: uint64(r.Revision), Settled: utc(r.Settled),
		Closure: string(cmp.Or(r.Closure, broker.ClosureUnknown)), Grants: max(r.Grants, 0), Dead: r.Dead, Alive: r.Alive,
		Unknown: r.Unknown, Static: r.Static, Tokens: r.Tokens, Leases: r.Leases, LatestEnd: utc(r.LatestEnd),
		Unswept: r.Unswept, CoversNothing: r.Nothing, Repeated: r.Repeated,
	}
}

// maxSilent is the number of holders that are listed as not having acknowledged.
const maxSilent = 50

func wireAcknowledged(list []broker.Acknowledgement) *api.Acknowledged {
	if len(list) == 0 {
		return nil
	}
	out := &api.Acknowledged{Agents: len(list), Silent: []api.Silent{}}
	for _, a := range list {
		switch {
		case !a.At.IsZero():
			out.Done++
		case len(out.Silent) < maxSilent:
			out.Silent = append(out.Silent, api.Silent{Delegation: string(a.Delegation), Holder: a.Holder.String()})
		}
	}
	return out
}

func wireAwaited(a broker.Awaited) api.Awaited {
	return api.Awaited{Grant: string(a.Grant), Chain: string(a.Chain), Tool: string(a.Tool), Backend: a.Backend,
		Why: a.Why, Until: utc(a.Until)}
}

func wireEntry(e broker.Entry) api.Entry {
	return api.Entry{
		Revision: uint64(e.Revision), At: utc(e.At), Actor: e.Actor, Op: string(e.Op), Chain: string(e.Chain),
		Delegation: string(e.Delegation), Grant: string(e.Grant), Revocation: string(e.Revocation), Tool: string(e.Tool),
		Code: string(e.Code), Bundle: e.Bundle, Policies: e.Policies, Detail: e.Detail,
	}
}
