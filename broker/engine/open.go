package engine

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/selector"
)

// Open creates a chain for a task and returns its root, which the caller holds. The first step creates its Vault token.
//
// Errors: Malformed, Unauthenticated, Denied, Unavailable.
func (e *Engine) Open(ctx context.Context, c broker.Caller, r broker.OpenRequest) (broker.Delegation, error) {
	const op = "open"
	now := e.cfg.Now()
	if err := c.Check(op, now); err != nil {
		return broker.Delegation{}, err
	}
	scope, err := checkOpen(op, r)
	if err != nil {
		return broker.Delegation{}, err
	}
	chain := broker.Chain{Task: r.Task, Opener: c.ID, Opened: now, Labels: r.Labels}
	root := broker.Delegation{Holder: c.ID, Scope: scope, Budget: r.Budget, Depth: r.Depth, Created: now,
		Heartbeat: r.Heartbeat, Expires: now.Add(cmp.Or(r.TTL, broker.DefaultChainTTL))}
	if err := identify(e.newID, &chain, &root); err != nil {
		return broker.Delegation{}, err
	}
	policy := e.cfg.Policy()
	q := broker.Question{Action: broker.ActionOpen, Caller: c, Chain: chain, Now: now}
	if err := e.refuseCanary(ctx, op, policy, q, records.Lineage{}, nil, scope.Tools()...); err != nil {
		return broker.Delegation{}, err
	}
	var deciders []string
	for _, right := range scope {
		d, err := e.permit(ctx, op, policy, q, right.Tool, records.Lineage{})
		if err != nil {
			return broker.Delegation{}, err
		}
		deciders = append(deciders, d.Policies...)
	}
	err = e.update(ctx, op, func(tx *records.Tx) error {
		f, err := tx.FenceOver(records.Lineage{Chain: chain, Nodes: []broker.Delegation{root}}, selector.Subject{})
		if err != nil {
			return err
		}
		if f != nil {
			return records.Fenced(op, f)
		}
		if err := tx.AddChain(chain); err != nil {
			return err
		}
		return tx.AddDelegation(root, broker.Entry{At: now, Actor: c.ID.String(), Op: broker.OpOpen,
			Bundle: policy.Digest(), Policies: unique(deciders), Detail: r.Task})
	})
	if err != nil {
		return broker.Delegation{}, err
	}
	e.watchdog.Beat(root, now)
	return root, nil
}

func identify(newID func(prefix string) (string, error), chain *broker.Chain, root *broker.Delegation) error {
	ch, err := newID("ch")
	if err != nil {
		return err
	}
	dl, err := newID("dl")
	if err != nil {
		return err
	}
	chain.ID, chain.Root = broker.ChainID(ch), broker.DelegationID(dl)
	root.ID, root.Chain = chain.Root, chain.ID
	return nil
}

func checkOpen(op string, r broker.OpenRequest) (broker.Scope, error) {
	if err := checkText(op, "task", r.Task, 1, broker.MaxTask); err != nil {
		return nil, err
	}
	if len(r.Labels) > broker.MaxLabels {
		return nil, broker.Errorf(broker.Malformed, op, "at most %d labels", broker.MaxLabels)
	}
	for name, value := range r.Labels {
		if err := args.CheckName(name); err != nil {
			return nil, broker.Errorf(broker.Malformed, op,
				"label names are lower-case letters, digits and underscores, at most 64")
		}
		if err := checkText(op, "the value of label "+name, value, 0, 64); err != nil {
			return nil, err
		}
	}
	if err := checkHeartbeat(op, r.Heartbeat); err != nil {
		return nil, err
	}
	return checkShare(op, r.Rights, r.Budget, r.Depth, r.TTL)
}

// checkShare validates the fields that OpenRequest and DelegateRequest share.
func checkShare(op string, rights []broker.Right, budget broker.Budget, depth int, ttl time.Duration,
) (broker.Scope, error) {
	scope, err := broker.NewScope(rights)
	if err != nil {
		return nil, broker.Errorf(broker.Malformed, op, "%v", err)
	}
	if err := budget.Check(); err != nil {
		return nil, broker.Errorf(broker.Malformed, op, "%v", err)
	}
	if depth < 0 || depth > broker.MaxDepth {
		return nil, broker.Errorf(broker.Malformed, op, "depth must be 0 to %d", broker.MaxDepth)
	}
	if ttl < 0 || ttl > broker.MaxChainTTL {
		return nil, broker.Errorf(broker.Malformed, op, "the lifetime must be at most %s", broker.MaxChainTTL)
	}
	return scope, nil
}

// Delegate passes a part of the caller's delegation on to another SPIFFE ID and returns the child. The child allows
// nothing that the parent may not pass on: authority only gets narrower.
//
// Errors: Malformed, Unauthenticated, NotFound, Denied, Revoked, Expired, Unavailable.
func (e *Engine) Delegate(ctx context.Context, c broker.Caller, r broker.DelegateRequest) (broker.Delegation, error) {
	const op = "delegate"
	now := e.cfg.Now()
	if err := c.Check(op, now); err != nil {
		return broker.Delegation{}, err
	}
	scope, err := checkShare(op, r.Rights, r.Budget, r.Depth, r.TTL)
	if err != nil {
		return broker.Delegation{}, err
	}
	if err := checkHeartbeat(op, r.Heartbeat); err != nil {
		return broker.Delegation{}, err
	}
	if r.To.IsZero() || r.To.Path() == "" {
		return broker.Delegation{}, broker.Errorf(broker.Malformed, op, "the receiver must be the SPIFFE ID of a workload")
	}
	id, err := e.newID("dl")
	if err != nil {
		return broker.Delegation{}, err
	}
	l, history, err := e.heldLineage(ctx, op, c, r.From, now)
	if err != nil {
		return broker.Delegation{}, err
	}
	policy := e.cfg.Policy()
	q := broker.Question{Action: broker.ActionDelegate, Caller: c, Receiver: r.To, Chain: l.Chain, Depth: l.Depth(),
		History: history, Now: now}
	child := childOf(l.Leaf(), r, scope, now)
	child.ID = broker.DelegationID(id)
	wider := refuseWider(op, l.Nodes, child, r.TTL)
	if err := e.refuseCanary(ctx, op, policy, q, l, wider, scope.Tools()...); err != nil {
		return broker.Delegation{}, err
	}
	if wider != nil {
		return broker.Delegation{}, e.recordDenial(ctx, c, l, "", wider)
	}
	deciders, err := e.permitAll(ctx, op, policy, q, scope, l)
	if err != nil {
		return broker.Delegation{}, err
	}
	err = e.update(ctx, op, func(tx *records.Tx) error {
		l, err := tx.Lineage(op, r.From)
		if err != nil {
			return err
		}
		if err := tx.CheckUsable(op, l, selector.Subject{}, now); err != nil {
			return err
		}
		return tx.AddDelegation(child, broker.Entry{At: now, Actor: c.ID.String(), Op: broker.OpDelegate,
			Bundle: policy.Digest(), Policies: deciders, Detail: "to " + r.To.String()})
	})
	if err != nil {
		return broker.Delegation{}, err
	}
	return child, nil
}

// childOf builds the child that r asks for under d. Zero fields of r take d's limit, and the child expires with d at
// the latest. The caller checks that the child is narrower.
func childOf(d broker.Delegation, r broker.DelegateRequest, scope broker.Scope, now time.Time) broker.Delegation {
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

// refuseWider refuses a child that is wider than its parent, the last of path, in any respect; nil: it is not. It also
// refuses one whose holder is in the path already and would gain by it. It compares the requested lifetime with the
// parent's whole lifetime, not with the remaining part: a holder that asks for what it was given gets the remainder.
func refuseWider(op string, path []broker.Delegation, child broker.Delegation, ttl time.Duration) *broker.Error {
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

// permitAll asks policy for each tool of a scope. When the receiver is in another trust domain, a permit must name both
// domains.
func (e *Engine) permitAll(ctx context.Context, op string, policy broker.Policy, q broker.Question, scope broker.Scope,
	l records.Lineage) (deciders []string, err error) {
	for _, right := range scope {
		d, err := e.permit(ctx, op, policy, q, right.Tool, l)
		if err != nil {
			return nil, err
		}
		if !permitsBoth(d.Domains, q.Caller.ID.TrustDomain(), q.Receiver.TrustDomain()) {
			return nil, e.recordDenial(ctx, q.Caller, l, right.Tool,
				broker.Errorf(broker.Denied, op, "the receiver is in another trust domain and no policy names both").
					With(broker.CodeForeignDomain).Decided(d.Policies).
					Lacks("a permit that names both trust domains", "domain:"+q.Receiver.TrustDomain().Name()))
		}
		deciders = append(deciders, d.Policies...)
	}
	return unique(deciders), nil
}

func permitsBoth(domains []string, from, to spiffeid.TrustDomain) bool {
	return from == to || slices.Contains(domains, from.Name()) && slices.Contains(domains, to.Name())
}

func unique(s []string) []string {
	slices.Sort(s)
	return slices.Compact(s)
}

// heldLineage reads the lineage of a delegation that the caller holds, and the chain's history. A delegation of another
// holder gets the same refusal as one that does not exist.
func (e *Engine) heldLineage(ctx context.Context, op string, c broker.Caller, id broker.DelegationID, now time.Time,
) (l records.Lineage, history map[broker.ToolName]broker.Past, err error) {
	err = e.view(ctx, op, func(tx *records.Tx) error {
		if l, err = tx.Lineage(op, id); err != nil || l.Leaf().Holder != c.ID {
			return err
		}
		u, err := tx.Usage(l.Root().ID)
		if history = u.Tools; err != nil {
			return err
		}
		return tx.CheckUsable(op, l, selector.Subject{}, now)
	})
	if isStranger(c, l, err) {
		return records.Lineage{}, nil, e.refuseStranger(ctx, c, l, "", records.UnknownDelegation(op))
	}
	if err != nil {
		return records.Lineage{}, nil, err
	}
	e.watchdog.Beat(l.Leaf(), now)
	return l, history, nil
}
