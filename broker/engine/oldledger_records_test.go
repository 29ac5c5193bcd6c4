package engine_test

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/args/argstest"
	"github.com/pawlsec/pawl/broker/selector"
)

// The functions below are the requests to the broker that dies. Each leaves records of some kinds.

const (
	usedKey   = "order 17"
	closedKey = "order 16"
)

var second = broker.Operator{Name: "ben"}

// adoptBundles puts four bundles in force, one of them by a rollback.
func (w *oldWriter) adoptBundles() {
	for _, a := range []broker.Adoption{
		{Name: "shop", Version: 3, Digest: "sha256:03"},
		{Name: "shop", Version: 6, Digest: "sha256:06", Signers: []string{"platform-1"}},
		{Name: "shop", Version: 5, Digest: "sha256:05", Signers: []string{"platform-1"}, By: "ana", Back: true},
		{Name: "shop", Version: 7, Digest: w.policy.Digest(), Signers: []string{"platform-1", "platform-2"}},
	} {
		pass(time.Second)
		w.must(w.Adopt(ctx, a))
	}
}

const shopTask = `keep the café open: <orders> & "stock"`

// openShop opens a chain that is open when the broker dies:
//
//	shop -> planner -> {fetcher -> parser -> printer, writer}
//
// Below the root each budget leaves one more step, or none. So the test detects a lost count.
func (w *oldWriter) openShop() {
	reads := func(table args.Constraint) []broker.Right {
		return []broker.Right{{Tool: "db.read", Use: true, Delegate: true,
			Args: map[string]args.Constraint{"table": table}}}
	}
	shop := w.open("shop", broker.OpenRequest{Task: shopTask, Depth: 6, TTL: 24 * time.Hour, Heartbeat: time.Hour,
		Rights: use("db.read", "db.write", "deploy", "mainframe", "token"),
		Labels: map[string]string{"env": "prod", "team": "payments", "note": "naïve, <b>"},
		Budget: broker.Budget{Steps: 200, Live: 40, PerMinute: 50,
			Tools: map[broker.ToolName]int{"db.read": 100, "deploy": 3}}})
	planner := w.share(shop, agent("planner"), broker.DelegateRequest{Depth: 5, Heartbeat: 30 * time.Minute,
		Budget: broker.Budget{Steps: 90, Tools: map[broker.ToolName]int{"token": 2}},
		Rights: []broker.Right{{Tool: "db.read", Delegate: true}, {Tool: "db.write", Delegate: true},
			{Tool: "token", Use: true}}})
	fetcher := w.share(planner, agent("fetcher"), broker.DelegateRequest{Depth: 4, TTL: 12 * time.Hour,
		Rights: reads(argstest.Parse(`{"one_of":["orders","users","stock"]}`)),
		Budget: broker.Budget{Tools: map[broker.ToolName]int{"db.read": 4}}})
	parser := w.share(fetcher, agent("parser"), broker.DelegateRequest{Depth: 3,
		Rights: reads(argstest.Parse(`{"one_of":["orders","users"]}`)), Budget: broker.Budget{Steps: 2, PerMinute: 10}})
	printer := w.share(parser, spiffeid.RequireFromString("spiffe://partner.example/printer"), broker.DelegateRequest{
		Rights: reads(argstest.Parse(`{"exact":"orders"}`)), Budget: broker.Budget{Steps: 1}, TTL: 6 * time.Hour})
	writer := w.share(planner, agent("writer"), broker.DelegateRequest{Depth: 1, Rights: use("db.write"),
		Budget: broker.Budget{Steps: 2}})

	orders, users := table("orders"), table("users")
	used := w.take(shop, broker.StepRequest{Tool: "db.read", Args: orders, Key: usedKey,
		Purpose: "order 17: <café> & tea\u00a0☕"})
	closed := w.take(writer, broker.StepRequest{Tool: "db.write", Args: orders, Key: closedKey, TTL: 10 * time.Minute})
	w.end(writer, closed.Grant.ID)
	w.take(planner, broker.StepRequest{Tool: "token"})
	w.take(fetcher, broker.StepRequest{Tool: "db.read", Args: users})
	w.take(printer, broker.StepRequest{Tool: "db.read", Args: orders, TTL: 14 * time.Minute})
	w.take(shop, broker.StepRequest{Tool: "mainframe"})
	w.d.Cases["open"], w.d.Cases["spent"], w.d.Cases["writer"] = string(shop.ID), string(printer.ID), string(writer.ID)
	w.d.Cases["used key"], w.d.Cases["closed key"] = string(used.Grant.ID), string(closed.Grant.ID)
	w.planFor(fetcher, used)
}

// planFor lists the selectors of the plans: one with each term of the language.
func (w *oldWriter) planFor(d broker.Delegation, used broker.Issued) {
	var secret struct{ Password string }
	w.must(json.Unmarshal(used.Secret.Reveal(), &secret))
	made := d.Created.UTC().Add(time.Second).Format(time.RFC3339)
	for _, s := range []string{
		"chain:" + string(d.Chain), "subtree:" + string(d.ID), "grant:" + string(used.Grant.ID),
		"spiffe:spiffe://example.org/*", "spiffe:spiffe://partner.example/printer",
		fmt.Sprintf("task:%q", shopTask), "label.team:payments", fmt.Sprintf("label.note:%q", "naïve, <b>"),
		"tool:db.read", "tool:note", "tool:nothing", "arg.table:users", "vault:database/creds/*",
		"bundle:" + w.policy.Digest(), "since:" + made, "until:" + made,
		selector.ForLeaked(secret.Password).String(), "not tool:db.read and not label.env:prod",
	} {
		w.d.Answers.Plans = append(w.d.Answers.Plans, oldPlan{Selector: s})
	}
}

// useEveryConstraint makes rights with each kind of constraint, and takes steps with arguments of each kind.
func (w *oldWriter) useEveryConstraint() {
	bounds, values := map[string]args.Constraint{}, map[string]args.Value{"free": args.Bool(false)}
	for name, c := range everyConstraint {
		bound, err := args.ParseConstraint([]byte(c.wire))
		w.must(err)
		bounds[name], values[name] = bound, c.value
	}
	rights := []broker.Right{{Tool: "every", Use: true, Delegate: true, Args: bounds},
		{Tool: "db.write", Use: true, Args: map[string]args.Constraint{"table": {}}}} // allows no value
	root := w.open("archivist", broker.OpenRequest{Task: "every kind of constraint", Rights: rights, Depth: 1,
		TTL: 3 * time.Hour})
	helper := w.share(root, agent("archivist/helper"), broker.DelegateRequest{Rights: rights[:1],
		Budget: broker.Budget{Live: 2, Steps: 2}})
	w.take(root, broker.StepRequest{Tool: "every", Args: argsOf(values)})
	w.end(helper, w.take(helper, broker.StepRequest{Tool: "every", Args: argsOf(values)}).Grant.ID)
}

// endGrants ends grants in each way: by Close, by their expiry, by a fence, and by each failure of a mint.
func (w *oldWriter) endGrants() {
	root := w.open("worker", broker.OpenRequest{Task: "every ending", Rights: use("db.read", "note", "token"),
		Depth: 2})
	for _, row := range []struct {
		tool    broker.ToolName
		outcome broker.Outcome
	}{{"db.read", broker.OutcomeDead}, {"token", broker.OutcomeDead}, {"note", broker.OutcomeStatic}} {
		closed := w.take(root, broker.StepRequest{Tool: row.tool})
		w.end(root, closed.Grant.ID)
		w.wantGrant(closed.Grant, broker.StateClosed, broker.EndingClosed, row.outcome)
		expired := w.take(root, broker.StepRequest{Tool: row.tool, TTL: 2 * time.Second})
		pass(3 * time.Second)
		w.wantGrant(expired.Grant, broker.StateClosed, broker.EndingExpired, row.outcome)
	}
	w.take(root, broker.StepRequest{Tool: "note"}) // stays alive until the broker dies

	w.target.Fail(func(point string) error {
		if point == "prepare" {
			return errRefused
		}
		return nil
	})
	w.takeRefused(root, broker.StepRequest{Tool: "db.read"})
	w.target.Fail(nil)
	w.fail("mint", nil, fmt.Errorf("permission denied: %w", broker.ErrNotMinted))
	w.takeRefused(root, broker.StepRequest{Tool: "db.read"})
	w.fail("mint created", nil, errRefused)
	w.takeRefused(root, broker.StepRequest{Tool: "db.read"})
	w.fail("", nil, nil)
	pass(oldMintTimeout + oldMintBound + time.Second)

	one, other := w.take(root, broker.StepRequest{Tool: "db.read"}), w.take(root, broker.StepRequest{Tool: "db.read"})
	w.revoked(selector.Request{Reason: "one step"}, "grant:%s", one.Grant.ID)
	w.wantGrant(one.Grant, broker.StateClosed, broker.EndingRevoked, broker.OutcomeDead)
	w.wantGrant(other.Grant, broker.StateIssued, "", "")
	w.revokeWhileMinting(root)
}

// revokeWhileMinting fences a subtree in which a mint is under way. Its answer comes after the fence.
func (w *oldWriter) revokeWhileMinting(root broker.Delegation) {
	late := w.share(root, agent("late"), broker.DelegateRequest{Rights: use("db.read")})
	w.take(late, broker.StepRequest{Tool: "db.read", TTL: 2 * time.Second})
	pass(3 * time.Second)
	answer := make(chan struct{})
	var requests sync.WaitGroup
	w.stall("mint done", answer, nil, late, "db.read", &requests)
	w.revoked(selector.Request{Reason: "a subtree with a mint under way"}, "subtree:%s", late.ID)
	close(answer)
	requests.Wait()
	pass(time.Second)
}

// stall begins a step, and stops its mint at a point until the channel is closed.
func (w *oldWriter) stall(point string, until <-chan struct{}, err error, d broker.Delegation, tool broker.ToolName,
	requests *sync.WaitGroup) {
	w.t.Helper()
	pass(time.Second)
	before := w.vault.LeaseIDs()
	w.fail(point, until, err)
	requests.Go(func() {
		if got, err := w.Issue(ctx, holderOf(d), step(d, tool)); err == nil {
			w.t.Errorf("a step that stopped at %q = %v, want an error", point, got.Grant.ID)
		}
	})
	synctest.Wait()
	w.lostLeases(d, before)
	w.fail("", nil, nil)
}

// lostLeases keeps the leases that are not among those before. They belong to the latest grant of the chain.
func (w *oldWriter) lostLeases(d broker.Delegation, before []string) {
	v, err := w.Chain(ctx, d.Chain)
	w.must(err)
	for _, id := range w.vault.LeaseIDs() {
		if !slices.Contains(before, id) {
			w.lost[id] = string(v.Grants[len(v.Grants)-1].ID)
		}
	}
}

// sealSecrets leaves sealed secrets in each state: collected, expired, and waiting to be collected.
func (w *oldWriter) sealSecrets() {
	root := w.open("courier", broker.OpenRequest{Task: "sealed secrets", Rights: use("db.read"), Depth: 1})
	encrypt := func(_ broker.Grant, s broker.Secret) ([]byte, error) { return reversed(s.Reveal()), nil }
	ask := func(collector spiffeid.ID, ttl time.Duration) broker.Grant {
		seal := broker.Seal{Thumbprint: "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs", Collector: collector,
			Encrypt: encrypt}
		return w.take(root, broker.StepRequest{Tool: "db.read", TTL: ttl, Seal: &seal}).Grant
	}
	collect := func(c broker.Caller, g broker.Grant) {
		pass(time.Second)
		_, _, err := w.Collect(ctx, c, g.ID)
		w.must(err)
	}
	own := ask(spiffeid.ID{}, 0)
	collect(holderOf(root), own)
	_, _, err := w.Collect(ctx, holderOf(root), own.ID)
	refused(w.t, "Collect again", err, broker.Conflict, broker.CodeAlreadyCollected)
	collected := ask(agent("driver"), 0)
	collect(named(agent("driver")), collected)
	w.end(root, collected.ID)
	expired := ask(agent("driver"), 2*time.Second)
	pass(3 * time.Second)
	w.wantGrant(expired, broker.StateClosed, broker.EndingExpired, broker.OutcomeDead)
	w.d.Cases["uncollected"] = string(ask(agent("driver"), 0).ID)
	w.d.Cases["collected"] = string(own.ID)
}

// revokeAndSettle leaves revocations that have settled: CLOSED, PARTIAL with static secrets, and one by a report.
func (w *oldWriter) revokeAndSettle() {
	root := w.open("intruder", broker.OpenRequest{Task: "a subtree that is revoked",
		Rights: use("db.read", "mainframe", "token"), Depth: 3, TTL: 3 * time.Hour, Heartbeat: 2 * time.Hour})
	lead := w.share(root, agent("lead"), broker.DelegateRequest{Rights: use("db.read", "mainframe", "token"), Depth: 2})
	first := w.share(lead, agent("first"), broker.DelegateRequest{Rights: use("mainframe")})
	other := w.share(lead, agent("other"), broker.DelegateRequest{Rights: use("token")})
	w.take(root, broker.StepRequest{Tool: "db.read"})
	w.take(lead, broker.StepRequest{Tool: "db.read"})
	w.take(first, broker.StepRequest{Tool: "mainframe"})
	w.take(other, broker.StepRequest{Tool: "token"})
	rv := w.revoked(selector.Request{Reason: "a subtree"}, "subtree:%s", lead.ID)
	pass(time.Second)
	w.must(w.Acknowledge(ctx, holderOf(first), first.ID, rv.ID))
	w.d.Cases["settled"], w.d.Cases["revoked"] = string(rv.ID), string(lead.ID)
	w.d.Cases["acknowledged"], w.d.Cases["unacknowledged"] = string(first.ID), string(other.ID)

	notes := w.open("notary", broker.OpenRequest{Task: "static secrets", Rights: use("note")})
	w.end(notes, w.take(notes, broker.StepRequest{Tool: "note"}).Grant.ID)
	w.take(notes, broker.StepRequest{Tool: "note"})
	w.revoked(selector.Request{Reason: "static secrets"}, "chain:%s", notes.Chain)

	reported := w.open("watched", broker.OpenRequest{Task: "a reported breach", Rights: use("db.read"),
		Labels: map[string]string{"on_breach": "revoke-chain"}})
	g := w.take(reported, broker.StepRequest{Tool: "db.read"}).Grant
	w.inTurn(func() {
		_, err := w.Report(ctx, holderOf(reported), broker.ReportRequest{Delegation: reported.ID, Grant: g.ID,
			Violation: "prompt_injection", Detail: "a page said “ignore”"})
		w.must(err)
	})
}

// writeRules leaves final rules in force: over a tool, over later steps, and over holders.
func (w *oldWriter) writeRules() {
	root := w.open("deployer", broker.OpenRequest{Task: "rules", Rights: use("db.read", "db.write", "deploy"),
		Labels: map[string]string{"env": "test"}})
	w.take(root, broker.StepRequest{Tool: "deploy"})
	w.take(root, broker.StepRequest{Tool: "db.read"})
	w.revoked(selector.Request{Reason: "a rule over a tool"}, "tool:deploy and label.env:test")
	w.revoked(selector.Request{Reason: "a rule over later steps"}, "tool:db.write and label.env:test")
	w.d.Cases["ruled"] = string(root.ID)

	guest := w.open("guest/one", broker.OpenRequest{Task: "guests", Rights: use("db.read"), Depth: 1})
	w.take(w.share(guest, agent("host"), broker.DelegateRequest{Rights: use("db.read")}),
		broker.StepRequest{Tool: "db.read"})
	w.revoked(selector.Request{Reason: "a rule over holders"},
		"spiffe:spiffe://example.org/guest/* or spiffe:spiffe://example.org/none")
}

// freeze leaves freezes in force on a node, on a grant and by rules, one that was lifted, and one that became final.
func (w *oldWriter) freeze() {
	frozen := w.open("frozen", broker.OpenRequest{Task: "a freeze that one person asked to lift",
		Rights: use("db.read"), Depth: 1})
	below := w.share(frozen, agent("frozen/below"), broker.DelegateRequest{Rights: use("db.read"),
		Budget: broker.Budget{Live: 2}})
	w.take(below, broker.StepRequest{Tool: "db.read"})
	rv := w.revoked(selector.Request{Reason: "a look", Freeze: true}, "chain:%s", frozen.Chain)
	_, err := w.Unfreeze(ctx, responder, rv.ID)
	refused(w.t, "Unfreeze by one person", err, broker.Denied, broker.CodeSecondPerson)
	w.d.Cases["frozen"], w.d.Cases["freeze"] = string(below.ID), string(rv.ID)

	visitor := w.open("visitor", broker.OpenRequest{Task: "a freeze by rule", Rights: use("db.read", "token")})
	g := w.take(visitor, broker.StepRequest{Tool: "token"}).Grant
	rv = w.revoked(selector.Request{Reason: "a look", Freeze: true}, "spiffe:spiffe://example.org/visitor")
	w.d.Cases["visitor"], w.d.Cases["freeze by rule"] = string(visitor.ID), string(rv.ID)
	w.revoked(selector.Request{Reason: "a look at one step", Freeze: true}, "grant:%s", g.ID)
	w.revoked(selector.Request{Reason: "covers nothing yet", Freeze: true}, "spiffe:spiffe://example.org/unborn")

	thawed := w.open("thawed", broker.OpenRequest{Task: "a freeze that was lifted", Rights: use("db.read")})
	rv = w.revoked(selector.Request{Reason: "a look", Freeze: true}, "chain:%s", thawed.Chain)
	_, err = w.Unfreeze(ctx, second, rv.ID)
	refused(w.t, "Unfreeze by one person", err, broker.Denied, broker.CodeSecondPerson)
	pass(time.Second)
	_, err = w.Unfreeze(ctx, responder, rv.ID)
	w.must(err)

	hard := w.open("hardened", broker.OpenRequest{Task: "a freeze that became final", Rights: use("db.read")})
	w.revoked(selector.Request{Reason: "a look", Freeze: true}, "chain:%s", hard.Chain)
	w.revoked(selector.Request{Reason: "for good"}, "chain:%s", hard.Chain)
}

// plantCanaries leaves canaries that were touched and one that was not. One more is pulled.
func (w *oldWriter) plantCanaries() {
	plant := func(r broker.PlantRequest) (broker.Canary, string) {
		pass(time.Second)
		c, value, err := w.Plant(ctx, responder, r)
		w.must(err)
		return c, value
	}
	bait := w.open("bait", broker.OpenRequest{Task: "a canary that revokes", Rights: use("db.read"),
		Labels: map[string]string{"on_breach": "revoke-chain"}})
	w.take(bait, broker.StepRequest{Tool: "db.read"})
	_, value := plant(broker.PlantRequest{Chain: bait.Chain, Note: "~/.vault-token of <bait>"})
	w.inTurn(func() { w.Present(ctx, named(agent("thief")), value) })

	_, value = plant(broker.PlantRequest{Note: "the wiki", Like: broker.CanaryGitHubToken})
	for range 2 {
		w.inTurn(func() { w.Present(ctx, named(agent("thief")), value) })
	}
	pulled, _ := plant(broker.PlantRequest{Note: "an old laptop"})
	_, err := w.Pull(ctx, responder, pulled.ID)
	w.must(err)

	quiet := w.open("quiet", broker.OpenRequest{Task: "a canary that was not touched", Rights: use("db.read")})
	c, value := plant(broker.PlantRequest{Chain: quiet.Chain, Note: "a backup"})
	w.d.Cases["canary"], w.d.Cases["canary chain"] = string(c.ID), string(quiet.Chain)
	w.d.Canary = hex.EncodeToString([]byte(value))
	_, err = w.Open(ctx, named(agent("magpie")), broker.OpenRequest{Task: "a canary among tools", Rights: use("trap")})
	refused(w.t, "Open with a canary", err, broker.Denied, broker.CodePolicyDenied)
}

// refuse leaves entries of refusals, violations and orphans, and an expired chain.
func (w *oldWriter) refuse() {
	root := w.open("reader", broker.OpenRequest{Task: "refusals", Rights: use("db.read", "db.write"), Depth: 1,
		Labels: map[string]string{"mode": "read"}})
	w.takeRefused(root, broker.StepRequest{Tool: "db.write"})
	w.takeRefused(root, broker.StepRequest{Tool: "token"})
	w.takeRefused(root, broker.StepRequest{Tool: "unknown"})
	_, err := w.Issue(ctx, named(agent("thief")), step(root, "db.read"))
	refused(w.t, "Issue by a thief", err, broker.NotFound, broker.CodeDelegationUnknown)
	guarded := w.open("guarded", broker.OpenRequest{Task: "a thief that is frozen", Rights: use("db.read"),
		Labels: map[string]string{"on_breach": "freeze-caller"}})
	w.inTurn(func() {
		_, err := w.Issue(ctx, named(agent("thief")), step(guarded, "db.read"))
		refused(w.t, "Issue by a thief", err, broker.NotFound, broker.CodeViolation)
	})
	_, err = w.Delegate(ctx, holderOf(root), broker.DelegateRequest{From: root.ID, To: agent("wide"),
		Rights: use("token")})
	refused(w.t, "Delegate of another tool", err, broker.Denied, broker.CodeDelegationWider)
	w.open("brief", broker.OpenRequest{Task: "an expired chain", Rights: use("db.read"),
		TTL: 2 * time.Second, Heartbeat: time.Hour})
	pass(3 * time.Second)
	w.open("silent", broker.OpenRequest{Task: "a lost heartbeat", Rights: use("db.read"),
		Heartbeat: 2 * time.Second, TTL: time.Minute})
	pass(3 * time.Second)

	w.vault.Plant("database/creds/reader/behind", w.now().Add(-time.Minute))
	w.target.Plant("gr000000000000000000000000")
	s, err := w.Sweep(ctx)
	w.must(err)
	if s.Leases != 1 || s.Logins != 1 {
		w.t.Errorf("Sweep = %+v, want one lease and one login that the ledger does not know", s)
	}
}

// subscribe leaves the cursors of two subscribers.
func (w *oldWriter) subscribe() {
	at, err := w.Subscribe(ctx, "siem")
	w.must(err)
	w.must(w.MarkDelivered(ctx, "siem", at-5))
	_, err = w.Subscribe(ctx, "pager")
	w.must(err)
	w.d.Answers.Cursors = map[string]uint64{"siem": 0, "pager": 0}
}

// leaveInFlight begins a step for each point of a mint at which a process can die, and stops it there.
func (w *oldWriter) leaveInFlight(died <-chan struct{}, requests *sync.WaitGroup) {
	root := w.open("flight", broker.OpenRequest{Task: "mints under way", Rights: use("db.read")})
	w.take(root, broker.StepRequest{Tool: "db.read"})
	for _, point := range []string{"child", "mint", "mint created", "mint done"} {
		w.stall(point, died, errors.New("the process is gone"), root, "db.read", requests)
	}
}

// leaveHalfDone lets Vault and the targets refuse, so that grants that must end are fenced and not proven dead. Every
// retry gives the same answers and records nothing. So the ledger does not depend on the times of retries, which are
// spread at random.
func (w *oldWriter) leaveHalfDone(died <-chan struct{}, requests *sync.WaitGroup) {
	gone := errors.New("the process is gone")
	chain := func(name string, labels map[string]string) (root, below broker.Delegation) {
		rights := use("db.read", "mainframe", "note", "token")
		root = w.open(name, broker.OpenRequest{Task: "half done: " + name, Rights: rights, Depth: 1, Labels: labels})
		return root, w.share(root, agent(name+"/below"), broker.DelegateRequest{Rights: rights})
	}
	ends, _ := chain("ends", nil)
	unknown, unknownBelow := chain("unknown", nil)
	partial, partialBelow := chain("partial", nil)
	single, _ := chain("single", nil)
	_, ruled := chain("ruled", map[string]string{"case": "rule"})
	_, late := chain("tardy", nil)
	closed := w.take(ends, broker.StepRequest{Tool: "token"}).Grant
	w.take(unknown, broker.StepRequest{Tool: "mainframe"})
	w.take(unknownBelow, broker.StepRequest{Tool: "mainframe", TTL: 2 * time.Second})
	w.take(partial, broker.StepRequest{Tool: "token"})
	w.take(partialBelow, broker.StepRequest{Tool: "db.read"})
	one := w.take(single, broker.StepRequest{Tool: "db.read"}).Grant
	w.take(single, broker.StepRequest{Tool: "token"})
	w.take(ruled, broker.StepRequest{Tool: "db.read"})
	w.take(late, broker.StepRequest{Tool: "token", TTL: 2 * time.Second})
	w.stall("mint", died, gone, unknown, "db.read", requests)
	w.stall("child", died, gone, unknownBelow, "note", requests)
	expired := w.take(ends, broker.StepRequest{Tool: "db.read", TTL: 3 * time.Second}).Grant
	answer := make(chan struct{})
	w.stall("mint done", answer, nil, late, "db.read", requests)

	w.vaultDown.Store(true)
	w.severDown.Store(true)
	pass(3 * time.Second)
	w.wantGrant(expired, broker.StateIssued, broker.EndingExpired, broker.OutcomeAlive)
	requests.Go(func() { _, _ = w.Close(ctx, holderOf(ends), closed.ID) }) // waits until the broker stops
	synctest.Wait()
	w.wantGrant(closed, broker.StateIssued, broker.EndingClosed, broker.OutcomeAlive)
	w.revoked(selector.Request{Reason: "shown to be alive"}, "chain:%s", partial.Chain)
	w.revoked(selector.Request{Reason: "one step, shown to be alive"}, "grant:%s", one.ID)
	w.revoked(selector.Request{Reason: "by a rule, shown to be alive"}, "label.case:rule")
	w.revoked(selector.Request{Reason: "the answer of a mint comes after the fence"}, "subtree:%s", late.ID)
	close(answer)
	synctest.Wait()
	w.legacyDown.Store(true)
	w.revoked(selector.Request{Reason: "not proven either way"}, "chain:%s", unknown.Chain)

	w.vault.Plant("database/creds/reader/orphan", w.now().Add(-time.Minute))
	w.target.Plant("gr111111111111111111111111")
}
