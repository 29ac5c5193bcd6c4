package engine

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
)

var (
	errSealedTooLarge = errors.New("the sealed secret is larger than is kept")
	errSealedFull     = errors.New("too many sealed secrets wait to be collected")
)

// deliveries holds what is sealed and not collected, in memory alone: like every secret it is in no
// ledger, and a restart loses it.
type deliveries struct {
	mu      sync.Mutex // guards what follows
	waiting map[broker.GrantID]delivery
	each    map[spiffeid.ID]int
	bytes   int
}

type delivery struct {
	sealed []byte
	asker  spiffeid.ID
}

// reserve takes a place before anything is minted for it.
func (d *deliveries) reserve(g broker.Grant) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.waiting) >= broker.MaxWaiting || d.each[g.Caller] >= broker.MaxWaitingEach || d.bytes >= broker.MaxSealedBytes {
		return broker.Errorf(broker.Unavailable, opIssue, "%v; nothing was minted", errSealedFull).With(broker.CodeDeliveriesFull).After(time.Second)
	}
	if d.waiting == nil {
		d.waiting, d.each = map[broker.GrantID]delivery{}, map[spiffeid.ID]int{}
	}
	d.waiting[g.ID] = delivery{asker: g.Caller}
	d.each[g.Caller]++
	return nil
}

// put fills the place. It fails when the grant has ended meanwhile, and its place is gone.
func (d *deliveries) put(id broker.GrantID, sealed []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	at, ok := d.waiting[id]
	switch {
	case !ok:
		return broker.Errorf(broker.Revoked, opIssue, "it ended while it was on its way; nothing is handed out").With(broker.CodeFenced)
	case len(sealed) > broker.MaxSealed:
		return errSealedTooLarge
	case d.bytes+len(sealed) > broker.MaxSealedBytes:
		return errSealedFull
	}
	at.sealed = sealed
	d.waiting[id] = at
	d.bytes += len(sealed)
	return nil
}

func (d *deliveries) has(id broker.GrantID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.waiting[id].sealed != nil
}

// take gives a delivery and forgets it; nil: there is none.
func (d *deliveries) take(id broker.GrantID) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	at, ok := d.waiting[id]
	if !ok {
		return nil
	}
	delete(d.waiting, id)
	if d.each[at.asker]--; d.each[at.asker] == 0 {
		delete(d.each, at.asker)
	}
	d.bytes -= len(at.sealed)
	return at.sealed
}

// drop forgets what ends.
func (d *deliveries) drop(grants []broker.Grant) {
	for _, g := range grants {
		if g.Sealed != "" {
			d.take(g.ID)
		}
	}
}

// lost reports whether a sealed secret can reach nobody: it was not collected, and is not kept.
func (b *Engine) lost(g *broker.Grant) bool {
	return g.Sealed != "" && g.State == broker.StateIssued && g.Collected.IsZero() && !b.deliveries.has(g.ID) && !b.closer.isMinting(g.ID)
}

// bind writes the seal into the grant, and refuses a collector whom the step may not reach.
func (s *issue) bind(ctx context.Context, p path) error {
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
		err = s.b.deliveries.put(s.grant.ID, sealed)
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
	if err := b.view(ctx, opCollect, func(tx broker.Tx) error { return k.read(tx, id) }); err != nil {
		return broker.Grant{}, nil, err
	}
	if k.grant.Collector != c.ID {
		return broker.Grant{}, nil, b.violated(ctx, c, k.path, broker.ViolationHolder, k.grant.Tool, unknownGrant(opCollect))
	}
	if c.ID == k.path.leaf().Holder {
		b.watchdog.again(k.grant.Delegation, k.now)
	}
	if err := b.update(ctx, opCollect, func(tx broker.Tx) error { return k.record(tx, id) }); err != nil {
		return broker.Grant{}, nil, k.refused(ctx, err)
	}
	sealed := b.deliveries.take(id)
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
	path  path
}

func (k *collecting) read(tx broker.Tx, id broker.GrantID) error {
	g, ok, err := load[broker.Grant](tx, keyGrant(id))
	if err == nil && (!ok || g.Sealed == "") {
		err = unknownGrant(opCollect)
	}
	if err != nil {
		return err
	}
	k.grant = g
	k.path, err = k.b.readPath(tx, opCollect, g.Delegation)
	return err
}

// record is the commit point: what step 6 of an issue checks, checked again, and that nobody has
// collected it.
func (k *collecting) record(tx broker.Tx, id broker.GrantID) error {
	if err := k.read(tx, id); err != nil {
		return err
	}
	g := k.grant
	if g.Fence != nil {
		return fencedError(opCollect, g.Fence)
	}
	f, err := k.b.fenceOver(tx, k.path, k.path.subject(g))
	over := g.State != broker.StateIssued || g.Ending != "" || !k.now.Before(g.Expires)
	switch {
	case err != nil:
		return err
	case f != nil:
		return fencedError(opCollect, f)
	case !g.Collected.IsZero():
		return broker.Errorf(broker.Conflict, opCollect, "it was collected at %s, and is given once", g.Collected.UTC().Format(time.RFC3339)).With(broker.CodeAlreadyCollected)
	case !k.b.deliveries.has(id) && (!over || g.Ending == broker.EndingFailed):
		return broker.Errorf(broker.Expired, opCollect, "it is not kept any more, and is being ended").With(broker.CodeDeliveryLost)
	case over:
		return broker.Errorf(broker.Expired, opCollect, "the grant is over").With(broker.CodeExpired)
	}
	if err := k.b.usable(tx, opCollect, k.path, k.path.subject(g), k.now); err != nil {
		return err
	}
	g.Collected = k.now
	if err := save(tx, keyGrant(id), g); err != nil {
		return err
	}
	e := grantEntry(&g, broker.OpCollected, k.now)
	e.Actor, e.Detail = k.c.ID.String(), ""
	_, err = enter(tx, e)
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
		k.b.closer.hurry(k.grant)
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
