package broker

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Seal asks that a step's secret is not in the answer, but kept encrypted to a key until whoever it
// is for collects it, once.
type Seal struct {
	Thumbprint string      // of the key (RFC 7638)
	Collector  spiffeid.ID // who may collect it; zero: the caller

	// Encrypt gives the secret encrypted to the key. It is called once, with a secret that is wiped
	// afterwards; nothing else of the request sees the secret.
	Encrypt func(Grant, Secret) ([]byte, error)
}

// Limits of sealed secrets that wait to be collected, over all chains.
const (
	MaxWaiting     = 4096     // deliveries
	maxWaitingEach = 256      // of them, asked for by one caller
	MaxSealed      = 64 << 10 // bytes of one
	maxSealedBytes = 64 << 20 // bytes of all
)

var (
	errSealedTooLarge = errors.New("the sealed secret is larger than is kept")
	errSealedFull     = errors.New("too many sealed secrets wait to be collected")
)

// deliveries holds what is sealed and not collected, in memory alone: like every secret it is in no
// ledger, and a restart loses it.
type deliveries struct {
	mu      sync.Mutex // guards what follows
	waiting map[GrantID]delivery
	each    map[spiffeid.ID]int
	bytes   int
}

type delivery struct {
	sealed []byte
	asker  spiffeid.ID
}

// reserve takes a place before anything is minted for it.
func (d *deliveries) reserve(g Grant) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.waiting) >= MaxWaiting || d.each[g.Caller] >= maxWaitingEach || d.bytes >= maxSealedBytes {
		return Errorf(Unavailable, opIssue, "%v; nothing was minted", errSealedFull).With(CodeDeliveriesFull).After(time.Second)
	}
	if d.waiting == nil {
		d.waiting, d.each = map[GrantID]delivery{}, map[spiffeid.ID]int{}
	}
	d.waiting[g.ID] = delivery{asker: g.Caller}
	d.each[g.Caller]++
	return nil
}

// put fills the place. It fails when the grant has ended meanwhile, and its place is gone.
func (d *deliveries) put(id GrantID, sealed []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	at, ok := d.waiting[id]
	switch {
	case !ok:
		return Errorf(Revoked, opIssue, "it ended while it was on its way; nothing is handed out").With(CodeFenced)
	case len(sealed) > MaxSealed:
		return errSealedTooLarge
	case d.bytes+len(sealed) > maxSealedBytes:
		return errSealedFull
	}
	at.sealed = sealed
	d.waiting[id] = at
	d.bytes += len(sealed)
	return nil
}

func (d *deliveries) has(id GrantID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.waiting[id].sealed != nil
}

// take gives a delivery and forgets it; nil: there is none.
func (d *deliveries) take(id GrantID) []byte {
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
func (d *deliveries) drop(grants []Grant) {
	for _, g := range grants {
		if g.Sealed != "" {
			d.take(g.ID)
		}
	}
}

// lost reports whether a sealed secret can reach nobody: it was not collected, and is not kept.
func (b *Broker) lost(g *Grant) bool {
	return g.Sealed != "" && g.State == StateIssued && g.Collected.IsZero() && !b.deliveries.has(g.ID) && !b.closer.isMinting(g.ID)
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
		return s.b.denied(ctx, s.c, p, s.tool.Name, Errorf(Denied, opIssue, "the collector is in another trust domain").With(CodeForeignDomain).
			Lacks("have a workload of your own trust domain collect it", "domain:"+s.grant.Collector.TrustDomain().Name()))
	}
	return nil
}

// deliver is step 7 for a sealed step: the secret is encrypted at once, and wiped.
func (s *issue) deliver(secret Secret) error {
	defer secret.Wipe()
	sealed, err := s.r.Seal.Encrypt(s.grant, secret)
	if err == nil {
		err = s.b.deliveries.put(s.grant.ID, sealed)
	}
	var e *Error
	if err != nil && !errors.As(err, &e) {
		e = Errorf(Unavailable, opIssue, "the secret cannot be kept sealed; it is being ended").With(CodeDeliveryLost).Because(err)
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
func (b *Broker) Collect(ctx context.Context, c Caller, id GrantID) (Grant, []byte, error) {
	k := &collecting{b: b, c: c, now: b.cfg.Now()}
	if err := c.authentic(opCollect, k.now); err != nil {
		return Grant{}, nil, err
	}
	if err := b.view(ctx, opCollect, func(tx Tx) error { return k.read(tx, id) }); err != nil {
		return Grant{}, nil, err
	}
	if k.grant.Collector != c.ID {
		return Grant{}, nil, b.violated(ctx, c, k.path, ViolationHolder, k.grant.Tool, unknownGrant(opCollect))
	}
	if c.ID == k.path.leaf().Holder {
		b.watchdog.again(k.grant.Delegation, k.now)
	}
	if err := b.update(ctx, opCollect, func(tx Tx) error { return k.record(tx, id) }); err != nil {
		return Grant{}, nil, k.refused(ctx, err)
	}
	sealed := b.deliveries.take(id)
	if sealed == nil { // it was fenced just after it was recorded
		return Grant{}, nil, Errorf(Revoked, opCollect, "it has just ended; nothing is handed out").With(CodeFenced)
	}
	return k.grant, sealed, nil
}

const opCollect = "collect"

// collecting is one run of [Broker.Collect].
type collecting struct {
	b     *Broker
	c     Caller
	now   time.Time
	grant Grant
	path  path
}

func (k *collecting) read(tx Tx, id GrantID) error {
	g, ok, err := load[Grant](tx, keyGrant(id))
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
func (k *collecting) record(tx Tx, id GrantID) error {
	if err := k.read(tx, id); err != nil {
		return err
	}
	g := k.grant
	if g.Fence != nil {
		return fencedError(opCollect, g.Fence)
	}
	f, err := k.b.fenceOver(tx, k.path, k.path.subject(g))
	over := g.State != StateIssued || g.Ending != "" || !k.now.Before(g.Expires)
	switch {
	case err != nil:
		return err
	case f != nil:
		return fencedError(opCollect, f)
	case !g.Collected.IsZero():
		return Errorf(Conflict, opCollect, "it was collected at %s, and is given once", g.Collected.UTC().Format(time.RFC3339)).With(CodeAlreadyCollected)
	case !k.b.deliveries.has(id) && (!over || g.Ending == EndingFailed):
		return Errorf(Expired, opCollect, "it is not kept any more, and is being ended").With(CodeDeliveryLost)
	case over:
		return Errorf(Expired, opCollect, "the grant is over").With(CodeExpired)
	}
	if err := k.b.usable(tx, opCollect, k.path, k.path.subject(g), k.now); err != nil {
		return err
	}
	g.Collected = k.now
	if err := save(tx, keyGrant(id), g); err != nil {
		return err
	}
	e := g.entry(OpCollected, k.now)
	e.Actor, e.Detail = k.c.ID.String(), ""
	_, err = enter(tx, e)
	k.grant = g
	return err
}

// refused has follow what a refusal calls for.
func (k *collecting) refused(ctx context.Context, err error) error {
	var e *Error
	switch {
	case !errors.As(err, &e):
		return err
	case e.Code == CodeAlreadyCollected:
		return k.secondUse(ctx, e)
	case e.Code == CodeDeliveryLost:
		k.b.closer.hurry(k.grant)
	}
	if e.Kind == Unavailable || e.Kind == Internal {
		return e
	}
	return k.b.denied(ctx, k.c, k.path, k.grant.Tool, e)
}

// secondUse applies the consequence of collecting a secret twice. The code stays already_collected: the collector must know that
// another party has the secret.
func (k *collecting) secondUse(ctx context.Context, e *Error) error {
	policy := k.b.cfg.Policy()
	t, _ := policy.Tool(k.grant.Tool)
	return k.b.refuseBreach(ctx, breach{op: opCollect, code: ViolationSecondUse, actor: k.c.ID.String(), path: k.path, tool: k.grant.Tool, grant: k.grant.ID,
		decision: policy.Decide(violationQuestion(k.c, k.path, ViolationSecondUse, t, k.now)), freeze: k.c.ID, noSecret: k.grant.State == StateClosed, now: k.now}, e)
}
