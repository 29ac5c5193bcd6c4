package audit_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/audit"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/selector"
)

// world is the real engine in memory.
type world struct {
	*engine.Engine
	t      *testing.T
	ledger *brokertest.Memory
}

func newWorld(t *testing.T) world {
	t.Helper()
	target, ledger := brokertest.NewTarget(), brokertest.NewMemory()
	tools := brokertest.AllowAll("db")
	b, err := engine.New(engine.Config{Ledger: ledger, Policy: func() broker.Policy { return tools }, Vault: brokertest.NewVault(target),
		Backends: map[string]broker.Backend{"target": target}, Now: time.Now, Random: rand.Reader, SweepEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	return world{b, t, ledger}
}

func as(name string) broker.Caller {
	return broker.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/" + name), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
}

func (w world) open(holder, task string) broker.Delegation {
	w.t.Helper()
	d, err := w.Open(w.t.Context(), as(holder), broker.OpenRequest{Task: task, Depth: 1, Rights: []broker.Right{{Tool: "db", Use: true, Delegate: true}}})
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

func (w world) delegate(from broker.Delegation, to string) broker.Delegation {
	w.t.Helper()
	d, err := w.Delegate(w.t.Context(), broker.Caller{ID: from.Holder, Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)},
		broker.DelegateRequest{From: from.ID, To: as(to).ID, Rights: []broker.Right{{Tool: "db", Use: true}}})
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

func (w world) issue(holder string, d broker.Delegation) broker.Grant {
	w.t.Helper()
	got, err := w.Issue(w.t.Context(), as(holder), broker.StepRequest{Delegation: d.ID, Tool: "db", Purpose: "a `purpose` | <b>"})
	if err != nil {
		w.t.Fatal(err)
	}
	return got.Grant
}

// revoke waits until the revocation has settled.
func (w world) revoke(sel string) broker.Revocation {
	w.t.Helper()
	s, err := selector.Parse(sel)
	if err != nil {
		w.t.Fatal(err)
	}
	rv, err := w.Revoke(w.t.Context(), broker.Operator{Name: "ann"}, selector.Request{Selector: s, Reason: "a test"})
	if err != nil {
		w.t.Fatal(err)
	}
	deadline := time.After(10 * time.Second)
	for {
		changed, cancel := w.Watch("")
		now, err := w.Revocation(w.t.Context(), rv.ID)
		if err != nil {
			w.t.Fatal(err)
		}
		if !now.Settled.IsZero() {
			cancel()
			return now
		}
		select {
		case <-changed:
		case <-deadline:
			w.t.Fatalf("%s did not settle: %+v", rv.ID, now)
		}
		cancel()
	}
}

func (w world) notary(s *audit.Signer) *audit.Notary {
	w.t.Helper()
	n, err := audit.NewNotary(audit.NotaryConfig{Source: w.Engine, Entries: w.ledger.Entries, Signer: s, Now: time.Now})
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

func newSigner(t testing.TB) (*audit.Signer, jose.JSONWebKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := audit.NewSigner("example.org/pawl", jose.JSONWebKey{Key: private})
	if err != nil {
		t.Fatal(err)
	}
	return s, jose.JSONWebKey{Key: public}
}

func grantIDs(list []audit.Grant) (ids []broker.GrantID) {
	for _, g := range list {
		ids = append(ids, g.ID)
	}
	return ids
}

// TestReport reports a revocation of sub. root has one live secret, and sub one that has ended. A violation without
// consequence is reported. sub has one secret from before it and one from after it. Then sub is revoked.
func TestReport(t *testing.T) {
	w := newWorld(t)
	signer, key := newSigner(t)
	root := w.open("root", "a task")
	sub := w.delegate(root, "sub")
	elsewhere := w.open("sub", "another task")
	w.revoke("subtree:" + string(w.delegate(w.open("root", "a task with a part revoked earlier"), "sub").ID))
	ended := w.issue("sub", sub)
	if _, err := w.Close(t.Context(), as("sub"), ended.ID); err != nil {
		t.Fatal(err)
	}
	kept := w.issue("root", root)
	before := w.issue("sub", sub)
	if _, err := w.Report(t.Context(), as("sub"), broker.ReportRequest{Delegation: sub.ID, Violation: "canary"}); err != nil {
		t.Fatal(err)
	}
	within := w.issue("sub", sub)
	silent := w.delegate(root, "silent")
	rv := w.revoke(fmt.Sprintf("subtree:%s or subtree:%s", sub.ID, silent.ID))
	if err := w.Acknowledge(t.Context(), as("sub"), sub.ID, rv.ID); err != nil {
		t.Fatal(err)
	}

	jws, err := w.notary(signer).Report(t.Context(), rv.ID)
	if err != nil {
		t.Fatal(err)
	}
	r, err := audit.VerifyReport(jws, key)
	if err != nil {
		t.Fatalf("VerifyReport = %v, want the report", err)
	}
	if r.Issuer != "example.org/pawl" || r.Revocation.ID != rv.ID || r.Revocation.Closure != broker.ClosureClosed || r.Revocation.Dead != 2 {
		t.Errorf("the report is of %+v by %q, want %s CLOSED with 2 dead", r.Revocation, r.Issuer, rv.ID)
	}
	if got, want := grantIDs(r.Grants), []broker.GrantID{before.ID, within.ID, ended.ID}; !slices.Equal(got, want) {
		t.Errorf("grants = %v, want %v: those that the fence covered, then the ended one", got, want)
	}
	for _, g := range r.Grants {
		if g.Outcome != broker.OutcomeDead || len(g.Evidence) == 0 || g.HandedOver.IsZero() || g.Before != (g.ID == ended.ID) {
			t.Errorf("grant %+v, want it handed over and dead, with evidence", g)
		}
	}
	if r.Window.Breach == nil || r.Window.Breach.Code != "canary" || !slices.Equal(r.Window.Issued, []broker.GrantID{within.ID}) ||
		!slices.Equal(r.Window.Live, []broker.GrantID{before.ID}) {
		t.Errorf("window = %+v, want the canary, %s issued in it and %s live", r.Window, within.ID, before.ID)
	}
	if left := r.Residual; len(left.Rotate)+len(left.Alive)+len(left.Unproven)+left.Tokens != 0 || left.EndedBefore != 1 {
		t.Errorf("residual = %+v, want the one secret that ended before the fence", left)
	}
	if len(r.Agents) != 2 || r.AgentsMore != 0 {
		t.Errorf("agents = %+v, want the holders of the two open delegations", r.Agents)
	}
	for _, a := range r.Agents {
		if a.At.IsZero() != (a.Delegation == silent.ID) || a.Holder != as("sub").ID && a.Holder != as("silent").ID {
			t.Errorf("agent %+v, want sub with a time and silent without", a)
		}
	}
	if page := r.Markdown(); !strings.Contains(page, "| `spiffe://example.org/silent` | "+string(silent.ID)+" | never |") {
		t.Errorf("the page does not list the holder without an acknowledgement:\n%s", page)
	}
	want := map[broker.DelegationID]audit.Untouched{
		root.ID:      {Chain: root.Chain, Delegation: root.ID, Holder: root.Holder.String(), Expires: root.Expires.UTC().Round(0), Live: 1, SameChain: true},
		elsewhere.ID: {Chain: elsewhere.Chain, Delegation: elsewhere.ID, Holder: elsewhere.Holder.String(), Expires: elsewhere.Expires.UTC().Round(0)},
	}
	for _, u := range r.Untouched {
		if u != want[u.Delegation] {
			t.Errorf("untouched has %+v, want %+v", u, want[u.Delegation])
		}
	}
	if len(r.Untouched) != len(want) {
		t.Errorf("untouched = %+v, want the root and the other chain of sub", r.Untouched)
	}
	var ops []broker.Op
	for _, e := range r.Timeline {
		ops = append(ops, e.Op)
	}
	if !slices.Contains(ops, broker.OpFence) || !slices.Contains(ops, broker.OpClosure) || ops[0] != broker.OpOpen || slices.Contains(ops, broker.OpIssued) || slices.Contains(ops, broker.OpAcknowledged) {
		t.Errorf("timeline = %v, want the opening, the fence and the closure, and no entries of single grants", ops)
	}
	if bytes.Contains(jws, []byte(kept.Token.Accessor)) || strings.Contains(r.Markdown(), "marker") {
		t.Error("the report holds an accessor or a secret")
	}
}

// TestReportOfRule checks that a rule over chains has its own entries in the timeline and every chain that it covers.
func TestReportOfRule(t *testing.T) {
	w := newWorld(t)
	signer, key := newSigner(t)
	one, two, other := w.open("sub", "one"), w.open("sub", "two"), w.open("root", "three")
	w.issue("sub", one)
	w.issue("sub", two)
	w.issue("root", other)
	rv := w.revoke("spiffe:spiffe://example.org/sub")
	jws, err := w.notary(signer).Report(t.Context(), rv.ID)
	if err != nil {
		t.Fatal(err)
	}
	r, err := audit.VerifyReport(jws, key)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Chains) != 2 || len(r.Grants) != 2 || len(r.Untouched) != 0 {
		t.Errorf("report has chains %+v, %d grants, untouched %+v; want both chains of sub and nothing else", r.Chains, len(r.Grants), r.Untouched)
	}
	if !slices.ContainsFunc(r.Timeline, func(e broker.Entry) bool { return e.Op == broker.OpFence && e.Revision == rv.Revision }) {
		t.Errorf("timeline %+v lacks the fence", r.Timeline)
	}
	if r.Window.Breach != nil || !strings.Contains(r.Markdown(), "No violation is recorded") {
		t.Errorf("window = %+v, want no recorded breach", r.Window)
	}
}

// fixed answers with its fields.
type fixed struct {
	rv   broker.Revocation
	view broker.ChainView
	acks []broker.Acknowledgement
}

func (f fixed) Revocations(context.Context, broker.Page) ([]broker.Revocation, string, error) {
	return nil, "", nil
}

func (f fixed) Revocation(context.Context, broker.RevocationID) (broker.Revocation, error) {
	return f.rv, nil
}
func (f fixed) Acknowledgements(context.Context, broker.RevocationID) ([]broker.Acknowledgement, error) {
	return f.acks, nil
}
func (f fixed) Chains(context.Context, bool, broker.Page) ([]broker.ChainSummary, string, error) {
	return nil, "", nil
}
func (f fixed) Chain(context.Context, broker.ChainID, broker.Page) (broker.ChainView, error) {
	return f.view, nil
}
func (f fixed) ChainEntries(context.Context, broker.ChainID, broker.Revision, int) ([]broker.Entry, error) {
	return nil, nil
}

// TestResidual checks that each secret that is not dead is listed by its kind, with the latest end of all.
func TestResidual(t *testing.T) {
	noon := time.Date(2030, 1, 2, 12, 0, 0, 0, time.UTC)
	grant := func(id string, o broker.Outcome, lease time.Duration, ended bool) broker.Grant {
		g := broker.Grant{ID: broker.GrantID(id), Delegation: "dl", State: broker.StateIssued, Created: noon.Add(-time.Minute), Expires: noon.Add(time.Minute),
			Lease: broker.Lease{ID: "lease", Expires: noon.Add(lease)}, Outcome: o}
		if ended {
			g.State, g.Ended = broker.StateClosed, noon.Add(-time.Second)
		}
		return g
	}
	unproven := grant("unproven", broker.OutcomeUnknown, 7*time.Minute, false)
	unproven.Lease.Outlives = noon.Add(8 * time.Minute) // at its target
	listed, ended := grant("listed", broker.OutcomeDead, 6*time.Minute, true), grant("ended", broker.OutcomeDead, -time.Second, true)
	dead := grant("dead", broker.OutcomeDead, 9*time.Minute, true)
	dead.Evidence = []broker.Evidence{{Outcome: broker.OutcomeDead, Answer: "refused"}} // at its target
	ended.Expires = noon.Add(-time.Second)
	for _, g := range []*broker.Grant{&listed, &ended} { // both certificates on a list, the second expired at the fence
		g.Evidence = []broker.Evidence{{Outcome: broker.OutcomeDead, Answer: "revoked", Listed: true}}
	}
	f := fixed{rv: broker.Revocation{ID: "rv", Chain: "ch", Node: "dl", Selector: "chain:ch", Fenced: noon, Closure: broker.ClosurePartial},
		view: broker.ChainView{Chain: broker.Chain{ID: "ch"}, Delegations: []broker.Delegation{{ID: "dl", Chain: "ch"}},
			Grants: []broker.Grant{grant("static", broker.OutcomeStatic, 0, true), grant("alive", broker.OutcomeAlive, 5*time.Minute, false),
				unproven, listed, ended, dead}}}
	r, err := audit.Compile(t.Context(), f, nil, "rv", noon)
	if err != nil {
		t.Fatal(err)
	}
	want := audit.Residual{Rotate: []broker.GrantID{"static"}, Alive: []broker.GrantID{"alive"}, Unproven: []broker.GrantID{"unproven"}, LatestEnd: noon.Add(8 * time.Minute),
		Listed: []broker.GrantID{"listed"}, ListedEnd: noon.Add(6 * time.Minute)}
	if !reflect.DeepEqual(r.Residual, want) {
		t.Errorf("residual = %+v, want %+v", r.Residual, want)
	}
	if got := grantIDs(r.Grants); slices.ContainsFunc(got[:3], func(id broker.GrantID) bool { return id == "dead" || id == "listed" }) {
		t.Errorf("grants = %v, want the dead ones last", got)
	}
	page := r.Markdown()
	for _, must := range []string{"Must be rotated at their source: 1: static", "Shown to be alive: 1: alive", "Not proven either way: 1: unproven", "at a verifier that checks neither: 1: listed", "**PARTIAL**"} {
		if !strings.Contains(page, must) {
			t.Errorf("the page lacks %q:\n%s", must, page)
		}
	}
}

// TestManyAgents checks that holders without an acknowledgement stay in a report that cannot list all.
func TestManyAgents(t *testing.T) {
	noon := time.Date(2030, 1, 2, 12, 0, 0, 0, time.UTC)
	f := fixed{rv: broker.Revocation{ID: "rv", Chain: "ch", Node: "dl", Selector: "chain:ch", Fenced: noon}, view: broker.ChainView{Chain: broker.Chain{ID: "ch"}}}
	for range audit.MaxAgents {
		f.acks = append(f.acks, broker.Acknowledgement{Delegation: "acknowledged", At: noon})
	}
	f.acks = append(f.acks, broker.Acknowledgement{Delegation: "silent"})
	r, err := audit.Compile(t.Context(), f, nil, "rv", noon)
	if err != nil || len(r.Agents) != audit.MaxAgents || r.AgentsMore != 1 || r.Agents[0].Delegation != "silent" {
		t.Errorf("Compile lists %d agents and %d more, %v; want %d, the silent one first, and 1", len(r.Agents), r.AgentsMore, err, audit.MaxAgents)
	}
}

// TestChangedReport checks that no byte of a signed report can be changed.
func TestChangedReport(t *testing.T) {
	signer, key := newSigner(t)
	jws, err := signer.Sign(audit.Report{Version: 1, Revocation: broker.Revocation{ID: "rv", Reason: "a reason"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := audit.VerifyReport(jws, key); err != nil {
		t.Fatal(err)
	}
	for i := range jws {
		for _, b := range []byte{jws[i] ^ 1, 'A', 'B', '_', '.', '\n', 0} {
			changed := slices.Clone(jws)
			if changed[i] = b; b == jws[i] {
				continue
			}
			if _, err := audit.VerifyReport(changed, key); !errors.Is(err, audit.ErrChanged) && !errors.Is(err, audit.ErrForeign) {
				t.Fatalf("VerifyReport with byte %d as %q = %v, want ErrChanged or ErrForeign", i, b, err)
			}
		}
		if _, err := audit.VerifyReport(jws[:i], key); err == nil {
			t.Fatalf("VerifyReport of the first %d bytes = nil, want an error", i)
		}
	}
	for _, more := range []string{"\n", ".", "A"} {
		if _, err := audit.VerifyReport(append(slices.Clone(jws), more...), key); err == nil {
			t.Errorf("VerifyReport with %q after it = nil, want an error", more)
		}
	}
	if _, other := newSigner(t); true {
		if _, err := audit.VerifyReport(jws, other); !errors.Is(err, audit.ErrForeign) {
			t.Errorf("VerifyReport with another key = %v, want ErrForeign", err)
		}
	}
}

// TestMarkdown checks that external text cannot leave its code span or its table cell.
func TestMarkdown(t *testing.T) {
	r := audit.Report{Revocation: broker.Revocation{Reason: "``` \n# Dead: all | <script>", By: "ann\u202e"},
		Timeline: []broker.Entry{{Detail: "a | b"}}}
	page := r.Markdown()
	if strings.Contains(page, "\n# Dead") || strings.Contains(page, "\u202e") || !strings.Contains(page, "```` ``` ") || !strings.Contains(page, `a \| b`) {
		t.Errorf("external text leaves its place in the page:\n%s", page)
	}
	r.Revocation = broker.Revocation{Closure: broker.ClosureClosed, Grants: 7, Dead: 7, Leases: 3}
	for _, want := range []string{"- Proven dead: 7\n", "- Shown to be alive: 0, of", "- Not proven either way: 0\n",
		"- Leases still being removed: 3. Their secrets are among the dead"} {
		if closed := r.Markdown(); !strings.Contains(closed, want) {
			t.Errorf("the page of a closed revocation with leases lacks %q:\n%s", want, closed)
		}
	}
	fenced, dead := strings.Index(page, "## Fenced"), strings.Index(page, "## Dead")
	if fenced < 0 || dead < fenced {
		t.Errorf("fenced and dead are not two sections of the page:\n%s", page)
	}
}

func FuzzVerifyReport(f *testing.F) {
	signer, key := newSigner(f)
	jws, err := signer.Sign(audit.Report{Version: 1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(jws)
	f.Add([]byte("..."))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, err := audit.VerifyReport(raw, key); err == nil && !bytes.Equal(raw, jws) {
			t.Errorf("VerifyReport accepted %q", raw)
		}
	})
}

// TestSignAs checks that a JWS of another type is never a report.
func TestSignAs(t *testing.T) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := audit.NewSigner("example.org/pawl", jose.JSONWebKey{Key: private})
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signer.SignAs("statuslist+jwt", []byte(`{"version":1}`))
	if err != nil {
		t.Fatal(err)
	}
	signed, err := jose.ParseSignedCompact(string(jws), []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		t.Fatal(err)
	}
	if payload, err := signed.Verify(public); err != nil || string(payload) != `{"version":1}` {
		t.Errorf("the JWS holds %q, %v", payload, err)
	}
	if _, err := audit.VerifyReport(jws, jose.JSONWebKey{Key: public}); !errors.Is(err, audit.ErrForeign) {
		t.Errorf("VerifyReport of a status list = %v, want ErrForeign", err)
	}
	for _, typ := range []string{audit.ReportType, `a","alg":"none`, `a\`, "a b", "é"} {
		if _, err := signer.SignAs(typ, nil); err == nil {
			t.Errorf("SignAs(%q) signed", typ)
		}
	}
}
