package engine

import (
	"context"
	"errors"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// undeliverable reports whether a sealed secret was neither collected nor kept, so that no collector can get it.
func (e *Engine) undeliverable(g *broker.Grant) bool {
	return g.Sealed != "" && g.State == broker.StateIssued && g.Collected.IsZero() &&
		!e.deliveries.Has(g.ID) && !e.reaper.IsMinting(g.ID)
}

// bindSeal writes the seal into the grant. It refuses a collector of another trust domain.
func (s *issue) bindSeal(ctx context.Context, l records.Lineage) error {
	seal := s.request.Seal
	if seal == nil {
		return nil
	}
	s.grant.Sealed, s.grant.Collector = seal.Thumbprint, seal.Collector
	if s.grant.Collector.IsZero() {
		s.grant.Collector = s.caller.ID
	}
	if !s.grant.Collector.MemberOf(s.caller.ID.TrustDomain()) {
		return s.deny(ctx, l, broker.Errorf(broker.Denied, opIssue, "the collector is in another trust domain").
			With(broker.CodeForeignDomain).
			Lacks("name a collector in your own trust domain", "domain:"+s.grant.Collector.TrustDomain().Name()))
	}
	return nil
}

// deliver is step 7 for a sealed step: it encrypts the secret, keeps it for the collector, and wipes the plain text.
func (s *issue) deliver(secret broker.Secret) error {
	defer secret.Wipe()
	sealed, err := s.request.Seal.Encrypt(s.grant, secret)
	if err == nil {
		err = s.e.deliveries.Put(s.grant.ID, sealed)
	}
	var refusal *broker.Error
	if err != nil && !errors.As(err, &refusal) {
		refusal = broker.Errorf(broker.Unavailable, opIssue, "the broker cannot keep the sealed secret and ends it").
			With(broker.CodeDeliveryLost).Because(err)
	}
	if refusal != nil {
		return refusal
	}
	return nil
}

// Collect gives a sealed secret to its collector, once. It records the collection before it returns the secret, in a
// transaction that finds nothing fenced and the grant not expired.
//
// Errors: Unauthenticated, NotFound (no such grant, or it is not sealed for the caller), Revoked, Expired
// (CodeDeliveryLost: the broker no longer keeps the secret), Conflict with CodeAlreadyCollected (the consequence that
// policy attaches to a second use has been applied), Unavailable.
func (e *Engine) Collect(ctx context.Context, caller broker.Caller, id broker.GrantID) (broker.Grant, []byte, error) {
	c := &collection{e: e, caller: caller, now: e.cfg.Now()}
	if err := caller.Check(opCollect, c.now); err != nil {
		return broker.Grant{}, nil, err
	}
	err := e.view(ctx, opCollect, func(tx *records.Tx) error { return c.read(tx, id) })
	if isUnknown(err) || err == nil && c.grant.Collector != caller.ID {
		return broker.Grant{}, nil, e.refuseStranger(ctx, caller, c.lineage, c.grant.Tool, records.UnknownGrant(opCollect))
	}
	if err != nil {
		return broker.Grant{}, nil, err
	}
	if caller.ID == c.lineage.Leaf().Holder {
		e.watchdog.BeatAgain(c.grant.Delegation, c.now)
	}
	if err := e.update(ctx, opCollect, func(tx *records.Tx) error { return c.record(tx, id) }); err != nil {
		return broker.Grant{}, nil, c.refuse(ctx, err)
	}
	sealed := e.deliveries.Take(id)
	if sealed == nil { // a fence came between the commit and here
		return broker.Grant{}, nil, broker.Errorf(broker.Revoked, opCollect,
			"the grant has just ended; nothing is handed out").With(broker.CodeFenced)
	}
	return c.grant, sealed, nil
}

const opCollect = "collect"

// collection is one run of [Engine.Collect].
type collection struct {
	e       *Engine
	caller  broker.Caller
	now     time.Time
	grant   broker.Grant
	lineage records.Lineage
}

func (c *collection) read(tx *records.Tx, id broker.GrantID) error {
	g, ok, err := tx.Grant(id)
	if err == nil && (!ok || g.Sealed == "") {
		err = records.UnknownGrant(opCollect)
	}
	if err != nil {
		return err
	}
	c.grant = g
	c.lineage, err = tx.Lineage(opCollect, g.Delegation)
	return err
}

// record is the commit point. It repeats the checks of step 6 of an issue, and refuses a secret that was collected.
func (c *collection) record(tx *records.Tx, id broker.GrantID) error {
	if err := c.read(tx, id); err != nil {
		return err
	}
	g := c.grant
	if g.Fence != nil {
		return records.Fenced(opCollect, g.Fence)
	}
	f, err := tx.FenceOver(c.lineage, c.lineage.Subject(g))
	ended := g.State != broker.StateIssued || g.Ending != "" || !c.now.Before(g.Expires)
	switch {
	case err != nil:
		return err
	case f != nil:
		return records.Fenced(opCollect, f)
	case !g.Collected.IsZero():
		return broker.Errorf(broker.Conflict, opCollect, "the secret was collected at %s, and is handed out once",
			g.Collected.UTC().Format(time.RFC3339)).With(broker.CodeAlreadyCollected)
	case !c.e.deliveries.Has(id) && (!ended || g.Ending == broker.EndingFailed):
		return broker.Errorf(broker.Expired, opCollect, "the broker no longer keeps the secret, and ends it").
			With(broker.CodeDeliveryLost)
	case ended:
		return broker.Errorf(broker.Expired, opCollect, "the grant has ended").With(broker.CodeExpired)
	}
	if err := tx.CheckUsable(opCollect, c.lineage, c.lineage.Subject(g), c.now); err != nil {
		return err
	}
	g.Collected = c.now
	if err := tx.PutGrant(g); err != nil {
		return err
	}
	entry := records.GrantEntry(&g, broker.OpCollected, c.now)
	entry.Actor, entry.Detail = c.caller.ID.String(), ""
	_, err = tx.Enter(entry)
	c.grant = g
	return err
}

// refuse records a refusal and applies its consequences.
func (c *collection) refuse(ctx context.Context, err error) error {
	var refusal *broker.Error
	switch {
	case !errors.As(err, &refusal):
		return err
	case refusal.Code == broker.CodeAlreadyCollected:
		return c.secondUse(ctx, refusal)
	case refusal.Code == broker.CodeDeliveryLost:
		c.e.reaper.EndNow(c.grant)
	}
	if refusal.Kind == broker.Unavailable || refusal.Kind == broker.Internal {
		return refusal
	}
	return c.e.recordDenial(ctx, c.caller, c.lineage, c.grant.Tool, refusal)
}

// secondUse applies the consequence of collecting a secret twice. The code stays already_collected: the collector must
// know that another party has the secret.
func (c *collection) secondUse(ctx context.Context, refusal *broker.Error) error {
	policy := c.e.cfg.Policy()
	t, _ := policy.Tool(c.grant.Tool)
	d := policy.Decide(violationQuestion(c.caller, c.lineage, broker.ViolationSecondUse, t, c.now))
	return c.e.refuseBreach(ctx, breach{op: opCollect, code: broker.ViolationSecondUse, actor: c.caller.ID.String(),
		lineage: c.lineage, tool: c.grant.Tool, grant: c.grant.ID, decision: d, freeze: c.caller.ID,
		noSecret: c.grant.State == broker.StateClosed, now: c.now}, refusal)
}
