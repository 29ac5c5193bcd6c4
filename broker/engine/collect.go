package engine

import (
	"context"
	"errors"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// undeliverable reports whether a sealed secret can reach nobody: it was not collected, and is not kept.
func (b *Engine) undeliverable(g *broker.Grant) bool {
	return g.Sealed != "" && g.State == broker.StateIssued && g.Collected.IsZero() && !b.deliveries.Has(g.ID) && !b.reaper.IsMinting(g.ID)
}

// bind writes the seal into the grant, and refuses a collector whom the step may not reach.
func (s *issue) bind(ctx context.Context, p records.Lineage) error {
	seal := s.r.Seal
	if seal == nil {
		return nil
	}
	s.grant.Sealed, s.grant.Collector = seal.Thumbprint, seal.Collector
	if s.grant.Collector.IsZero() {
		s.grant.Collector = s.c.ID
	}
	if !s.grant.Collector.MemberOf(s.c.ID.TrustDomain()) {
		return s.b.denied(ctx, s.c, p, s.tool.Name, broker.Errorf(broker.Denied, opIssue, "the collector is in another trust domain").With(broker.CodeForeignDomain).
			Lacks("have a workload of your own trust domain collect it", "domain:"+s.grant.Collector.TrustDomain().Name()))
	}
	return nil
}

// deliver is step 7 for a sealed step: the secret is encrypted at once, and wiped.
func (s *issue) deliver(secret broker.Secret) error {
	defer secret.Wipe()
	sealed, err := s.r.Seal.Encrypt(s.grant, secret)
	if err == nil {
		err = s.b.deliveries.Put(s.grant.ID, sealed)
	}
	var e *broker.Error
	if err != nil && !errors.As(err, &e) {
		e = broker.Errorf(broker.Unavailable, opIssue, "the secret cannot be kept sealed; it is being ended").With(broker.CodeDeliveryLost).Because(err)
	}
	if e != nil {
		return e
	}
	return nil
}

// Collect gives a sealed secret to its collector, once. That it was collected is recorded before
// anything is given, in a transaction that finds nothing fenced and the grant still in time.
//
// Errors: Unauthenticated, NotFound (no such grant, or it is not sealed for the caller), Revoked,
// Expired (CodeDeliveryLost: it is not kept any more), Conflict with CodeAlreadyCollected, after
// which what policy says has followed, Unavailable.
func (b *Engine) Collect(ctx context.Context, c broker.Caller, id broker.GrantID) (broker.Grant, []byte, error) {
	k := &collecting{b: b, c: c, now: b.cfg.Now()}
	if err := c.Check(opCollect, k.now); err != nil {
		return broker.Grant{}, nil, err
	}
	if err := b.view(ctx, opCollect, func(tx *records.Tx) error { return k.read(tx, id) }); err != nil {
		return broker.Grant{}, nil, err
	}
	if k.grant.Collector != c.ID {
		return broker.Grant{}, nil, b.violated(ctx, c, k.path, broker.ViolationHolder, k.grant.Tool, records.UnknownGrant(opCollect))
	}
	if c.ID == k.path.Leaf().Holder {
		b.watchdog.BeatAgain(k.grant.Delegation, k.now)
	}
	if err := b.update(ctx, opCollect, func(tx *records.Tx) error { return k.record(tx, id) }); err != nil {
		return broker.Grant{}, nil, k.refused(ctx, err)
	}
	sealed := b.deliveries.Take(id)
	if sealed == nil { // it was fenced just after it was recorded
		return broker.Grant{}, nil, broker.Errorf(broker.Revoked, opCollect, "it has just ended; nothing is handed out").With(broker.CodeFenced)
	}
	return k.grant, sealed, nil
}

const opCollect = "collect"

// collecting is one run of [Broker.Collect].
type collecting struct {
	b     *Engine
	c     broker.Caller
	now   time.Time
	grant broker.Grant
	path  records.Lineage
}

func (k *collecting) read(tx *records.Tx, id broker.GrantID) error {
	g, ok, err := tx.Grant(id)
	if err == nil && (!ok || g.Sealed == "") {
		err = records.UnknownGrant(opCollect)
	}
	if err != nil {
		return err
	}
	k.grant = g
	k.path, err = tx.Lineage(opCollect, g.Delegation)
	return err
}

// record is the commit point: what step 6 of an issue checks, checked again, and that nobody has
// collected it.
func (k *collecting) record(tx *records.Tx, id broker.GrantID) error {
	if err := k.read(tx, id); err != nil {
		return err
	}
	g := k.grant
	if g.Fence != nil {
		return records.Fenced(opCollect, g.Fence)
	}
	f, err := tx.FenceOver(k.path, k.path.Subject(g))
	over := g.State != broker.StateIssued || g.Ending != "" || !k.now.Before(g.Expires)
	switch {
	case err != nil:
		return err
	case f != nil:
		return records.Fenced(opCollect, f)
	case !g.Collected.IsZero():
		return broker.Errorf(broker.Conflict, opCollect, "it was collected at %s, and is given once", g.Collected.UTC().Format(time.RFC3339)).With(broker.CodeAlreadyCollected)
	case !k.b.deliveries.Has(id) && (!over || g.Ending == broker.EndingFailed):
		return broker.Errorf(broker.Expired, opCollect, "it is not kept any more, and is being ended").With(broker.CodeDeliveryLost)
	case over:
		return broker.Errorf(broker.Expired, opCollect, "the grant is over").With(broker.CodeExpired)
	}
	if err := tx.CheckUsable(opCollect, k.path, k.path.Subject(g), k.now); err != nil {
		return err
	}
	g.Collected = k.now
	if err := tx.PutGrant(g); err != nil {
		return err
	}
	e := records.GrantEntry(&g, broker.OpCollected, k.now)
	e.Actor, e.Detail = k.c.ID.String(), ""
	_, err = tx.Enter(e)
	k.grant = g
	return err
}

// refused has follow what a refusal calls for.
func (k *collecting) refused(ctx context.Context, err error) error {
	var e *broker.Error
	switch {
	case !errors.As(err, &e):
		return err
	case e.Code == broker.CodeAlreadyCollected:
		return k.secondUse(ctx, e)
	case e.Code == broker.CodeDeliveryLost:
		k.b.reaper.EndNow(k.grant)
	}
	if e.Kind == broker.Unavailable || e.Kind == broker.Internal {
		return e
	}
	return k.b.denied(ctx, k.c, k.path, k.grant.Tool, e)
}

// secondUse applies the consequence of collecting a secret twice. The code stays already_collected: the collector must know that
// another party has the secret.
func (k *collecting) secondUse(ctx context.Context, e *broker.Error) error {
	policy := k.b.cfg.Policy()
	t, _ := policy.Tool(k.grant.Tool)
	return k.b.refuseBreach(ctx, breach{op: opCollect, code: broker.ViolationSecondUse, actor: k.c.ID.String(), path: k.path, tool: k.grant.Tool, grant: k.grant.ID,
		decision: policy.Decide(violationQuestion(k.c, k.path, broker.ViolationSecondUse, t, k.now)), freeze: k.c.ID, noSecret: k.grant.State == broker.StateClosed, now: k.now}, e)
}
