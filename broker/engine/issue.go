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
	e         *Engine
	caller    broker.Caller
	request   broker.StepRequest
	policy    broker.Policy
	tool      broker.Tool
	now       time.Time
	asked     broker.Question // what was decided, with the history as it was then
	answer    broker.Decision
	grant     broker.Grant
	saved     records.EncodedGrant // the grant as this issue recorded it last
	unchanged bool                 // what was read last is what this issue recorded
	repeated  bool                 // the idempotency key was used for this step before
}

// Issue gives one secret for one step with one tool, or nothing.
//
// Errors: Malformed, Unauthenticated, NotFound (the delegation is not the caller's), Denied,
// Revoked, Expired, Conflict (idempotency key), Unavailable. After Unavailable with
// CodeOutcomeUnknown the broker hunts down what may have been minted; ask again with a new key.
func (e *Engine) Issue(ctx context.Context, c broker.Caller, r broker.StepRequest) (broker.Issued, error) {
	s := &issue{e: e, caller: c, request: r, policy: e.cfg.Policy(), now: e.cfg.Now()}
	l, err := s.decide(ctx) // steps 0 and 1
	if err != nil {
		return broker.Issued{}, err
	}
	reserved := s.grant.ID // which a repeated key replaces by the grant that it names
	if r.Seal != nil {
		if err := e.deliveries.Reserve(s.grant); err != nil {
			return broker.Issued{}, err
		}
	}
	prefetched := s.prefetchToken(ctx, l) // step 3, beside step 2 where that wastes nothing
	if err := s.intend(ctx); err != nil { // step 2
		prefetched.drop(ctx, e)
		e.deliveries.Take(reserved)
		if broker.KindOf(err) == broker.Unavailable {
			e.reaper.EndNow(s.grant) // whether it was recorded may not be known
		}
		return broker.Issued{}, s.refuseIntent(ctx, l, err)
	}
	if s.repeated {
		prefetched.drop(ctx, e)
		e.deliveries.Take(reserved)
		return broker.Issued{Grant: s.grant, Repeated: true}, nil
	}
	e.reaper.BeginMint(s.grant)
	defer e.reaper.EndMint(s.grant.ID)
	secret, err := s.mint(ctx, prefetched)
	if err == nil && r.Seal != nil {
		err = s.deliver(secret)
		secret = broker.Secret{}
	}
	if err != nil {
		e.deliveries.Take(s.grant.ID)
		e.reaper.EndMint(s.grant.ID) // first: the closer leaves alone what is being minted
		e.reaper.EndNow(s.grant)
		return broker.Issued{}, err
	}
	return broker.Issued{Grant: s.grant, Secret: secret}, nil // step 7 is the server's
}

const opIssue = "issue"

// decide is steps 0 and 1: who asks, for what exactly, and may they.
func (s *issue) decide(ctx context.Context) (l records.Lineage, err error) {
	if err := s.caller.Check(opIssue, s.now); err != nil {
		return l, err
	}
	if err := checkText(opIssue, "purpose", s.request.Purpose, 0, broker.MaxTask); err != nil {
		return l, err
	}
	if err := checkText(opIssue, "idempotency key", s.request.Key, 0, 128); err != nil {
		return l, err
	}
	if s.request.TTL < 0 {
		return l, broker.Errorf(broker.Malformed, opIssue, "the lifetime is negative")
	}
	l, history, err := s.e.heldLineage(ctx, opIssue, s.caller, s.request.Delegation, s.now)
	if err != nil {
		return l, err
	}
	s.tool, _ = s.policy.Tool(s.request.Tool)
	s.asked = broker.Question{Action: broker.ActionUse, Caller: s.caller, Tool: s.tool, Args: s.request.Args, Chain: l.Chain, Depth: l.Depth(),
		History: history, Now: s.now}
	if err := s.e.refuseCanary(ctx, opIssue, s.policy, s.asked, l, nil, s.request.Tool); err != nil {
		return l, err
	}
	// Policy speaks before scope: a forbidden tool is a violation whether it was delegated or not.
	if s.answer, err = s.e.permit(ctx, opIssue, s.policy, s.asked, s.request.Tool, l); err != nil {
		return l, err
	}
	if err := s.checkScope(ctx, l); err != nil {
		return l, err
	}
	if err := s.checkObligations(ctx, l, s.answer); err != nil {
		return l, err
	}
	if err := s.buildGrant(l, s.answer); err != nil {
		return l, err
	}
	return l, s.bindSeal(ctx, l)
}

// inScope checks the tool and each argument against the declaration and every ancestor.
func (s *issue) checkScope(ctx context.Context, l records.Lineage) error {
	if wrong := s.tool.Check(s.request.Args); len(wrong) > 0 {
		return s.e.recordDenial(ctx, s.caller, l, s.tool.Name, broker.Errorf(broker.Denied, opIssue, "the arguments are not what tool %q takes: %s", s.tool.Name, strings.Join(wrong, ", ")).
			With(broker.CodeArgumentOutside).Lacks("see the tool's declaration", prefixed("argument:", wrong)...))
	}
	for i, d := range l.Nodes {
		right, ok := d.Scope.Right(s.tool.Name)
		if leaf := i == len(l.Nodes)-1; !ok || leaf && !right.Use {
			return s.e.refuseViolation(ctx, s.caller, l, broker.ViolationScope, s.tool.Name, broker.Errorf(broker.Denied, opIssue, "your delegation does not let you use tool %q", s.tool.Name).
				With(broker.CodeToolNotDelegated).Lacks("ask whoever delegated to you for a delegation that has it", "tool:"+string(s.tool.Name)+":use"))
		}
		if outside := right.Allows(s.request.Args); len(outside) > 0 {
			return s.e.refuseViolation(ctx, s.caller, l, broker.ViolationScope, s.tool.Name, broker.Errorf(broker.Denied, opIssue, "outside your delegation of tool %q: %s", s.tool.Name, strings.Join(outside, ", ")).
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
func (s *issue) checkObligations(ctx context.Context, l records.Lineage, d broker.Decision) error {
	if s.tool.Narrowing < d.Narrowing {
		return s.e.recordDenial(ctx, s.caller, l, s.tool.Name, broker.Errorf(broker.Denied, opIssue, "policy wants secrets narrowed %q and tool %q gives %q", d.Narrowing, s.tool.Name, s.tool.Narrowing).
			With(broker.CodeNarrowingTooWeak).Decided(d.Policies).Lacks("use a tool whose secrets are narrower", "narrowing:"+d.Narrowing.String()))
	}
	if d.Approval != "" {
		return s.e.recordDenial(ctx, s.caller, l, s.tool.Name, broker.Errorf(broker.Denied, opIssue, "this step must be approved first: %s", d.Approval).
			With(broker.CodeApprovalNeeded).Decided(d.Policies).Lacks(cmp.Or(d.Remedy, "have it approved by "+d.Approval), "approval:"+d.Approval))
	}
	return nil
}

// narrow makes the grant: its life is the least of all that bounds it.
func (s *issue) buildGrant(l records.Lineage, d broker.Decision) error {
	ttl := s.tool.Lifetime()
	for _, bound := range []time.Duration{s.request.TTL, d.TTL} {
		if bound > 0 {
			ttl = min(ttl, bound)
		}
	}
	expires := s.now.Add(ttl)
	for _, end := range append(expiries(l.Nodes), s.caller.NotAfter) {
		if end.Before(expires) {
			expires = end
		}
	}
	// Vault counts in seconds, and a life below one would round to none or to more.
	if expires = expires.Truncate(time.Second); expires.Sub(s.now) < time.Second {
		return broker.Errorf(broker.Expired, opIssue, "less than a second is left of the delegation or of your identity").With(broker.CodeExpired)
	}
	id, err := s.e.newID("gr")
	if err != nil {
		return err
	}
	digest := s.request.Args.Digest()
	s.grant = broker.Grant{ID: broker.GrantID(id), Chain: l.Chain.ID, Delegation: l.Leaf().ID, Caller: s.caller.ID, Tool: s.tool.Name,
		Backend: s.tool.Backend, Narrowing: s.tool.Narrowing, Args: s.request.Args, ArgsDigest: hex.EncodeToString(digest[:]), Purpose: s.request.Purpose,
		Path: strings.Join(s.tool.Path, "/"), State: broker.StateIntent, Created: s.now, Expires: expires,
		Bundle: s.policy.Digest(), Policies: d.Policies}
	return nil
}

func expiries(nodes []broker.Delegation) (list []time.Time) {
	for _, d := range nodes {
		list = append(list, d.Expires)
	}
	return list
}

// intend is step 2, one transaction: nothing on the records.Lineage is fenced, no budget of the records.Lineage is
// exceeded, policy allows it with the history as it is now, the key is new → INTENT. A crash
// after it leaves an INTENT under which nothing can have been made in Vault.
func (s *issue) intend(ctx context.Context) error {
	next, err := records.EncodeGrant(s.grant)
	if err != nil {
		return err
	}
	return s.e.update(ctx, opIssue, func(tx *records.Tx) error { return s.recordIntent(tx, next) })
}

func (s *issue) recordIntent(tx *records.Tx, next records.EncodedGrant) error {
	s.repeated = false
	l, err := tx.Lineage(opIssue, s.grant.Delegation)
	if err != nil {
		return err
	}
	if err := tx.CheckUsable(opIssue, l, l.Subject(s.grant), s.now); err != nil {
		return err
	}
	if known, err := s.claimKey(tx); known || err != nil {
		return err
	}
	if err := s.spendBudgets(tx, l); err != nil {
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
func (s *issue) claimKey(tx *records.Tx) (known bool, err error) {
	if s.request.Key == "" {
		return false, nil
	}
	digest := sha256.Sum256([]byte(s.request.Key))
	id, used, err := tx.GrantOfKey(s.grant.Delegation, digest)
	if err != nil {
		return false, err
	}
	if !used {
		return false, tx.PutKey(s.grant.Delegation, digest, s.grant.ID)
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
	s.grant, s.repeated = old, true
	return true, nil
}

// spend counts the step on every node of the records.Lineage that counts, in-flight steps included.
func (s *issue) spendBudgets(tx *records.Tx, l records.Lineage) error {
	for i, d := range l.Nodes {
		u, err := tx.Usage(d.ID)
		if err != nil {
			return err
		}
		if i == 0 {
			if err := s.redecide(u); err != nil {
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
func (s *issue) redecide(u records.Usage) error {
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
		return &deniedNow{q, d}
	}
	if d.Approval != s.answer.Approval || d.Narrowing != s.answer.Narrowing || d.TTL != s.answer.TTL {
		return broker.Errorf(broker.Conflict, opIssue, "another step of the chain came between; ask again").After(time.Millisecond)
	}
	return nil
}

// forbidding carries a deny out of a transaction, so that its consequence follows after it.
type deniedNow struct {
	q broker.Question
	d broker.Decision
}

func (*deniedNow) Error() string { return "policy forbids it with the history as it is now" }

func (s *issue) overBudget(limit string) *broker.Error {
	refusal := broker.Errorf(broker.Denied, opIssue, "the budget is used up: %s", strings.TrimPrefix(limit, "budget:")).
		With(broker.CodeBudgetExhausted).Lacks("ask whoever delegated to you for more", limit)
	if limit == "budget:per_minute" {
		return refusal.With(broker.CodeTooFast).After(time.Minute - time.Duration(s.now.Unix()%60)*time.Second)
	}
	return refusal
}

// explain records a refusal of step 2 and lets policy say what follows a budget that is used
// up or a replayed key.
func (s *issue) refuseIntent(ctx context.Context, l records.Lineage, err error) error {
	var denied *deniedNow
	var refusal *broker.Error
	switch {
	case errors.As(err, &denied):
		return s.e.refuseForbidden(ctx, opIssue, denied.q, denied.d, l)
	case !errors.As(err, &refusal):
		return err
	case refusal.Code == broker.CodeBudgetExhausted || refusal.Code == broker.CodeTooFast:
		return s.e.refuseViolation(ctx, s.caller, l, broker.ViolationBudget, s.tool.Name, refusal)
	case refusal.Code == broker.CodeKeyOtherTool || refusal.Code == broker.CodeKeyOtherArguments:
		return s.e.refuseViolation(ctx, s.caller, l, broker.ViolationReplay, s.tool.Name, refusal)
	case refusal.Kind == broker.Unavailable || refusal.Kind == broker.Internal:
		return refusal
	}
	return s.e.recordDenial(ctx, s.caller, l, s.tool.Name, refusal)
}

// mint is steps 3 to 6. After an error from it the grant is the closer's: whatever may exist is
// named in the ledger by then.
func (s *issue) mint(ctx context.Context, prefetched *stepToken) (broker.Secret, error) {
	// Step 3: a token that can mint this once. A crash before its accessor is recorded leaves a
	// token that nobody has, with no lease, that ends with the grant.
	m, token, err := s.obtainToken(ctx, prefetched)
	if err != nil {
		return broker.Secret{}, err
	}
	// The client's own going away must not cut the mint in two.
	mintCtx, cancel := detached(ctx, s.e.cfg.MintTimeout)
	defer cancel()
	// Step 4: from here on the ledger can end whatever the token makes.
	if err := s.recordHandle(ctx, token, m.TTL); err != nil {
		s.e.kill(ctx, token)
		return broker.Secret{}, err
	}
	if mintCtx.Err() != nil {
		return broker.Secret{}, broker.Errorf(broker.Unavailable, opIssue, "recording took longer than a mint may; nothing was minted").
			With(broker.CodeLedgerDown).After(time.Second)
	}
	// Step 5, once.
	lease, secret, err := s.e.cfg.Vault.Mint(mintCtx, token, m)
	if err != nil {
		return broker.Secret{}, s.mintFailed(ctx, err)
	}
	// Step 6, the commit point: handed over only when nothing is fenced now.
	if err := s.recordIssued(ctx, lease); err != nil {
		secret.Wipe()
		return broker.Secret{}, err
	}
	return secret, nil
}

// handle is step 4. The time for the mint runs already, so that Settles is after its end.
func (s *issue) recordHandle(ctx context.Context, token broker.Handle, longest time.Duration) error {
	settles := s.e.cfg.Now().Add(s.e.cfg.MintTimeout + s.e.cfg.MintBound)
	record := func(g broker.Grant) (records.EncodedGrant, error) {
		g.State, g.Token, g.Longest, g.Settles = broker.StateHandle, token, longest, settles
		return records.EncodeGrant(g)
	}
	expected, err := record(s.grant)
	if err != nil {
		return err
	}
	return s.e.update(ctx, opIssue, func(tx *records.Tx) error {
		g, err := s.recheck(tx)
		if err != nil {
			return err
		}
		next := expected
		if !s.unchanged {
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
func (s *issue) recordIssued(ctx context.Context, lease broker.Lease) error {
	record := func(g broker.Grant, refusal error) (records.EncodedGrant, error) {
		if g.State, g.Lease = broker.StateIssued, lease; refusal != nil {
			g.State, g.Ending = broker.StateHandle, broker.EndingFailed
		}
		return records.EncodeGrant(g)
	}
	expected, err := record(s.grant, nil)
	if err != nil {
		return err
	}
	var refusal error
	err = s.e.update(ctx, opIssue, func(tx *records.Tx) error {
		g, err := s.recheck(tx)
		if refusal = err; err != nil && broker.KindOf(err) != broker.Revoked && broker.KindOf(err) != broker.Expired {
			return err
		}
		next, op := expected, broker.OpIssued
		if refusal != nil {
			op = broker.OpEnd
		}
		if refusal != nil || !s.unchanged {
			if next, err = record(g, refusal); err != nil {
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
	return refusal
}

// save records the grant, and keeps what was recorded.
func (s *issue) save(tx *records.Tx, encoded records.EncodedGrant) error {
	s.saved, s.grant = encoded, encoded.Grant
	return tx.PutEncoded(encoded)
}

// recheck reads the grant again and refuses it when anything over it is fenced or out of time.
// The grant is given with the refusal.
func (s *issue) recheck(tx *records.Tx) (broker.Grant, error) {
	g, unchanged, ok, err := tx.RereadGrant(s.saved)
	s.unchanged = unchanged
	if ok && g.State == broker.StateClosed && g.Ending == broker.EndingRevoked {
		return g, broker.Errorf(broker.Revoked, opIssue, "revoked while it was on its way; nothing more is handed out").With(broker.CodeFenced)
	}
	if err != nil || !ok || g.State == broker.StateClosed {
		return s.grant, broker.Errorf(broker.Expired, opIssue, "the grant is over").With(broker.CodeExpired).Because(err)
	}
	if g.Fence != nil {
		return g, records.Fenced(opIssue, g.Fence)
	}
	l, err := tx.Lineage(opIssue, g.Delegation)
	if err != nil {
		return g, err
	}
	now := s.e.cfg.Now()
	if err := tx.CheckUsable(opIssue, l, l.Subject(g), now); err != nil {
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
	var ended error
	if s.e.view(context.WithoutCancel(ctx), opIssue, func(tx *records.Tx) error { _, ended = s.recheck(tx); return nil }) == nil &&
		(broker.KindOf(ended) == broker.Revoked || broker.KindOf(ended) == broker.Expired) && ended != nil {
		return ended
	}
	if errors.Is(err, broker.ErrNotMinted) {
		return asUnavailable(err, broker.CodeVaultDown, "Vault did not mint; nothing was made")
	}
	clean, cancel := detached(ctx, s.e.cfg.MintTimeout)
	defer cancel()
	recordErr := s.e.update(clean, opIssue, func(tx *records.Tx) error {
		_, err := tx.Enter(s.entry(broker.OpUnknown, "the mint's outcome is not known"))
		return err
	})
	if recordErr != nil {
		s.e.cfg.Alarm("recording a mint whose outcome is unknown", recordErr)
	}
	return broker.Errorf(broker.Unavailable, opIssue, "it is not known whether Vault minted; whatever exists is being ended").
		With(broker.CodeOutcomeUnknown).Because(err).Lacks("ask again, with a new idempotency key").After(time.Second)
}

func (s *issue) entry(op broker.Op, detail string) broker.Entry {
	return broker.Entry{At: s.e.cfg.Now(), Actor: s.caller.ID.String(), Op: op, Chain: s.grant.Chain, Delegation: s.grant.Delegation,
		Grant: s.grant.ID, Tool: s.grant.Tool, Bundle: s.grant.Bundle, Policies: s.grant.Policies, Detail: detail}
}
