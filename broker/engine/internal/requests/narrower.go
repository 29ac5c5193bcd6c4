package requests

import (
	"cmp"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
)

// ChildOf builds the child that r asks for under d. Zero fields of r take d's limit, and the child expires with d at
// the latest. The caller checks that the child is narrower.
func ChildOf(d broker.Delegation, r broker.DelegateRequest, scope broker.Scope, now time.Time) broker.Delegation {
	expires := d.Expires
	if r.TTL > 0 && now.Add(r.TTL).Before(expires) {
		expires = now.Add(r.TTL)
	}
	budget := broker.Budget{
		Steps:     cmp.Or(r.Budget.Steps, d.Budget.Steps),
		Live:      cmp.Or(r.Budget.Live, d.Budget.Live),
		PerMinute: cmp.Or(r.Budget.PerMinute, d.Budget.PerMinute),
		Tools:     map[broker.ToolName]int{},
	}
	for tool, n := range d.Budget.Tools {
		budget.Tools[tool] = n
	}
	for tool, n := range r.Budget.Tools {
		budget.Tools[tool] = cmp.Or(n, budget.Tools[tool])
	}
	return broker.Delegation{Chain: d.Chain, Parent: d.ID, Holder: r.To, Scope: scope, Budget: budget,
		Depth: r.Depth, Created: now, Expires: expires, Heartbeat: cmp.Or(r.Heartbeat, d.Heartbeat)}
}

// RefuseWider refuses a child that is wider than its parent, the last of path, in any respect; nil: it is not. It also
// refuses one whose holder is in the path already and would gain by it. It compares the requested lifetime with the
// parent's whole lifetime, not with the remaining part: a holder that asks for what it was given gets the remainder.
func RefuseWider(op string, path []broker.Delegation, child broker.Delegation, ttl time.Duration) *broker.Error {
	parent := path[len(path)-1]
	if parent.Depth == 0 {
		return broker.Errorf(broker.Denied, op, "this delegation may not be passed on any further").
			With(broker.CodeDelegationDepth).Lacks("open the chain with more depth", "depth")
	}
	wider := append(parent.Scope.Wider(child.Scope), parent.Budget.Wider(child.Budget)...)
	if i := slices.IndexFunc(path, func(d broker.Delegation) bool { return d.Holder == child.Holder }); i >= 0 {
		wider = append(wider, path[i].Scope.Gains(child.Scope)...)
	}
	if child.Depth >= parent.Depth {
		wider = append(wider, "depth")
	}
	if ttl > parent.Expires.Sub(parent.Created) {
		wider = append(wider, "ttl")
	}
	if parent.Heartbeat > 0 && child.Heartbeat > parent.Heartbeat {
		wider = append(wider, "heartbeat")
	}
	if len(wider) > 0 {
		return broker.Errorf(broker.Denied, op, "the delegation asks for more than yours may pass on").
			With(broker.CodeDelegationWider).
			Lacks("ask for less, or ask your delegator for a wider delegation", wider...)
	}
	return nil
}

// PermitsBoth reports whether a permit that names the domains allows a delegation from one trust domain to another.
func PermitsBoth(domains []string, from, to spiffeid.TrustDomain) bool {
	return from == to || slices.Contains(domains, from.Name()) && slices.Contains(domains, to.Name())
}
