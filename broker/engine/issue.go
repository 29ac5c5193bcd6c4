package engine

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/requests"
)

// Issue, the numbered procedure (docs/architecture.md):
//
//  0. Check the identity and the request.                              decide
//  1. Decide on one policy snapshot, and narrow the grant.             decide
//  2. Commit the intended grant: INTENT.                               intend
//  3. Create the step's token below the delegation's token.            obtainToken; prefetchToken, before 2
//  4. Commit the token's accessor: HANDLE.                             recordHandle; intend, where 3 came first
//  5. Mint, once.                                                      mint
//  6. Order the lease: ISSUED. This is the commit point.               recordIssued
//  7. Hand the secret over, or seal it for its collector.              the server, or deliver
//
// The process may die between any two steps. Each step names the state that a crash after it leaves. From that state
// Resume ends everything that the issue may have created. Package internal/model checks the procedure in all orders.

// issue is one run of the procedure.
type issue struct {
	e         *Engine
	caller    broker.Caller
	request   broker.StepRequest
	policy    broker.Policy
	tool      broker.Tool
	now       time.Time
	asked     broker.Question // to policy in step 1, with the histories of that moment
	use       records.CallerUse
	answer    broker.Decision // of policy in step 1
	grant     broker.Grant
	name      string               // of the token that mints
	saved     records.EncodedGrant // the grant as this issue recorded it last
	unchanged bool                 // the last read found the grant as saved
	repeated  bool                 // the idempotency key was used for this step before
}

// Issue gives one secret for one step with one tool, or nothing.
//
// Errors: Malformed, Unauthenticated, NotFound (the delegation is not the caller's), Denied, Revoked, Expired, Conflict
// (idempotency key), OverLimit (too many steps of the caller wait), Unavailable. After Unavailable with
// CodeOutcomeUnknown the broker ends any secret that Vault may have minted, and the agent asks again with a new key.
func (e *Engine) Issue(ctx context.Context, c broker.Caller, r broker.StepRequest) (broker.Issued, error) {
	policy := e.cfg.Policy()
	tool, _ := policy.Tool(r.Tool) // steps with tools that do not exist wait for each other
	done, err := e.turns.Take(ctx, tool.Backend, c.ID)
	if err != nil {
		return broker.Issued{}, err
	}
	defer done()
	s := &issue{e: e, caller: c, request: r, policy: policy, now: e.cfg.Now()}
	// Steps 0 and 1. A crash after them leaves nothing.
	l, err := s.decide(ctx)
	if err != nil {
		return broker.Issued{}, err
	}
	reserved := s.grant.ID // a repeated key replaces s.grant by the earlier grant
	if r.Seal != nil {
		if err := e.deliveries.Reserve(s.grant); err != nil {
			return broker.Issued{}, err
		}
	}
	// Step 3 first where the token is unlikely to be wasted. Step 2 then does the work of step 4.
	prefetched := s.prefetchToken(ctx, l)
	mintCtx, cancel := detached(ctx, e.cfg.MintTimeout) // of a mint for that token: see step 4
	defer cancel()
	if err := s.intend(ctx, prefetched); err != nil {
		prefetched.drop(ctx, e)
		e.deliveries.Take(reserved)
		if broker.KindOf(err) == broker.Unavailable { // the commit may have succeeded, and nothing is minted
			if prefetched.made() {
				s.recordNothing(ctx)
			}
			e.reaper.EndNow(s.grant)
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
	secret, err := s.issue(ctx, mintCtx, prefetched) // steps 3 to 6
	if err == nil && r.Seal != nil {
		err = s.deliver(secret)
		secret = broker.Secret{}
	}
	if err != nil {
		e.deliveries.Take(s.grant.ID)
		e.reaper.EndMint(s.grant.ID) // before EndNow: the reaper leaves grants in minting alone
		e.reaper.EndNow(s.grant)
		return broker.Issued{}, err
	}
	if s.grant.Held {
		e.Holds.Expect(s.grant.ID, closing.HoldGrace)
	}
	return broker.Issued{Grant: s.grant, Secret: secret}, nil // step 7, by the server; a crash leaves the ISSUED grant
}

const opIssue = "issue"

// decide is steps 0 and 1: it validates the request, asks policy, and builds the grant.
func (s *issue) decide(ctx context.Context) (l records.Lineage, err error) {
	if err := s.caller.Check(opIssue, s.now); err != nil {
		return l, err
	}
	if err := requests.CheckText(opIssue, "purpose", s.request.Purpose, 0, broker.MaxTask); err != nil {
		return l, err
	}
	if err := requests.CheckText(opIssue, "idempotency key", s.request.Key, 0, 128); err != nil {
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
	s.asked = broker.Question{Action: broker.ActionUse, Caller: s.caller, Tool: s.tool, Args: s.request.Args,
		Chain: l.Chain, Depth: l.Depth(), History: history, Now: s.now}
	s.use = records.CallerUse{Subjects: records.Subjects(s.caller, l.Chain), Windows: broker.CallerWindows(s.policy)}
	if len(s.use.Windows) > 0 {
		if err := s.e.view(ctx, opIssue, func(tx *records.Tx) (err error) {
			s.asked.CallerHistory, err = tx.CallerHistory(s.use, s.now)
			return err
		}); err != nil {
			return l, err
		}
	}
	if err := s.e.refuseCanary(ctx, opIssue, s.policy, s.asked, l, nil, s.request.Tool); err != nil {
		return l, err
	}
	// Policy comes before scope: a forbidden tool is a violation even when it was not delegated.
	if s.answer, err = s.e.permit(ctx, opIssue, s.policy, s.asked, s.request.Tool, l); err != nil {
		return l, err
	}
	s.use.Limits = s.answer.Limits
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

// deny records the refusal and returns it.
func (s *issue) deny(ctx context.Context, l records.Lineage, refusal *broker.Error) error {
	return s.e.recordDenial(ctx, s.caller, l, s.tool.Name, refusal)
}

// denyViolation applies the consequence of a violation and returns the refusal.
func (s *issue) denyViolation(ctx context.Context, l records.Lineage, v broker.ViolationCode, refusal *broker.Error,
) error {
	return s.e.refuseViolation(ctx, s.caller, l, v, s.tool.Name, refusal)
}

// checkScope checks the tool and each argument against the tool's declaration and every delegation of the lineage.
func (s *issue) checkScope(ctx context.Context, l records.Lineage) error {
	tool := s.tool.Name
	if wrong := s.tool.Check(s.request.Args); len(wrong) > 0 {
		return s.deny(ctx, l, broker.Errorf(broker.Denied, opIssue,
			"tool %q does not take these arguments: %s", tool, strings.Join(wrong, ", ")).
			With(broker.CodeArgumentOutside).Lacks("see the tool's declaration", prefixed("argument:", wrong)...))
	}
	for i, d := range l.Nodes {
		right, ok := d.Scope.Right(tool)
		if leaf := i == len(l.Nodes)-1; !ok || leaf && !right.Use {
			return s.denyViolation(ctx, l, broker.ViolationScope,
				broker.Errorf(broker.Denied, opIssue, "your delegation does not let you use tool %q", tool).
					With(broker.CodeToolNotDelegated).
					Lacks("ask your delegator for a delegation with this tool", "tool:"+string(tool)+":use"))
		}
		if outside := right.Allows(s.request.Args); len(outside) > 0 {
			return s.denyViolation(ctx, l, broker.ViolationScope, broker.Errorf(broker.Denied, opIssue,
				"outside your delegation of tool %q: %s", tool, strings.Join(outside, ", ")).
				With(broker.CodeArgumentOutside).
				Lacks("stay inside the delegation, or ask for a wider one", prefixed("argument:", outside)...))
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

// checkObligations checks the obligations of an allow: narrowing and approval.
func (s *issue) checkObligations(ctx context.Context, l records.Lineage, d broker.Decision) error {
	if s.tool.Narrowing < d.Narrowing {
		return s.deny(ctx, l, broker.Errorf(broker.Denied, opIssue,
			"policy wants secrets narrowed %q and tool %q gives %q", d.Narrowing, s.tool.Name, s.tool.Narrowing).
			With(broker.CodeNarrowingTooWeak).Decided(d.Policies).
			Lacks("use a tool with narrower secrets", "narrowing:"+d.Narrowing.String()))
	}
	if d.Approval != "" {
		return s.deny(ctx, l, broker.Errorf(broker.Denied, opIssue, "this step must be approved first: %s", d.Approval).
			With(broker.CodeApprovalNeeded).Decided(d.Policies).
			Lacks(cmp.Or(d.Remedy, "have it approved by "+d.Approval), "approval:"+d.Approval))
	}
	return nil
}

// buildGrant builds the grant. Its lifetime is the least of all limits: the tool, the request, the decision, each
// delegation of the lineage, and the caller's SVID.
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
	// Vault counts whole seconds. It would round a lifetime below one second to none, or up.
	if expires = expires.Truncate(time.Second); expires.Sub(s.now) < time.Second {
		return broker.Errorf(broker.Expired, opIssue, "less than a second is left of the delegation or of your identity").
			With(broker.CodeExpired)
	}
	id, err := s.e.newID("gr")
	if err != nil {
		return err
	}
	digest := s.request.Args.Digest()
	s.grant = broker.Grant{ID: broker.GrantID(id), Chain: l.Chain.ID, Delegation: l.Leaf().ID, Caller: s.caller.ID,
		Tool: s.tool.Name, Backend: s.tool.Backend, Narrowing: s.tool.Narrowing, Args: s.request.Args,
		ArgsDigest: hex.EncodeToString(digest[:]), Purpose: s.request.Purpose, Path: s.tool.Path,
		Held: s.request.Held, State: broker.StateIntent, Created: s.now, Expires: expires, Bundle: s.policy.Digest(),
		Policies: d.Policies, Counted: s.use.Keys(s.tool.Name)}
	return nil
}

func expiries(nodes []broker.Delegation) (list []time.Time) {
	for _, d := range nodes {
		list = append(list, d.Expires)
	}
	return list
}

// intend is step 2, one transaction. No node of the lineage is fenced, no budget is exceeded, policy allows the step
// with the present history, and the idempotency key is new. Then it records the INTENT. Where step 3 came first, it
// records the HANDLE with it: step 4.
//
// A crash after it leaves an INTENT without a token's accessor, so Vault has minted nothing for it; or a HANDLE, as step
// 4 leaves it.
func (s *issue) intend(ctx context.Context, prefetched *stepToken) error {
	intended := s.grant
	if prefetched.made() {
		intended = s.withHandle(intended, prefetched.token, prefetched.mint)
	}
	next, err := records.EncodeGrant(intended)
	if err != nil {
		return err
	}
	return s.e.update(ctx, opIssue, func(tx *records.Tx) error {
		err := s.recordIntent(tx, next)
		if err == nil && !s.repeated && prefetched.made() && prefetched.ahead != nil {
			err = prefetched.ahead.DropRecord(tx)
		}
		return err
	})
}

// withHandle returns the grant with the record of the token that mints. MintDeadline is after the last moment at which Vault
// may complete the mint, since the mint's timeout begins before this call.
func (s *issue) withHandle(g broker.Grant, token broker.Handle, m broker.Mint) broker.Grant {
	g.State, g.Longest = broker.StateHandle, m.TTL
	if m.Shared != nil {
		g.DelegationToken = token
	} else {
		g.Token = token
	}
	g.MintDeadline = s.e.cfg.Now().Add(s.e.cfg.MintTimeout + s.e.cfg.MintBound)
	return g
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
	if !s.now.Before(s.grant.Expires) {
		return tooLate()
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
	if err == nil && s.grant.State == broker.StateHandle {
		_, err = tx.Enter(s.entry(broker.OpHandle, ""))
	}
	return err
}

// claimKey records a new idempotency key for the grant. For a known key it replaces s.grant by the earlier grant, and
// refuses the key for any other step.
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
	// Keys are stored by delegation, and one caller holds a delegation. Other callers were refused before this.
	refuse := func(code broker.Code, other, missing string) error {
		return broker.Errorf(broker.Conflict, opIssue, "this idempotency key was used for a step %s", other).
			With(code).Lacks("use a new key for a new step", missing)
	}
	if old.Tool != s.grant.Tool {
		return false, refuse(broker.CodeKeyOtherTool, fmt.Sprintf("with tool %q", old.Tool), "tool:"+string(old.Tool))
	}
	if old.Args.Digest() != s.grant.Args.Digest() {
		return false, refuse(broker.CodeKeyOtherArguments, "with other arguments", "arguments")
	}
	if old.Sealed != s.grant.Sealed || old.Collector != s.grant.Collector {
		return false, refuse(broker.CodeKeyOtherSeal, "with another seal", "seal")
	}
	s.grant, s.repeated = old, true
	return true, nil
}

// spendBudgets counts the step on every node of the lineage, and for its caller and its chain's principal. Steps in
// flight count.
func (s *issue) spendBudgets(tx *records.Tx, l records.Lineage) error {
	for i, d := range l.Nodes {
		u, err := tx.Usage(d.ID)
		if err != nil {
			return err
		}
		if i == 0 {
			if err := s.redecide(tx, u); err != nil {
				return err
			}
			if err := tx.OverLimit(opIssue, s.use, s.now); err != nil {
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
	return tx.CountCaller(s.grant.Counted, s.tool.Name, s.now)
}

// redecide decides again when other steps of the chain or of its caller have begun since step 1, or have come to nothing:
// a policy over the history must hold when steps race. A decision is a pure function, so it is cheap inside a
// transaction.
func (s *issue) redecide(tx *records.Tx, u records.Usage) error {
	caller, err := tx.CallerHistory(s.use, s.now)
	if err != nil {
		return err
	}
	if records.SameHistory(s.asked.History, u.Tools) && maps.EqualFunc(caller, s.asked.CallerHistory, maps.Equal) {
		return nil
	}
	q := s.asked
	q.History, q.CallerHistory = u.Tools, caller
	d := s.policy.Decide(q)
	if !d.Allow || d.Failed {
		return &deniedNow{q, d}
	}
	if d.Approval != s.answer.Approval || d.Narrowing != s.answer.Narrowing || d.TTL != s.answer.TTL ||
		!slices.Equal(d.Limits, s.answer.Limits) {
		return broker.Errorf(broker.Conflict, opIssue, "another step of the chain or of its caller came between; ask again").
			After(time.Millisecond)
	}
	return nil
}

// deniedNow carries a deny out of the transaction of step 2. Its consequence needs a transaction of its own.
type deniedNow struct {
	q broker.Question
	d broker.Decision
}

func (*deniedNow) Error() string { return "policy denies the step with the chain's present history" }

func (s *issue) overBudget(limit string) *broker.Error {
	refusal := broker.Errorf(broker.Denied, opIssue, "the budget is used up: %s", strings.TrimPrefix(limit, "budget:")).
		With(broker.CodeBudgetExhausted).Lacks("ask your delegator for a larger budget", limit)
	if limit == "budget:per_minute" {
		return refusal.With(broker.CodeTooFast).After(time.Minute - time.Duration(s.now.Unix()%60)*time.Second)
	}
	return refusal
}

// refuseIntent records a refusal of step 2. For an exhausted budget and a replayed key it applies the consequence that
// policy attaches to them.
func (s *issue) refuseIntent(ctx context.Context, l records.Lineage, err error) error {
	var denied *deniedNow
	var refusal *broker.Error
	switch {
	case errors.As(err, &denied):
		return s.e.refuseForbidden(ctx, opIssue, denied.q, denied.d, l)
	case !errors.As(err, &refusal):
		return err
	case refusal.Code == broker.CodeBudgetExhausted || refusal.Code == broker.CodeTooFast:
		return s.denyViolation(ctx, l, broker.ViolationBudget, refusal)
	case refusal.Code == broker.CodeKeyOtherTool || refusal.Code == broker.CodeKeyOtherArguments:
		return s.denyViolation(ctx, l, broker.ViolationReplay, refusal)
	case refusal.Kind == broker.Unavailable || refusal.Kind == broker.Internal:
		return refusal
	}
	return s.deny(ctx, l, refusal)
}

// issue is steps 3 to 6. After an error the reaper ends the grant: the ledger has the accessor of any token that may
// have minted. mintCtx is of the mint for a prefetched token.
func (s *issue) issue(ctx, mintCtx context.Context, prefetched *stepToken) (broker.Secret, error) {
	if prefetched.made() { // step 2 has recorded it
		return s.mint(ctx, mintCtx, prefetched.mint, prefetched.token)
	}
	// Step 3. A crash after it leaves an INTENT, and a token that no process holds and that has no lease. Resume closes
	// the INTENT, and Vault expires the token at its hard maximum.
	m, token, err := s.obtainToken(ctx, prefetched)
	if err != nil {
		return broker.Secret{}, err
	}
	// The mint must complete although the client may disconnect.
	mintCtx, cancel := detached(ctx, s.e.cfg.MintTimeout)
	defer cancel()
	// Step 4. A crash after it leaves a HANDLE. Resume revokes the accessor, and with it every lease of the token.
	if err := s.recordHandle(ctx, token, m); err != nil {
		if m.Shared == nil {
			s.e.kill(ctx, token)
		}
		if broker.KindOf(err) == broker.Unavailable {
			s.recordNothing(ctx) // the commit may have succeeded, and nothing is minted
		}
		return broker.Secret{}, err
	}
	return s.mint(ctx, mintCtx, m, token)
}

// mint is steps 5 and 6.
func (s *issue) mint(ctx, mintCtx context.Context, m broker.Mint, token broker.Handle) (broker.Secret, error) {
	if mintCtx.Err() != nil {
		s.recordNothing(ctx)
		return broker.Secret{}, broker.Errorf(broker.Unavailable, opIssue,
			"recording the token took longer than a mint may; nothing was minted").
			With(broker.CodeLedgerDown).After(time.Second)
	}
	s.e.ahead.Next(s.grant, s.tool, m, s.name)
	// Step 5, without a retry. A crash after it leaves a HANDLE, and a lease that the ledger may not know. Resume
	// revokes the accessor, waits until no mint can be in flight, and the sweep ends a lease that outlived its token.
	lease, secret, err := s.e.cfg.Vault.Mint(mintCtx, token, m)
	if err != nil {
		return broker.Secret{}, s.mintFailed(ctx, err)
	}
	// Step 6, the commit point. A crash after it leaves an ISSUED grant, which ends at its expiry. A sealed secret is
	// lost with the process, so Resume ends its grant at once. A crash before ISSUED is durable leaves the HANDLE of step
	// 4, although the secret may have been handed over: Resume ends it, and its latest end is in the HANDLE.
	if err := s.recordIssued(ctx, lease, m.Named); err != nil {
		secret.Wipe()
		s.suspect() // the ledger may not know the lease
		return broker.Secret{}, err
	}
	return secret, nil
}

// recordHandle is step 4.
func (s *issue) recordHandle(ctx context.Context, token broker.Handle, m broker.Mint) error {
	record := func(g broker.Grant) (records.EncodedGrant, error) {
		return records.EncodeGrant(s.withHandle(g, token, m))
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

// recordIssued is step 6. When the grant was fenced or expired meanwhile, it records the lease nevertheless and returns
// the refusal. The reaper then revokes the lease by name.
//
// The record is ordered, not waited for: the HANDLE is durable, and ends whatever it made. It is waited for where a crash
// would lose more than that: the only name of the secret, or the end of all that is obtained with it.
func (s *issue) recordIssued(ctx context.Context, lease broker.Lease, named bool) error {
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
	commit := func(tx *records.Tx) error {
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
	}
	if named || !lease.Outlives.IsZero() {
		err = s.e.update(ctx, opIssue, commit)
	} else {
		err = s.order(ctx, commit)
	}
	if err != nil {
		return err
	}
	return refusal
}

// order is [Engine.update] that does not wait for the disk. When the write fails later, it ends the grant.
func (s *issue) order(ctx context.Context, f func(*records.Tx) error) error {
	e, g := s.e, s.grant
	lost := func(err error) {
		if err == nil || e.ctx.Err() != nil { // the next process ends the HANDLE
			return
		}
		e.cfg.Alarm("recording a secret that was handed out; it is ended", err)
		e.reaper.EndLost(g)
	}
	return e.order(ctx, opIssue, f, lost)
}

// save writes the grant and keeps it.
func (s *issue) save(tx *records.Tx, encoded records.EncodedGrant) error {
	s.saved, s.grant = encoded, encoded.Grant
	return tx.PutEncoded(encoded)
}

// recheck reads the grant again, and refuses it when it or a node of its lineage is fenced or expired. It returns the
// grant with the refusal.
func (s *issue) recheck(tx *records.Tx) (broker.Grant, error) {
	g, unchanged, ok, err := tx.RereadGrant(s.saved)
	s.unchanged = unchanged
	if ok && g.State == broker.StateClosed && g.Ending == broker.EndingRevoked {
		return g, broker.Errorf(broker.Revoked, opIssue, "revoked while the step was in flight; nothing more is handed out").
			With(broker.CodeFenced)
	}
	if err != nil || !ok || g.State == broker.StateClosed {
		return s.grant, broker.Errorf(broker.Expired, opIssue, "the grant has ended").With(broker.CodeExpired).Because(err)
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
		return g, tooLate()
	}
	return g, nil
}

func tooLate() *broker.Error {
	return broker.Errorf(broker.Expired, opIssue, "issuing took longer than the secret's lifetime").
		With(broker.CodeExpired)
}

// mintFailed classifies a failed mint: fenced or expired, certainly not minted, or unknown. The reaper ends the grant
// in each case. A fence makes the broker kill the token that mints, and Vault then refuses the mint. The agent gets the
// fence as the reason, not Vault's refusal. No failed step ends a token that it shares.
func (s *issue) mintFailed(ctx context.Context, err error) error {
	if errors.Is(err, broker.ErrNotMinted) {
		s.recordNothing(ctx)
	} else {
		s.suspect()
	}
	var ended error
	readErr := s.e.view(context.WithoutCancel(ctx), opIssue, func(tx *records.Tx) error {
		_, ended = s.recheck(tx)
		return nil
	})
	if kind := broker.KindOf(ended); readErr == nil && (kind == broker.Revoked || kind == broker.Expired) {
		return ended
	}
	if errors.Is(err, broker.ErrNotMinted) {
		return asUnavailable(err, broker.CodeVaultDown, "Vault did not mint; nothing was made")
	}
	recordCtx, cancel := detached(ctx, s.e.cfg.MintTimeout)
	defer cancel()
	recordErr := s.e.update(recordCtx, opIssue, func(tx *records.Tx) error {
		_, err := tx.Enter(s.entry(broker.OpUnknown, "the mint's outcome is not known"))
		return err
	})
	if recordErr != nil {
		s.e.cfg.Alarm("recording a mint whose outcome is unknown", recordErr)
	}
	return broker.Errorf(broker.Unavailable, opIssue,
		"it is not known whether Vault minted; the broker ends any secret that exists").
		With(broker.CodeOutcomeUnknown).Because(err).Lacks("ask again, with a new idempotency key").After(time.Second)
}

// suspect tells the sweeper of a lease that the ledger may not know. A step that shares a token has none.
func (s *issue) suspect() {
	if s.grant.DelegationToken.Accessor == "" {
		s.e.sweeper.Suspect()
	}
}

// recordNothing records that Vault certainly made nothing. The reaper then closes the grant at once, and gives the step
// back to its budgets in the same transaction. If this fails, the grant is closed as one with an unknown outcome.
func (s *issue) recordNothing(ctx context.Context) {
	ctx, cancel := detached(ctx, s.e.cfg.MintTimeout)
	defer cancel()
	err := s.e.update(ctx, opIssue, func(tx *records.Tx) error {
		g, ok, err := tx.Grant(s.grant.ID)
		if err != nil || !ok || g.State != broker.StateHandle {
			return err
		}
		g.NothingMade = true
		if err := tx.PutGrant(g); err != nil {
			return err
		}
		_, err = tx.Enter(s.entry(broker.OpEnd, "nothing was made"))
		return err
	})
	if err != nil {
		s.e.cfg.Alarm("recording a step for which nothing was made", err)
	}
}

func (s *issue) entry(op broker.Op, detail string) broker.Entry {
	return broker.Entry{At: s.e.cfg.Now(), Actor: s.caller.ID.String(), Op: op, Chain: s.grant.Chain,
		Delegation: s.grant.Delegation, Grant: s.grant.ID, Tool: s.grant.Tool, Bundle: s.grant.Bundle,
		Policies: s.grant.Policies, Detail: detail}
}
