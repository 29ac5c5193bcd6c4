package engine

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/requests"
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
	scope, err := requests.CheckOpen(op, r)
	if err != nil {
		return broker.Delegation{}, err
	}
	chain := broker.Chain{Task: r.Task, Opener: c.ID, Opened: now, Labels: r.Labels}
	root := broker.Delegation{Holder: c.ID, Scope: scope, Depth: r.Depth, Created: now, Heartbeat: r.Heartbeat}
	if err := identify(e.newID, &chain, &root); err != nil {
		return broker.Delegation{}, err
	}
	policy := e.cfg.Policy()
	envelope, refusal := broker.ReadEnvelope(op, policy, r.Envelope, c.ID, now)
	if refusal != nil {
		return broker.Delegation{}, e.recordDenial(ctx, c, records.Lineage{}, "", refusal)
	}
	chain.Envelope = envelope
	q := broker.Question{Action: broker.ActionOpen, Caller: c, Chain: chain, Open: &r, Now: now}
	if err := e.refuseCanary(ctx, op, policy, q, records.Lineage{}, nil, scope.Tools()...); err != nil {
		return broker.Delegation{}, err
	}
	var deciders []string
	var caps broker.Caps // of the permits of all the tools
	for _, right := range scope {
		d, err := e.permit(ctx, op, policy, q, right.Tool, records.Lineage{})
		if err != nil {
			return broker.Delegation{}, err
		}
		deciders = append(deciders, d.Policies...)
		caps.Tighten(d.Caps)
	}
	capped, beyond := r.Capped(caps, chain.SignedLabels())
	if len(beyond) > 0 {
		return broker.Delegation{}, e.recordDenial(ctx, c, records.Lineage{}, "",
			records.OverCap(op, beyond).Decided(unique(deciders)))
	}
	root.Budget, root.Expires = capped.Budget, now.Add(cmp.Or(capped.TTL, broker.DefaultChainTTL))
	if chain.Envelope != nil && chain.Envelope.Expires.Before(root.Expires) {
		root.Expires = chain.Envelope.Expires
	}
	err = e.update(ctx, op, func(tx *records.Tx) error {
		f, err := tx.FenceOver(records.Lineage{Chain: chain, Nodes: []broker.Delegation{root}}, selector.Subject{})
		if err != nil {
			return err
		}
		if f != nil {
			return records.Fenced(op, f)
		}
		if err := tx.OverOpen(op, c.ID.String(), now, e.cfg.OpenChains); err != nil {
			return err
		}
		if err := tx.AddChain(chain); err != nil {
			return err
		}
		return tx.AddDelegation(root, broker.Entry{At: now, Actor: c.ID.String(), Op: broker.OpOpen,
			Bundle: policy.Digest(), Policies: unique(deciders), Detail: chain.Purpose()})
	})
	if errors.As(err, &refusal) && refusal.Code == broker.CodeManyChains {
		e.cfg.Refused("open_chains")
		return broker.Delegation{}, e.recordDenial(ctx, c, records.Lineage{}, "", refusal)
	}
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
	scope, err := requests.CheckShare(op, r.Rights, r.Budget, r.Depth, r.TTL)
	if err != nil {
		return broker.Delegation{}, err
	}
	if err := requests.CheckHeartbeat(op, r.Heartbeat); err != nil {
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
	child := requests.ChildOf(l.Leaf(), r, scope, now)
	child.ID = broker.DelegationID(id)
	wider := requests.RefuseWider(op, l.Nodes, child, r.TTL)
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

// permitAll asks policy for each tool of a scope. When the receiver is in another trust domain, a permit must name both
// domains.
func (e *Engine) permitAll(ctx context.Context, op string, policy broker.Policy, q broker.Question, scope broker.Scope,
	l records.Lineage) (deciders []string, err error) {
	for _, right := range scope {
		d, err := e.permit(ctx, op, policy, q, right.Tool, l)
		if err != nil {
			return nil, err
		}
		if !requests.PermitsBoth(d.Domains, q.Caller.ID.TrustDomain(), q.Receiver.TrustDomain()) {
			return nil, e.recordDenial(ctx, q.Caller, l, right.Tool,
				broker.Errorf(broker.Denied, op, "the receiver is in another trust domain and no policy names both").
					With(broker.CodeForeignDomain).Decided(d.Policies).
					Lacks("a permit that names both trust domains", "domain:"+q.Receiver.TrustDomain().Name()))
		}
		deciders = append(deciders, d.Policies...)
	}
	return unique(deciders), nil
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
