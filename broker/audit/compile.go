package audit

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// Source provides the data of a report; *broker.Broker implements it. Its errors are returned unchanged. It must be
// safe for concurrent use.
type Source interface {
	Revocation(context.Context, broker.RevocationID) (broker.Revocation, error)
	Revocations(context.Context, broker.Page) (list []broker.Revocation, next string, err error)
	Acknowledgements(context.Context, broker.RevocationID) ([]broker.Acknowledgement, error)
	Chains(ctx context.Context, all bool, p broker.Page) (list []broker.ChainSummary, next string, err error)
	Chain(context.Context, broker.ChainID, broker.Page) (broker.ChainView, error)
	ChainEntries(ctx context.Context, id broker.ChainID, after broker.Revision, limit int) ([]broker.Entry, error)
}

// maxNearby limits how many open chains are searched for other delegations of the same holders.
const maxNearby = 200

// Compile builds the report of a revocation from the ledger at the time now. log returns the audit log after a
// revision. It is read only for a revocation by a rule, because the entries of that one belong to no chain.
func Compile(ctx context.Context, src Source, log func(after broker.Revision) Log, id broker.RevocationID, now time.Time) (Report, error) {
	rv, err := src.Revocation(ctx, id)
	if err != nil {
		return Report{}, err
	}
	covers, err := selector.Covering(rv)
	if err != nil {
		return Report{}, err
	}
	c := compiler{ctx: ctx, src: src, now: now, covers: covers, holders: map[string]bool{}, seen: map[broker.ChainID]bool{},
		issued: map[broker.GrantID]broker.Revision{},
		report: Report{Version: 1, Made: now.UTC(), Revocation: rv, Window: Window{Fenced: rv.Fenced}, Residual: Residual{Tokens: rv.Tokens}}}
	for _, step := range []func() error{c.acknowledged, c.lifted, c.affected, func() error { return c.rule(log) }, c.nearby} {
		if err := step(); err != nil {
			return Report{}, err
		}
	}
	c.window()
	c.finish()
	return c.report, nil
}

// compiler collects one report.
type compiler struct {
	ctx     context.Context
	src     Source
	now     time.Time
	covers  func(selector.Subject) bool
	report  Report
	holders map[string]bool                    // of delegations and grants in scope
	seen    map[broker.ChainID]bool            // chains in the report
	issued  map[broker.GrantID]broker.Revision // the revision at which a secret in scope was handed over
}

// acknowledged copies the acknowledgements of the revocation.
func (c *compiler) acknowledged() error {
	list, err := c.src.Acknowledgements(c.ctx, c.report.Revocation.ID)
	if more := len(list) - MaxAgents; more > 0 {
		// Holders that have not acknowledged are listed first, because a person may have to contact them.
		slices.SortStableFunc(list, func(a, b broker.Acknowledgement) int { return a.At.Compare(b.At) })
		list, c.report.AgentsMore = list[:MaxAgents], more
	}
	c.report.Agents = list
	return err
}

// lifted names the freezes that one person lifted: whoever reads a report should know that it happened here.
func (c *compiler) lifted() error {
	return broker.EachPage(func(p broker.Page) (string, error) {
		list, next, err := c.src.Revocations(c.ctx, p)
		for _, rv := range list {
			if rv.LiftedAlone != "" {
				c.report.LiftedAlone = append(c.report.LiftedAlone, Lifted{Revocation: rv.ID, At: rv.Settled, Reason: rv.LiftedAlone})
			}
		}
		return next, err
	})
}

// affected reads the chains that the revocation can cover.
func (c *compiler) affected() error {
	if chain := c.report.Revocation.Chain; chain != "" {
		return c.collect(chain)
	}
	return c.eachChain(true, func(s broker.ChainSummary) error { return c.collect(s.Chain.ID) })
}

// eachChain calls f with all chains, or with the open ones.
func (c *compiler) eachChain(all bool, f func(broker.ChainSummary) error) error {
	return broker.EachPage(func(p broker.Page) (string, error) {
		list, next, err := c.src.Chains(c.ctx, all, p)
		for _, s := range list {
			if err == nil {
				err = f(s)
			}
		}
		return next, err
	})
}

// chain reads one chain.
func (c *compiler) chain(id broker.ChainID) (v broker.ChainView, err error) {
	err = broker.EachPage(func(p broker.Page) (string, error) {
		part, err := c.src.Chain(c.ctx, id, p)
		v.Chain = part.Chain
		v.Delegations, v.Grants = append(v.Delegations, part.Delegations...), append(v.Grants, part.Grants...)
		return part.Next, err
	})
	return v, err
}

// collect adds a chain if any part of it is in scope.
func (c *compiler) collect(id broker.ChainID) error {
	v, err := c.chain(id)
	if err != nil {
		return err
	}
	paths := pathsOf(v)
	found := Chain{ID: id, Task: v.Chain.Task, Opener: v.Chain.Opener.String(), Opened: v.Chain.Opened,
		Envelope: v.Chain.Envelope}
	var outside []broker.Delegation
	for _, d := range v.Delegations {
		if !c.covers(selector.Subject{Chain: v.Chain, Path: paths[d.ID]}) {
			outside = append(outside, d)
			continue
		}
		found.Delegations++
		c.holders[d.Holder.String()] = true
	}
	var inside []broker.Grant
	for _, g := range v.Grants {
		if c.covers(selector.OfGrant(v.Chain, paths[g.Delegation], g)) && !g.Created.After(c.report.Revocation.Fenced) {
			inside = append(inside, g)
			c.holders[g.Caller.String()] = true
		}
	}
	if found.Grants = len(inside); found.Grants+found.Delegations == 0 {
		return nil
	}
	c.seen[id] = true
	c.report.Chains = append(c.report.Chains, found)
	c.untouched(v, outside, paths, true)
	entries, err := c.entries(id)
	if err != nil {
		return err
	}
	c.timeline(entries)
	handed := map[broker.GrantID]broker.Entry{}
	for _, e := range entries {
		if e.Op == broker.OpIssued {
			handed[e.Grant] = e
		}
	}
	for _, g := range inside {
		c.issued[g.ID] = handed[g.ID].Revision
		c.grant(g, handed[g.ID].At)
	}
	return nil
}

// pathsOf returns the path, root first, of each delegation of a chain.
func pathsOf(v broker.ChainView) map[broker.DelegationID][]broker.Delegation {
	paths := map[broker.DelegationID][]broker.Delegation{}
	for _, d := range v.Delegations { // ancestors come first
		paths[d.ID] = append(slices.Clone(paths[d.Parent]), d)
	}
	return paths
}

// entries reads the whole audit log of a chain.
func (c *compiler) entries(id broker.ChainID) (all []broker.Entry, err error) {
	const page = 1000
	for after := broker.Revision(0); ; after = all[len(all)-1].Revision {
		next, err := c.src.ChainEntries(c.ctx, id, after, page)
		if err != nil {
			return nil, err
		}
		if all = append(all, next...); len(next) < page {
			return all, nil
		}
	}
}

// timeline keeps the entries that concern more than the progress of one grant, and finds the breach.
func (c *compiler) timeline(entries []broker.Entry) {
	for _, e := range entries {
		switch e.Op.Current() {
		case broker.OpToken, broker.OpIntent, broker.OpHandle, broker.OpIssued, broker.OpEnd, broker.OpClosed,
			broker.OpAcknowledged: // listed with the agents
			continue
		case broker.OpViolation:
			w := &c.report.Window
			if e.Revision < c.report.Revocation.Revision && (w.Breach == nil || e.Revision < w.Breach.Revision) {
				w.Breach = &e
			}
		}
		c.report.Timeline = append(c.report.Timeline, e)
	}
}

// grant adds one grant in scope. handed is the time when its secret was handed over; zero means never.
func (c *compiler) grant(g broker.Grant, handed time.Time) {
	fenced := c.report.Revocation.Fenced
	out := Grant{ID: g.ID, Chain: g.Chain, Delegation: g.Delegation, Caller: g.Caller.String(), Tool: g.Tool,
		Narrowing: g.Narrowing.String(), Args: string(g.Args.Canonical()), Purpose: g.Purpose, Path: g.Path.String(), Lease: g.Lease.ID,
		Ref: g.Lease.Ref, Request: g.Lease.Request, Created: g.Created, HandedOver: handed, Ended: g.Ended, Ending: g.Ending,
		Before: !g.Ended.IsZero() && g.Ended.Before(fenced), Outcome: g.Outcome, LatestEnd: g.LatestEnd(), Evidence: g.Evidence}
	c.report.Grants = append(c.report.Grants, out)
	r := &c.report.Residual
	switch {
	case g.Outcome == broker.OutcomeStatic:
		r.Rotate = append(r.Rotate, g.ID)
	case g.Outcome == broker.OutcomeAlive:
		r.Alive = append(r.Alive, g.ID)
	case g.Outcome == broker.OutcomeUnknown:
		r.Unproven = append(r.Unproven, g.ID)
	case out.Before && !handed.IsZero():
		r.EndedBefore++
	}
	if end := g.LatestEnd(); g.Outcome == broker.OutcomeDead && end.After(fenced) &&
		slices.ContainsFunc(g.Evidence, func(e broker.Evidence) bool { return e.Listed && e.Outcome == broker.OutcomeDead }) {
		r.Listed, r.ListedEnd = append(r.Listed, g.ID), later(r.ListedEnd, end)
	}
	if g.Outcome == broker.OutcomeAlive || g.Outcome == broker.OutcomeUnknown {
		r.LatestEnd = later(r.LatestEnd, out.LatestEnd)
	}
}

// window lists the secrets that could be used between the breach and the fence.
func (c *compiler) window() {
	w := &c.report.Window
	if w.Breach == nil {
		return
	}
	for _, g := range c.report.Grants {
		switch issued := c.issued[g.ID]; {
		case issued == 0:
		case issued > w.Breach.Revision:
			w.Issued = append(w.Issued, g.ID)
		case g.Ended.IsZero() || g.Ended.After(w.Breach.At):
			w.Live = append(w.Live, g.ID)
		}
	}
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// rule adds the entries of a revocation that belong to no chain, including those of its progress.
func (c *compiler) rule(log func(broker.Revision) Log) error {
	rv := c.report.Revocation
	if rv.Chain != "" {
		return nil
	}
	for e, err := range log(rv.Revision - 1) {
		if err != nil {
			return err
		}
		if e.Revocation == rv.ID && e.Chain == "" {
			c.report.Timeline = append(c.report.Timeline, e)
		}
		if !rv.Settled.IsZero() && e.At.After(rv.Settled) {
			break
		}
	}
	return nil
}

// nearby finds the delegations of the same holders in other open chains.
func (c *compiler) nearby() error {
	searched := 0
	return c.eachChain(false, func(s broker.ChainSummary) error {
		if c.seen[s.Chain.ID] {
			return nil
		}
		if searched++; searched > maxNearby {
			c.report.UntouchedMore++
			return nil
		}
		v, err := c.chain(s.Chain.ID)
		if err == nil {
			c.untouched(v, v.Delegations, pathsOf(v), false)
		}
		return err
	})
}

// untouched adds those of the delegations that can still be used.
func (c *compiler) untouched(v broker.ChainView, nodes []broker.Delegation, paths map[broker.DelegationID][]broker.Delegation, same bool) {
	live := map[broker.DelegationID]int{}
	for _, g := range v.Grants {
		if g.State != broker.StateClosed && !c.covers(selector.OfGrant(v.Chain, paths[g.Delegation], g)) {
			live[g.Delegation]++
		}
	}
	for _, d := range nodes {
		ended := slices.ContainsFunc(paths[d.ID], func(d broker.Delegation) bool { return d.Fence != nil || !c.now.Before(d.Expires) })
		if ended || !same && !c.holders[d.Holder.String()] {
			continue
		}
		c.report.Untouched = append(c.report.Untouched, Untouched{Chain: d.Chain, Delegation: d.ID, Holder: d.Holder.String(),
			Expires: d.Expires, Live: live[d.ID], SameChain: same})
	}
}

// finish sorts the lists, truncates the long ones, and converts times to UTC.
func (c *compiler) finish() {
	r := &c.report
	slices.SortFunc(r.Timeline, func(a, b broker.Entry) int { return cmp.Compare(a.Revision, b.Revision) })
	if more := len(r.Timeline) - MaxTimeline; more > 0 {
		r.Timeline, r.TimelineMore = r.Timeline[:MaxTimeline], more
	}
	slices.SortStableFunc(r.Grants, func(a, b Grant) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
	if more := len(r.Grants) - MaxGrants; more > 0 {
		r.Grants, r.GrantsMore = r.Grants[:MaxGrants], more
	}
	r.utc()
}

// rank sorts grants: those that may still work, those dead after the fence, those that ended before it.
func rank(g Grant) int {
	switch {
	case g.Outcome != broker.OutcomeDead:
		return 0
	case g.Before:
		return 2
	}
	return 1
}

// utc gives the times of a report one spelling, independent of the ledger's time zone.
func (r *Report) utc() {
	rv := &r.Revocation
	times := []*time.Time{&rv.Asked, &rv.Fenced, &rv.Settled, &rv.LatestEnd, &r.Window.Fenced, &r.Residual.LatestEnd, &r.Residual.ListedEnd}
	if r.Window.Breach != nil {
		times = append(times, &r.Window.Breach.At)
	}
	for i := range r.Chains {
		times = append(times, &r.Chains[i].Opened)
	}
	for i := range r.Timeline {
		times = append(times, &r.Timeline[i].At)
	}
	for i := range r.LiftedAlone {
		times = append(times, &r.LiftedAlone[i].At)
	}
	for i := range r.Agents {
		times = append(times, &r.Agents[i].At)
	}
	for i := range r.Untouched {
		times = append(times, &r.Untouched[i].Expires)
	}
	for i := range r.Grants {
		g := &r.Grants[i]
		times = append(times, &g.Created, &g.HandedOver, &g.Ended, &g.LatestEnd)
		g.Evidence = slices.Clone(g.Evidence)
		for k := range g.Evidence {
			times = append(times, &g.Evidence[k].At)
		}
	}
	for _, t := range times {
		if !t.IsZero() {
			*t = t.UTC().Round(0)
		}
	}
}
