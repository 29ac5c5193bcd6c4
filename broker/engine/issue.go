package engine

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// issue is one run of the numbered procedure of architecture.md, "Issue". Its methods are the
// steps; between any two of them the process may die, and [Broker.Resume] must find enough in
// the ledger to leave nothing alive that it does not know.
type issue struct {
	b      *Engine
	c      broker.Caller
	r      broker.StepRequest
	policy broker.Policy
	tool   broker.Tool
	now    time.Time
	asked  broker.Question // what was decided, with the history as it was then
	answer broker.Decision
	grant  broker.Grant
	saved  records.EncodedGrant // the grant as this issue recorded it last
	mine   bool                 // what was read last is what this issue recorded
	again  bool                 // the idempotency key was used for this step before
}

// Issue gives one secret for one step with one tool, or nothing.
//
// Errors: Malformed, Unauthenticated, NotFound (the delegation is not the caller's), Denied,
// Revoked, Expired, Conflict (idempotency key), Unavailable. After Unavailable with
// CodeOutcomeUnknown the broker hunts down what may have been minted; ask again with a new key.
func (b *Engine) Issue(ctx context.Context, c broker.Caller, r broker.StepRequest) (broker.Issued, error) {
	s := &issue{b: b, c: c, r: r, policy: b.cfg.Policy(), now: b.cfg.Now()}
	p, err := s.decide(ctx) // steps 0 and 1
	if err != nil {
		return broker.Issued{}, err
	}
	mine := s.grant.ID // which a repeated key replaces by the grant that it names
	if r.Seal != nil {
		if err := b.deliveries.Reserve(s.grant); err != nil {
			return broker.Issued{}, err
		}
	}
	prefetched := s.prefetchToken(ctx, p) // step 3, beside step 2 where that wastes nothing
	if err := s.intend(ctx); err != nil { // step 2
		prefetched.drop(ctx, b)
		b.deliveries.Take(mine)
		if broker.KindOf(err) == broker.Unavailable {
			b.reaper.EndNow(s.grant) // whether it was recorded may not be known
		}
		return broker.Issued{}, s.explain(ctx, p, err)
	}
	if s.again {
		prefetched.drop(ctx, b)
		b.deliveries.Take(mine)
		return broker.Issued{Grant: s.grant, Repeated: true}, nil
	}
	b.reaper.BeginMint(s.grant)
	defer b.reaper.EndMint(s.grant.ID)
	secret, err := s.mint(ctx, prefetched)
	if err == nil && r.Seal != nil {
		err = s.deliver(secret)
		secret = broker.Secret{}
	}
	if err != nil {
		b.deliveries.Take(s.grant.ID)
		b.reaper.EndMint(s.grant.ID) // first: the closer leaves alone what is being minted
		b.reaper.EndNow(s.grant)
		return broker.Issued{}, err
	}
	return broker.Issued{Grant: s.grant, Secret: secret}, nil // step 7 is the server's
}

const opIssue = "issue"

// decide is steps 0 and 1: who asks, for what exactly, and may they.
func (s *issue) decide(ctx context.Context) (p records.Lineage, err error) {
	if err := s.c.Check(opIssue, s.now); err != nil {
		return p, err
	}
	if err := checkText(opIssue, "purpose", s.r.Purpose, 0, broker.MaxTask); err != nil {
		return p, err
	}
	if err := checkText(opIssue, "idempotency key", s.r.Key, 0, 128); err != nil {
		return p, err
	}
	if s.r.TTL < 0 {
		return p, broker.Errorf(broker.Malformed, opIssue, "the lifetime is negative")
	}
	p, history, err := s.b.held(ctx, opIssue, s.c, s.r.Delegation, s.now)
	if err != nil {
		return p, err
	}
	s.tool, _ = s.policy.Tool(s.r.Tool)
	s.asked = broker.Question{Action: broker.ActionUse, Caller: s.c, Tool: s.tool, Args: s.r.Args, Chain: p.Chain, Depth: p.Depth(),
		History: history, Now: s.now}
	if err := s.b.refuseCanary(ctx, opIssue, s.policy, s.asked, p, nil, s.r.Tool); err != nil {
		return p, err
	}
	// Policy speaks before scope: a forbidden tool is a violation whether it was delegated or not.
	if s.answer, err = s.b.permit(ctx, opIssue, s.policy, s.asked, s.r.Tool, p); err != nil {
		return p, err
	}
	if err := s.inScope(ctx, p); err != nil {
		return p, err
	}
	if err := s.checkObligations(ctx, p, s.answer); err != nil {
		return p, err
	}
	if err := s.narrow(p, s.answer); err != nil {
		return p, err
	}
	return p, s.bind(ctx, p)
}

// inScope checks the tool and each argument against the declaration and every ancestor.
func (s *issue) inScope(ctx context.Context, p records.Lineage) error {
	if wrong := s.tool.Check(s.r.Args); len(wrong) > 0 {
		return s.b.denied(ctx, s.c, p, s.tool.Name, broker.Errorf(broker.Denied, opIssue, "the arguments are not what tool %q takes: %s", s.tool.Name, strings.Join(wrong, ", ")).
			With(broker.CodeArgumentOutside).Lacks("see the tool's declaration", prefixed("argument:", wrong)...))
	}
	for i, d := range p.Nodes {
		right, ok := d.Scope.Right(s.tool.Name)
		if leaf := i == len(p.Nodes)-1; !ok || leaf && !right.Use {
			return s.b.violated(ctx, s.c, p, broker.ViolationScope, s.tool.Name, broker.Errorf(broker.Denied, opIssue, "your delegation does not let you use tool %q", s.tool.Name).
				With(broker.CodeToolNotDelegated).Lacks("ask whoever delegated to you for a delegation that has it", "tool:"+string(s.tool.Name)+":use"))
		}
		if outside := right.Allows(s.r.Args); len(outside) > 0 {
			return s.b.violated(ctx, s.c, p, broker.ViolationScope, s.tool.Name, broker.Errorf(broker.Denied, opIssue, "outside your delegation of tool %q: %s", s.tool.Name, strings.Join(outside, ", ")).
				With(broker.CodeArgumentOutside).Lacks("stay inside the delegation, or ask for a wider one", prefixed("argument:", outside)...))
		}
	}
	return nil
}

func prefixed(prefix string, names []string) []string {
	out := make([]string, len(names))
	for i, n := range names {
		out[i] = prefix + n
	}
	return out
}

// checkObligations checks what an allow asks for in return.
func (s *issue) checkObligations(ctx context.Context, p records.Lineage, d broker.Decision) error {
	if s.tool.Narrowing < d.Narrowing {
		return s.b.denied(ctx, s.c, p, s.tool.Name, broker.Errorf(broker.Denied, opIssue, "policy wants secrets narrowed %q and tool %q gives %q", d.Narrowing, s.tool.Name, s.tool.Narrowing).
			With(broker.CodeNarrowingTooWeak).Decided(d.Policies).Lacks("use a tool whose secrets are narrower", "narrowing:"+d.Narrowing.String()))
	}
	if d.Approval != "" {
		return s.b.denied(ctx, s.c, p, s.tool.Name, broker.Errorf(broker.Denied, opIssue, "this step must be approved first: %s", d.Approval).
			With(broker.CodeApprovalNeeded).Decided(d.Policies).Lacks(cmp.Or(d.Remedy, "have it approved by "+d.Approval), "approval:"+d.Approval))
	}
	return nil
}

// narrow makes the grant: its life is the least of all that bounds it.
func (s *issue) narrow(p records.Lineage, d broker.Decision) error {
	ttl := s.tool.Lifetime()
	for _, bound := range []time.Duration{s.r.TTL, d.TTL} {
		if bound > 0 {
			ttl = min(ttl, bound)
		}
	}
	expires := s.now.Add(ttl)
	for _, end := range append(ends(p.Nodes), s.c.NotAfter) {
		if end.Before(expires) {
			expires = end
		}
	}
	// Vault counts in seconds, and a life below one would round to none or to more.
	if expires = expires.Truncate(time.Second); expires.Sub(s.now) < time.Second {
		return broker.Errorf(broker.Expired, opIssue, "less than a second is left of the delegation or of your identity").With(broker.CodeExpired)
	}
	id, err := s.b.newID("gr")
	if err != nil {
		return err
	}
	digest := s.r.Args.Digest()
	s.grant = broker.Grant{ID: broker.GrantID(id), Chain: p.Chain.ID, Delegation: p.Leaf().ID, Caller: s.c.ID, Tool: s.tool.Name,
		Backend: s.tool.Backend, Narrowing: s.tool.Narrowing, Args: s.r.Args, ArgsDigest: hex.EncodeToString(digest[:]), Purpose: s.r.Purpose,
		Path: strings.Join(s.tool.Path, "/"), State: broker.StateIntent, Created: s.now, Expires: expires,
		Bundle: s.policy.Digest(), Policies: d.Policies}
	return nil
}

func ends(nodes []broker.Delegation) (ends []time.Time) {
	for _, d := range nodes {
		ends = append(ends, d.Expires)
	}
	return ends
}

// intend is step 2, one transaction: nothing on the records.Lineage is fenced, no budget of the records.Lineage is
// exceeded, policy allows it with the history as it is now, the key is new → INTENT. A crash
// after it leaves an INTENT under which nothing can have been made in Vault.
func (s *issue) intend(ctx context.Context) error {
	next, err := records.EncodeGrant(s.grant)
	if err != nil {
		return err
	}
	return s.b.update(ctx, opIssue, func(tx *records.Tx) error { return s.recordIntent(tx, next) })
}

func (s *issue) recordIntent(tx *records.Tx, next records.EncodedGrant) error {
	s.again = false
	p, err := tx.Lineage(opIssue, s.grant.Delegation)
	if err != nil {
		return err
	}
	if err := tx.CheckUsable(opIssue, p, p.Subject(s.grant), s.now); err != nil {
		return err
	}
	if known, err := s.once(tx); known || err != nil {
		return err
	}
	if err := s.spend(tx, p); err != nil {
		return err
	}
	if err := tx.AddEncoded(next); err != nil {
		return err
	}
	s.saved, s.grant = next, next.Grant
	_, err = tx.Enter(s.entry(broker.OpIntent, s.grant.Purpose))
	return err
}

// once looks the idempotency key up, and takes it when it is new.
func (s *issue) once(tx *records.Tx) (known bool, err error) {
	if s.r.Key == "" {
		return false, nil
	}
	digest := sha256.Sum256([]byte(s.r.Key))
	id, used, err := tx.Once(s.grant.Delegation, digest)
	if err != nil {
		return false, err
	}
	if !used {
		return false, tx.TakeOnce(s.grant.Delegation, digest, s.grant.ID)
	}
	old, _, err := tx.Grant(id)
	if err != nil {
		return false, err
	}
	// A key is looked up under its delegation, which one caller holds: from anybody else it is
	// refused with the delegation.
	if old.Tool != s.grant.Tool {
		return false, broker.Errorf(broker.Conflict, opIssue, "this idempotency key was used for a step with tool %q", old.Tool).
			With(broker.CodeKeyOtherTool).Lacks("use a new key for a new step", "tool:"+string(old.Tool))
	}
	if old.Args.Digest() != s.grant.Args.Digest() {
		return false, broker.Errorf(broker.Conflict, opIssue, "this idempotency key was used for a step with other arguments").
			With(broker.CodeKeyOtherArguments).Lacks("use a new key for a new step", "arguments")
	}
	if old.Sealed != s.grant.Sealed || old.Collector != s.grant.Collector {
		return false, broker.Errorf(broker.Conflict, opIssue, "this idempotency key was used for a step that was sealed otherwise").
			With(broker.CodeKeyOtherSeal).Lacks("use a new key for a new step", "seal")
	}
	s.grant, s.again = old, true
	return true, nil
}

// spend counts the step on every node of the records.Lineage that counts, in-flight steps included.
func (s *issue) spend(tx *records.Tx, p records.Lineage) error {
	for i, d := range p.Nodes {
		u, err := tx.Usage(d.ID)
		if err != nil {
			return err
		}
		if i == 0 {
			if err := s.stillAllowed(u); err != nil {
				return err
			}
		}
		if limit := u.Exceeded(d.Budget, s.tool.Name, s.now); limit != "" {
			return s.overBudget(limit)
		}
		u.Count(s.tool.Name, s.now)
		if err := tx.PutUsage(d.ID, u); err != nil {
			return err
		}
	}
	return nil
}

// stillAllowed decides again when other steps of the chain have begun since: a rule over the
// history must hold when steps race. A decision is a pure function, so that is cheap here.
func (s *issue) stillAllowed(u records.Usage) error {
	begun := 0
	for _, past := range s.asked.History {
		begun += past.Count
	}
	if begun == u.Steps {
		return nil
	}
	q := s.asked
	q.History = u.Tools
	d := s.policy.Decide(q)
	if !d.Allow || d.Failed {
		return &forbidding{q, d}
	}
	if d.Approval != s.answer.Approval || d.Narrowing != s.answer.Narrowing || d.TTL != s.answer.TTL {
		return broker.Errorf(broker.Conflict, opIssue, "another step of the chain came between; ask again").After(time.Millisecond)
	}
	return nil
}

// forbidding carries a deny out of a transaction, so that its consequence follows after it.
type forbidding struct {
	q broker.Question
	d broker.Decision
}

func (*forbidding) Error() string { return "policy forbids it with the history as it is now" }

func (s *issue) overBudget(limit string) *broker.Error {
	e := broker.Errorf(broker.Denied, opIssue, "the budget is used up: %s", strings.TrimPrefix(limit, "budget:")).
		With(broker.CodeBudgetExhausted).Lacks("ask whoever delegated to you for more", limit)
	if limit == "budget:per_minute" {
		return e.With(broker.CodeTooFast).After(time.Minute - time.Duration(s.now.Unix()%60)*time.Second)
	}
	return e
}

// explain records a refusal of step 2 and lets policy say what follows a budget that is used
// up or a replayed key.
func (s *issue) explain(ctx context.Context, p records.Lineage, err error) error {
	var no *forbidding
	var e *broker.Error
	switch {
	case errors.As(err, &no):
		return s.b.forbidden(ctx, opIssue, no.q, no.d, p)
	case !errors.As(err, &e):
		return err
	case e.Code == broker.CodeBudgetExhausted || e.Code == broker.CodeTooFast:
		return s.b.violated(ctx, s.c, p, broker.ViolationBudget, s.tool.Name, e)
	case e.Code == broker.CodeKeyOtherTool || e.Code == broker.CodeKeyOtherArguments:
		return s.b.violated(ctx, s.c, p, broker.ViolationReplay, s.tool.Name, e)
	case e.Kind == broker.Unavailable || e.Kind == broker.Internal:
		return e
	}
	return s.b.denied(ctx, s.c, p, s.tool.Name, e)
}

// mint is steps 3 to 6. After an error from it the grant is the closer's: whatever may exist is
// named in the ledger by then.
func (s *issue) mint(ctx context.Context, prefetched *stepToken) (broker.Secret, error) {
	// Step 3: a token that can mint this once. A crash before its accessor is recorded leaves a
	// token that nobody has, with no lease, that ends with the grant.
	m, token, err := s.token(ctx, prefetched)
	if err != nil {
		return broker.Secret{}, err
	}
	// The client's own going away must not cut the mint in two.
	mintCtx, cancel := after(ctx, s.b.cfg.MintTimeout)
	defer cancel()
	// Step 4: from here on the ledger can end whatever the token makes.
	if err := s.handle(ctx, token, m.TTL); err != nil {
		s.b.kill(ctx, token)
		return broker.Secret{}, err
	}
	if mintCtx.Err() != nil {
		return broker.Secret{}, broker.Errorf(broker.Unavailable, opIssue, "recording took longer than a mint may; nothing was minted").
			With(broker.CodeLedgerDown).After(time.Second)
	}
	// Step 5, once.
	lease, secret, err := s.b.cfg.Vault.Mint(mintCtx, token, m)
	if err != nil {
		return broker.Secret{}, s.mintFailed(ctx, err)
	}
	// Step 6, the commit point: handed over only when nothing is fenced now.
	if err := s.issued(ctx, lease); err != nil {
		secret.Wipe()
		return broker.Secret{}, err
	}
	return secret, nil
}

// handle is step 4. The time for the mint runs already, so that Settles is after its end.
func (s *issue) handle(ctx context.Context, token broker.Handle, longest time.Duration) error {
	settles := s.b.cfg.Now().Add(s.b.cfg.MintTimeout + s.b.cfg.MintBound)
	record := func(g broker.Grant) (records.EncodedGrant, error) {
		g.State, g.Token, g.Longest, g.Settles = broker.StateHandle, token, longest, settles
		return records.EncodeGrant(g)
	}
	expected, err := record(s.grant)
	if err != nil {
		return err
	}
	return s.b.update(ctx, opIssue, func(tx *records.Tx) error {
		g, err := s.recheck(tx)
		if err != nil {
			return err
		}
		next := expected
		if !s.mine {
			if next, err = record(g); err != nil {
				return err
			}
		}
		if err := s.save(tx, next); err != nil {
			return err
		}
		_, err = tx.Enter(s.entry(broker.OpHandle, ""))
		return err
	})
}

// issued is step 6. When it refuses, the lease is recorded all the same, so that it can be
// ended by name.
func (s *issue) issued(ctx context.Context, lease broker.Lease) error {
	record := func(g broker.Grant, refused error) (records.EncodedGrant, error) {
		if g.State, g.Lease = broker.StateIssued, lease; refused != nil {
			g.State, g.Ending = broker.StateHandle, broker.EndingFailed
		}
		return records.EncodeGrant(g)
	}
	expected, err := record(s.grant, nil)
	if err != nil {
		return err
	}
	var refused error
	err = s.b.update(ctx, opIssue, func(tx *records.Tx) error {
		g, err := s.recheck(tx)
		if refused = err; err != nil && broker.KindOf(err) != broker.Revoked && broker.KindOf(err) != broker.Expired {
			return err
		}
		next, op := expected, broker.OpIssued
		if refused != nil {
			op = broker.OpEnd
		}
		if refused != nil || !s.mine {
			if next, err = record(g, refused); err != nil {
				return err
			}
		}
		if err := s.save(tx, next); err != nil {
			return err
		}
		_, err = tx.Enter(s.entry(op, ""))
		return err
	})
	if err != nil {
		return err
	}
	return refused
}

// save records the grant, and keeps what was recorded.
func (s *issue) save(tx *records.Tx, e records.EncodedGrant) error {
	s.saved, s.grant = e, e.Grant
	return tx.PutEncoded(e)
}

// recheck reads the grant again and refuses it when anything over it is fenced or out of time.
// The grant is given with the refusal.
func (s *issue) recheck(tx *records.Tx) (broker.Grant, error) {
	g, same, ok, err := tx.GrantAgain(s.saved)
	s.mine = same
	if ok && g.State == broker.StateClosed && g.Ending == broker.EndingRevoked {
		return g, broker.Errorf(broker.Revoked, opIssue, "revoked while it was on its way; nothing more is handed out").With(broker.CodeFenced)
	}
	if err != nil || !ok || g.State == broker.StateClosed {
		return s.grant, broker.Errorf(broker.Expired, opIssue, "the grant is over").With(broker.CodeExpired).Because(err)
	}
	if g.Fence != nil {
		return g, records.Fenced(opIssue, g.Fence)
	}
	p, err := tx.Lineage(opIssue, g.Delegation)
	if err != nil {
		return g, err
	}
	now := s.b.cfg.Now()
	if err := tx.CheckUsable(opIssue, p, p.Subject(g), now); err != nil {
		return g, err
	}
	if !now.Before(g.Expires) {
		return g, broker.Errorf(broker.Expired, opIssue, "the step took longer than its secret would have lived").With(broker.CodeExpired)
	}
	return g, nil
}

// mintFailed sorts what a failed mint may have left. The closer ends it either way. A fence that
// killed the step's token is what the agent is told of, not Vault's refusal.
func (s *issue) mintFailed(ctx context.Context, err error) error {
	var over error
	if s.b.view(context.WithoutCancel(ctx), opIssue, func(tx *records.Tx) error { _, over = s.recheck(tx); return nil }) == nil &&
		(broker.KindOf(over) == broker.Revoked || broker.KindOf(over) == broker.Expired) && over != nil {
		return over
	}
	if errors.Is(err, broker.ErrNotMinted) {
		return asUnavailable(err, broker.CodeVaultDown, "Vault did not mint; nothing was made")
	}
	clean, cancel := after(ctx, s.b.cfg.MintTimeout)
	defer cancel()
	recordErr := s.b.update(clean, opIssue, func(tx *records.Tx) error {
		_, err := tx.Enter(s.entry(broker.OpUnknown, "the mint's outcome is not known"))
		return err
	})
	if recordErr != nil {
		s.b.cfg.Alarm("recording a mint whose outcome is unknown", recordErr)
	}
	return broker.Errorf(broker.Unavailable, opIssue, "it is not known whether Vault minted; whatever exists is being ended").
		With(broker.CodeOutcomeUnknown).Because(err).Lacks("ask again, with a new idempotency key").After(time.Second)
}

func (s *issue) entry(op broker.Op, detail string) broker.Entry {
	return broker.Entry{At: s.b.cfg.Now(), Actor: s.c.ID.String(), Op: op, Chain: s.grant.Chain, Delegation: s.grant.Delegation,
		Grant: s.grant.ID, Tool: s.grant.Tool, Bundle: s.grant.Bundle, Policies: s.grant.Policies, Detail: detail}
}
