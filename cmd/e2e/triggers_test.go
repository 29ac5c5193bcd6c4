package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
)

// offence is the tree on which every trigger is played. writer is the offender, or the holder of the misused
// delegation:
//
//	planner -> {writer -> helper, other}
//
// Each of the four holds a secret. writer, and every other agent that may be frozen, also holds one in a chain of its
// own, which only freeze-caller affects.
type offence struct {
	*stage
	tree  map[string]*agent.Delegation
	live  map[string]holding
	apart map[string]*agent.Delegation // separate chains, by opener
	mute  *mute                        // writer's connection
}

const offendingTools = `
tools:
  - name: db.read
    backend: shop
    narrowing: native
    arguments: {tables: {kind: list, required: true}}
    vault: {policy: pawl-read, path: database/read}
  - {name: db.write, backend: shop, narrowing: native, arguments: {table: {kind: string}}, vault: {policy: pawl-write, path: database/write}}
  - {name: mail.send, backend: mail, narrowing: native, vault: {policy: pawl-mail, path: transit/mail}}
  - {name: db.admin, backend: shop, narrowing: native, vault: {policy: pawl-admin, path: database/admin}}
  - {name: payroll.read, backend: shop, narrowing: native, vault: {policy: pawl-payroll, path: database/payroll}}
  - {name: canary.keys, backend: mail, narrowing: none, canary: true, vault: {policy: pawl-canary, path: kv/canary}}
`

// offendingPolicy has the same consequence for every offence.
const offendingPolicy = `
@id("work")
@any("tool")
permit (principal in TrustDomain::"acme.example", action in [Action::"open", Action::"delegate", Action::"use"], resource)
unless { resource.name == "payroll.read" };

@id("siem-reports")
@any("tool")
permit (principal == Agent::"spiffe://acme.example/siem", action == Action::"report", resource);

@id("no-admin")
@violation("%[1]s")
forbid (principal, action == Action::"use", resource == Tool::"db.admin");

@id("no-write-after-mail")
@violation("%[1]s")
forbid (principal, action == Action::"use", resource == Tool::"db.write")
when { context.used.contains("mail.send") };
`

// mute is a connection that can lose its heartbeats, as if its process were stopped.
type mute struct {
	http.RoundTripper
	on atomic.Bool
}

func (m *mute) RoundTrip(r *http.Request) (*http.Response, error) {
	if m.on.Load() && strings.HasSuffix(r.URL.Path, "/heartbeat") {
		return nil, errors.New("the heartbeat is lost")
	}
	return m.RoundTripper.RoundTrip(r)
}

// muted gives an agent with a connection that can lose its heartbeats.
func (s *stage) muted(path string) (*agent.Client, *mute) {
	s.t.Helper()
	source := s.identities.Source(s.identities.ID(path))
	m := &mute{RoundTripper: &http.Transport{ForceAttemptHTTP2: true,
		TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(s.identities.ID("/pawl")))}}
	c, err := agent.New(agent.Config{Address: s.address, HTTPClient: &http.Client{Transport: m}})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() }) // it always succeeds
	return c, m
}

// heartbeat is the interval that writer promises. It is long enough for a busy machine.
const heartbeat = 3 * time.Second

func newOffence(t *testing.T, consequence string) *offence {
	violations := ""
	for _, code := range []broker.ViolationCode{broker.ViolationScope, broker.ViolationBudget, broker.ViolationHolder,
		broker.ViolationReplay, broker.ViolationCanary, broker.ViolationHeartbeat, broker.ViolationSecondUse, "data_leak"} {
		violations += fmt.Sprintf("%s: %s\n", code, consequence)
	}
	o := &offence{stage: newStage(t, authors(map[string]string{"bundle.yaml": "{name: offences, version: 1}", "tools.yaml": offendingTools,
		"main.cedar": fmt.Sprintf(offendingPolicy, consequence), "violations.yaml": violations})),
		live: map[string]holding{}, apart: map[string]*agent.Delegation{}}
	all := rights("db.read", "db.write", "mail.send", "db.admin")
	some := rights("db.write", "mail.send", "db.admin")
	some = append(some, agent.Right{Tool: "db.read", Use: true, Delegate: true, Args: map[string]agent.Constraint{"tables": agent.Subset("orders")}})
	planner := o.open("/planner", agent.Chain{Rights: all, Depth: 3})
	writer := o.writer(planner, agent.Share{Rights: some, Depth: 1, Budget: agent.Budget{Tools: map[string]int{"mail.send": 1}}, Heartbeat: heartbeat})
	o.tree = map[string]*agent.Delegation{"planner": planner, "writer": writer,
		"helper": o.share(writer, "/helper", agent.Share{Rights: some}), "other": o.share(planner, "/other", agent.Share{Rights: some})}
	for name, d := range o.tree {
		o.live[name] = o.hold(d, "db.read", orders)
	}
	for _, name := range []string{"writer", "thief"} {
		o.apart[name] = o.open("/"+name, agent.Chain{Rights: all})
		o.live[name+" apart"] = o.hold(o.apart[name], "db.read", orders)
	}
	return o
}

// writer delegates a share to the agent with the muted connection.
func (o *offence) writer(from *agent.Delegation, part agent.Share) *agent.Delegation {
	o.t.Helper()
	id, err := from.Delegate(o.t.Context(), o.identities.ID("/writer").String(), part)
	if err != nil {
		o.t.Fatal(err)
	}
	var c *agent.Client
	c, o.mute = o.muted("/writer")
	d, err := c.Join(o.t.Context(), id)
	if err != nil {
		o.t.Fatal(err)
	}
	return d
}

// collectTwice collects a sealed step of writer's twice.
func (o *offence) collectTwice() error {
	o.t.Helper()
	key, err := agent.NewSealKey()
	if err != nil {
		o.t.Fatal(err)
	}
	step, err := o.tree["writer"].Begin(o.t.Context(), agent.Call{Tool: "db.read", Args: orders, Seal: &agent.Seal{Key: key.Public()}})
	if err != nil {
		o.t.Fatal(err)
	}
	c := o.agent("/writer")
	secret, err := c.Collect(o.t.Context(), step.Grant().ID, key)
	if err != nil || !o.target.Login(secret.JSON()) {
		o.t.Fatalf("Collect = %v, want a secret that works", err)
	}
	o.live["writer sealed"] = holding{step, secret.JSON()}
	_, err = c.Collect(o.t.Context(), step.Grant().ID, key)
	return err
}

// silence loses writer's heartbeats until the broker detects it, and gives the revocation that follows.
func (o *offence) silence() (revocation string) {
	o.t.Helper()
	o.mute.on.Store(true)
	defer o.mute.on.Store(false)
	for deadline := time.After(30 * time.Second); ; {
		if o.logged(string(broker.OpViolation)) > 0 {
			break
		}
		select {
		case <-deadline:
			o.t.Fatal("the broker did not detect the lost heartbeat of writer in 30 s")
		case <-time.After(20 * time.Millisecond):
		}
	}
	all, err := o.operator().Revocations(o.t.Context())
	if err != nil {
		o.t.Fatal(err)
	}
	for _, rv := range all {
		if !rv.Freeze {
			revocation = rv.ID
		}
	}
	return revocation
}

var orders = agent.Args{"tables": []string{"orders"}}

// begin requests a step as writer. The refusal is the trigger.
func (o *offence) begin(tool string, args agent.Args) error {
	_, err := o.tree["writer"].Begin(o.t.Context(), agent.Call{Tool: tool, Args: args})
	return err
}

// replay takes a step as writer under a key, and then requests another one under the same key.
func (o *offence) replay(tool string, args agent.Args) error {
	o.t.Helper()
	step, err := o.tree["writer"].Begin(o.t.Context(), agent.Call{Tool: "db.write", IdempotencyKey: "step-1"})
	if err == nil {
		err = step.Close(o.t.Context())
	}
	if err != nil {
		o.t.Fatal(err)
	}
	_, err = o.tree["writer"].Begin(o.t.Context(), agent.Call{Tool: tool, Args: args, IdempotencyKey: "step-1"})
	return err
}

// present asks for a step as thief under a delegation that thief does not hold.
func (o *offence) present(id agent.DelegationID) error {
	return o.post("/thief", "/v1/delegations/"+string(id)+"/steps", api.StepRequest{Tool: "db.write"}, new(api.Issued))
}

// report sends a report as path, about writer's delegation and secret.
func (o *offence) report(path string, grant bool) (out api.Reported, err error) {
	w := o.tree["writer"]
	in := api.ReportRequest{Delegation: string(w.ID()), Violation: "data_leak", Detail: "seen in a log"}
	if grant {
		in.Grant = string(o.live["writer"].step.Grant().ID)
	}
	err = o.post(path, "/v1/violations", in, &out)
	return out, err
}

// trigger is one event. A request is refused with the code if there is no consequence, and as a violation otherwise. A
// report gets an answer.
type trigger struct {
	name   string
	event  func(*offence) error
	kind   api.Kind
	code   broker.Code
	frozen string // the agent that freeze-caller freezes
	always bool   // it is in the audit as a violation even without a consequence
	silent bool   // the answer does not show the consequence

	sealed   bool // a sealed step is the breach: its refusal keeps its code with every consequence
	stranger bool // the agent is not in the chain, so freeze-caller leaves the chain alone

	unheard bool // there is no request: the event is a missing heartbeat

	report func(*offence) (api.Reported, error)
	grant  bool // the report names a grant
	limit  broker.Consequence
}

var triggers = []trigger{
	{name: "forbidden tool", kind: api.KindDenied, code: broker.CodePolicyDenied, frozen: "writer",
		event: func(o *offence) error { return o.begin("db.admin", nil) }},
	{name: "step with a canary", kind: api.KindDenied, code: broker.CodePolicyDenied, frozen: "writer", always: true, silent: true,
		event: func(o *offence) error { return o.begin("canary.keys", nil) }},
	{name: "passing a canary on", kind: api.KindDenied, code: broker.CodeDelegationWider, frozen: "writer", always: true, silent: true,
		event: func(o *offence) error {
			_, err := o.tree["writer"].Delegate(o.t.Context(), o.identities.ID("/helper").String(), agent.Share{Rights: rights("canary.keys")})
			return err
		}},
	{name: "key used again for another tool", kind: api.KindConflict, code: broker.CodeKeyOtherTool, frozen: "writer",
		event: func(o *offence) error { return o.replay("mail.send", nil) }},
	{name: "key used again for other arguments", kind: api.KindConflict, code: broker.CodeKeyOtherArguments, frozen: "writer",
		event: func(o *offence) error { return o.replay("db.write", agent.Args{"table": "people"}) }},
	{name: "history rule", kind: api.KindDenied, code: broker.CodePolicyDenied, frozen: "writer",
		event: func(o *offence) error { o.do(o.tree["writer"], "mail.send", nil); return o.begin("db.write", nil) }},
	{name: "argument outside the delegation", kind: api.KindDenied, code: broker.CodeArgumentOutside, frozen: "writer",
		event: func(o *offence) error {
			return o.begin("db.read", agent.Args{"tables": []string{"orders", "people"}})
		}},
	{name: "budget", kind: api.KindDenied, code: broker.CodeBudgetExhausted, frozen: "writer",
		event: func(o *offence) error { o.do(o.tree["writer"], "mail.send", nil); return o.begin("mail.send", nil) }},
	{name: "wrong SPIFFE ID on a delegation", kind: api.KindNotFound, code: broker.CodeDelegationUnknown, frozen: "thief", always: true, stranger: true,
		event: func(o *offence) error { return o.present(o.tree["writer"].ID()) }},
	{name: "second use of a sealed delivery", kind: api.KindConflict, code: broker.CodeAlreadyCollected, frozen: "writer", always: true, sealed: true, event: (*offence).collectTwice},
	{name: "lost heartbeat", frozen: "writer", always: true, unheard: true},
	{name: "report by a trusted reporter", frozen: "writer",
		report: func(o *offence) (api.Reported, error) { return o.report("/siem", false) }},
	{name: "report of one grant", frozen: "writer", grant: true,
		report: func(o *offence) (api.Reported, error) { return o.report("/siem", true) }},
	{name: "report by a holder above", limit: broker.ConsequenceRevokeChain,
		report: func(o *offence) (api.Reported, error) { return o.report("/planner", false) }},
}

// dies lists the agents that lose a secret by a consequence.
func (tr trigger) dies(what broker.Consequence) []string {
	if tr.sealed && what > broker.ConsequenceDeny {
		tr.sealed = false
		return append(slices.DeleteFunc(tr.dies(what), func(string) bool { return what == broker.ConsequenceRevokeStep }), "writer sealed")
	}
	switch {
	case tr.stranger && what == broker.ConsequenceFreezeCaller:
		return nil
	case what == broker.ConsequenceDeny, what == broker.ConsequenceRevokeStep && tr.report == nil && !tr.unheard:
		return nil // a refused request has no secret to revoke
	case what == broker.ConsequenceRevokeStep && tr.grant:
		return []string{"writer"}
	case what <= broker.ConsequenceRevokeSubtree:
		return []string{"writer", "helper"}
	}
	return []string{"planner", "writer", "helper", "other"}
}

// TestTriggers plays every trigger with every consequence, from the event to the closure. The key of another agent's
// step is not among them: keys belong to a delegation, a delegation has one holder, and every other caller is refused
// before (wrong SPIFFE ID).
func TestTriggers(t *testing.T) {
	for _, tr := range triggers {
		for what := broker.ConsequenceDeny; what <= broker.ConsequenceFreezeCaller; what++ {
			t.Run(tr.name+"/"+what.String(), func(t *testing.T) {
				t.Parallel()
				o := newOffence(t, what.String())
				if tr.limit > 0 {
					what = min(what, tr.limit)
				}
				o.after(tr, what, tr.play(o, what))
			})
		}
	}
}

// play causes the event, checks the answer and gives the revocation that follows.
func (tr trigger) play(o *offence, what broker.Consequence) (revocation string) {
	o.t.Helper()
	if tr.unheard {
		return o.silence()
	}
	if tr.report != nil {
		answer, err := tr.report(o)
		if err != nil || answer.Consequence != what.String() {
			o.t.Fatalf("the report = %+v, %v, want %s", answer, err, what)
		}
		return answer.Revocation
	}
	if tr.stranger {
		unknown := answered(o.t, refusal(o.t, "unknown", o.present("dl000000000000000000000001"), tr.kind, tr.code), "")
		if others := answered(o.t, refusal(o.t, tr.name, tr.event(o), tr.kind, tr.code), ""); others != unknown {
			o.t.Errorf("the answer to %s is %s, and to an id that nobody has %s", tr.name, others, unknown)
		}
		return o.revoked()
	}
	code := broker.CodeViolation
	if what == broker.ConsequenceDeny || tr.silent || tr.sealed {
		code = tr.code
	}
	if !tr.silent {
		return refusal(o.t, tr.name, tr.event(o), tr.kind, code).Revocation
	}
	// A tool without a permit gets the same answer, for the same agent and the same request.
	_, unpermitted := o.tree["writer"].Begin(o.t.Context(), agent.Call{Tool: "payroll.read"})
	if strings.Contains(tr.name, "passing") {
		_, unpermitted = o.tree["writer"].Delegate(o.t.Context(), o.identities.ID("/helper").String(), agent.Share{Rights: rights("payroll.read")})
	}
	plain := answered(o.t, refusal(o.t, "payroll.read", unpermitted, tr.kind, code), "payroll.read")
	if canary := answered(o.t, refusal(o.t, tr.name, tr.event(o), tr.kind, code), "canary.keys"); canary != plain {
		o.t.Errorf("the answer to %s is %s, and to a tool without a permit %s", tr.name, canary, plain)
	}
	if n := o.canaries.Load(); n != 1 {
		o.t.Errorf("%s raised %d alarms, want one", tr.name, n)
	}
	return o.revoked()
}

// answered gives an answer without the tool's name and the request id.
func answered(t *testing.T, p *agent.Error, tool string) string {
	t.Helper()
	seen := *p
	seen.Request = ""
	raw, err := json.Marshal(&seen)
	if err != nil {
		t.Fatal(err)
	}
	if tool == "" {
		return string(raw)
	}
	return strings.ReplaceAll(string(raw), tool, "TOOL")
}

// revoked gives the revocation that operators see; empty if there is none.
func (o *offence) revoked() string {
	o.t.Helper()
	list, err := o.operator().Revocations(o.t.Context())
	if err != nil {
		o.t.Fatal(err)
	}
	for _, rv := range list {
		if !rv.Freeze {
			return rv.ID
		}
	}
	return ""
}

// after checks that the right secrets are dead, that their agents were notified, that everything else still works, and
// that the audit names the violation.
func (o *offence) after(tr trigger, what broker.Consequence, revocation string) {
	dying := map[string]bool{}
	for _, name := range tr.dies(what) {
		dying[name] = true
	}
	if (revocation != "") != (len(dying) > 0) {
		o.t.Fatalf("%s caused revocation %q, want one that ends %d secrets", what, revocation, len(dying))
	}
	if revocation != "" {
		o.closed(revocation, len(dying))
	}
	for name, h := range o.live {
		if works := o.target.Login(h.secret); works == dying[name] {
			o.t.Errorf("after %s the secret of %s works: %v", what, name, works)
		}
		if dying[name] {
			endsRevoked(o.t, name, h.step.Context())
		} else if h.step.Context().Err() != nil {
			o.t.Errorf("after %s the step of %s ended: %v", what, name, context.Cause(h.step.Context()))
		}
	}
	oneStep := what == broker.ConsequenceRevokeStep && tr.grant
	for name, d := range o.tree {
		err := o.asks(d, "db.read", orders)
		if fenced := dying[name] && !oneStep; errors.Is(err, agent.ErrRevoked) != fenced || !fenced && err != nil {
			o.t.Errorf("after %s a step of %s = %v, want it refused as revoked: %v", what, name, err, fenced)
		}
	}
	for name, d := range o.apart {
		err := o.asks(d, "db.read", orders)
		if what == broker.ConsequenceFreezeCaller && name == tr.frozen {
			refusal(o.t, "a step of "+name+", frozen everywhere,", err, api.KindRevoked, broker.CodeFrozen)
		} else if err != nil {
			o.t.Errorf("after %s a step of %s in its own chain = %v", what, name, err)
		}
	}
	o.audited(what, tr)
}

// endsRevoked fails unless the context of a step ends because of a revocation.
func endsRevoked(t *testing.T, name string, ctx context.Context) {
	t.Helper()
	select {
	case <-ctx.Done():
	case <-time.After(10 * time.Second):
	}
	if cause := context.Cause(ctx); !errors.Is(cause, agent.ErrRevoked) {
		t.Errorf("the step of %s ended because of %v, want revoked", name, cause)
	}
}

// audited checks that the audit has one entry of the violation under writer's delegation.
func (o *offence) audited(what broker.Consequence, tr trigger) {
	o.t.Helper()
	op := string(broker.OpViolation)
	if what == broker.ConsequenceDeny && tr.report == nil && !tr.always {
		op = string(broker.OpDenied)
	}
	if found := o.logged(op); found != 1 {
		o.t.Errorf("the audit has %d entries %q about the delegation, want 1", found, op)
	}
}

// logged counts the entries of an op about writer's delegation.
func (o *offence) logged(op string) (found int) {
	o.t.Helper()
	page, err := o.operator().ChainAudit(o.t.Context(), string(o.tree["planner"].Info().Chain), 0, 1000)
	if err != nil {
		o.t.Fatal(err)
	}
	for _, e := range page.Entries {
		if e.Op == op && e.Delegation == string(o.tree["writer"].ID()) {
			found++
		}
	}
	return found
}

// TestOpeningWithACanary: there is no chain to revoke yet, so only freeze-caller has an effect. The broker stores
// nothing else of the request.
func TestOpeningWithACanary(t *testing.T) {
	for what := broker.ConsequenceDeny; what <= broker.ConsequenceFreezeCaller; what++ {
		t.Run(what.String(), func(t *testing.T) {
			o := newOffence(t, what.String())
			_, err := o.agent("/writer").Open(t.Context(), agent.Chain{Task: "t", Rights: rights("payroll.read", "canary.keys")})
			p := refusal(t, "Open with a canary", err, api.KindDenied, broker.CodePolicyDenied)
			_, err = o.agent("/planner").Open(t.Context(), agent.Chain{Task: "t", Rights: rights("payroll.read")})
			plain := refusal(t, "Open with a tool without a permit", err, api.KindDenied, broker.CodePolicyDenied)
			if a, b := strings.ReplaceAll(answered(t, p, "canary.keys"), "/writer", "/planner"), answered(t, plain, "payroll.read"); a != b {
				t.Errorf("the answer to Open with a canary is %s, and with a tool without a permit %s", a, b)
			}
			for name, h := range o.live {
				if !o.target.Login(h.secret) {
					t.Errorf("the secret of %s is dead", name)
				}
			}
			_, err = o.apart["writer"].Begin(t.Context(), agent.Call{Tool: "db.read", Args: orders})
			if frozen := what == broker.ConsequenceFreezeCaller; errors.Is(err, agent.ErrRevoked) != frozen || !frozen && err != nil {
				t.Errorf("a step of writer elsewhere = %v, want it frozen: %v", err, frozen)
			}
			page, err := o.operator().Audit(t.Context(), 0, 1000)
			if err != nil {
				t.Fatal(err)
			}
			found := 0
			for _, e := range page.Entries {
				if e.Op == string(broker.OpViolation) && e.Code == string(broker.ViolationCanary) && e.Tool == "canary.keys" && e.Detail == what.String() {
					found++
				}
			}
			if found != 1 {
				t.Errorf("the audit has %d entries about the canary, want 1", found)
			}
		})
	}
}

// TestReportersAreTrustedByName: a report by an agent that is neither named in the policy nor a holder above changes
// nothing, and its answer does not reveal that the delegation exists.
func TestReportersAreTrustedByName(t *testing.T) {
	o := newOffence(t, "revoke-chain")
	for _, path := range []string{"/thief", "/helper", "/siem/helper"} {
		_, err := o.report(path, true)
		refusal(t, "a report by "+path, err, api.KindNotFound, broker.CodeDelegationUnknown)
	}
	for name, h := range o.live {
		if !o.target.Login(h.secret) {
			t.Errorf("the secret of %s is dead", name)
		}
	}
}
