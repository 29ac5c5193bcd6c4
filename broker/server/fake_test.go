package server_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/apitest"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/broker/server"
)

const (
	chainID      = broker.ChainID("ch0123456789abcdefghjkmnpq")
	delegationID = broker.DelegationID("dl0123456789abcdefghjkmnpq")
	grantID      = broker.GrantID("gr0123456789abcdefghjkmnpq")
	revocationID = broker.RevocationID("rv0123456789abcdefghjkmnpq")
	canaryID     = broker.CanaryID("cn0123456789abcdefghjkmnpq")

	marker = "hunter2-marker" // the secret: it must be in one answer and nowhere else
)

var (
	noon    = time.Date(2030, 1, 2, 12, 0, 0, 0, time.FixedZone("elsewhere", 3600))
	agentID = spiffeid.RequireFromString("spiffe://example.org/agent")
)

// fake answers every call with one full object, or with err. It records the request.
type fake struct {
	mu     sync.Mutex // guards everything below
	err    error
	panics any
	asked  any
	limit  int
	closed []broker.GrantID

	presented []string // callers and values

	repeated bool
	secret   []byte
	standing broker.Status
	standErr error // of Standing only, after the first call
	reads    int
	beats    int // the calls in reads that were the holder's own requests
	rev      broker.Revocation
	changed  chan struct{}
	onIssue  func()
	onRead   func() // called after each Standing
}

func newFake() *fake {
	d := delegation()
	return &fake{secret: []byte(`{"password":"` + marker + `"}`), standing: broker.Status{Delegation: d},
		rev: revocation(), changed: make(chan struct{})}
}

func (f *fake) answer(asked any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.panics != nil {
		panic(f.panics)
	}
	f.asked = asked
	return f.err
}

// change alters the state of the fake and notifies every watcher.
func (f *fake) change(alter func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	alter()
	close(f.changed)
	f.changed = make(chan struct{})
}

func fence() *broker.Fence {
	return &broker.Fence{Generation: 1, At: noon, Revocation: revocationID, Frozen: true}
}

func delegation() broker.Delegation {
	c, err := args.ParseConstraint([]byte(`{"one_of":["orders"]}`))
	if err != nil {
		panic(err)
	}
	return broker.Delegation{
		ID: delegationID, Chain: chainID, Parent: delegationID, Holder: agentID,
		Scope:  broker.Scope{{Tool: "postgres", Use: true, Delegate: true, Args: map[string]args.Constraint{"table": c}}},
		Budget: broker.Budget{Steps: 1, Live: 2, PerMinute: 3, Tools: map[broker.ToolName]int{"postgres": 4}},
		Depth:  5, Created: noon, Expires: noon.Add(time.Hour), Fence: fence(), Heartbeat: 30 * time.Second,
		Tokens: []broker.Handle{{Accessor: "accessor-marker"}},
	}
}

func grant() broker.Grant {
	args, err := args.Parse([]byte(`{"table":"orders"}`))
	if err != nil {
		panic(err)
	}
	return broker.Grant{
		ID: grantID, Chain: chainID, Delegation: delegationID, Caller: agentID, Tool: "postgres", Backend: "postgres",
		Narrowing: broker.NarrowNative, Args: args, ArgsDigest: "5e", Purpose: "reading", Path: brokertest.Path("database/creds"), State: broker.StateIssued,
		Created: noon, Expires: noon.Add(time.Minute), Bundle: "sha256:00", Policies: []string{"p1"},
		Token: broker.Handle{Accessor: "accessor-marker"}, Lease: broker.Lease{ID: "database/creds/x", Ref: "pawl-x", Request: "request-x", Expires: noon.Add(30 * time.Second)},
		Fence: fence(), Ending: broker.EndingClosed, Ended: noon, Outcome: broker.OutcomeDead,
		Evidence: []broker.Evidence{{At: noon, Check: "vault", Outcome: broker.OutcomeDead, Answer: "gone"}},
		Sealed:   "thumb", Collector: agentID, Collected: noon,
	}
}

func chain() broker.Chain {
	return broker.Chain{ID: chainID, Task: "t", Opener: agentID, Opened: noon, Labels: map[string]string{"env": "prod"}, Root: delegationID,
		Envelope: &broker.Envelope{Issuer: "https://desk.example", ID: "j-1", Digest: "sha256:00", Task: "ticket 17",
			Labels: map[string]string{"team": "payments"}, Behalf: "ana", Issued: noon, Expires: noon.Add(time.Hour)}}
}

func revocation() broker.Revocation {
	return broker.Revocation{ID: revocationID, Selector: "chain:x", Reason: "r", By: "ann", Unfreezer: "bob", Asked: noon, Fenced: noon,
		Revision: 7, Closure: broker.ClosurePartial, Grants: 4, Dead: 1, Alive: 1, Unknown: 2, Static: 1, Tokens: 1, Leases: 5, LatestEnd: noon, Unswept: true, Nothing: true, Repeated: true}
}

func entry() broker.Entry {
	return broker.Entry{Revision: 9, At: noon, Actor: "pawl", Op: broker.OpFence, Chain: chainID, Delegation: delegationID, Grant: grantID,
		Revocation: revocationID, Tool: "postgres", Code: broker.CodeFenced, Bundle: "sha256:00", Policies: []string{"p1"}, Detail: "d"}
}

func (f *fake) Open(_ context.Context, _ broker.Caller, r broker.OpenRequest) (broker.Delegation, error) {
	return delegation(), f.answer(r)
}

func (f *fake) Delegate(_ context.Context, _ broker.Caller, r broker.DelegateRequest) (broker.Delegation, error) {
	return delegation(), f.answer(r)
}

func (f *fake) Status(ctx context.Context, c broker.Caller, id broker.DelegationID) (broker.Status, error) {
	f.mu.Lock()
	f.beats++
	f.mu.Unlock()
	return f.Peek(ctx, c, id)
}

func (f *fake) Peek(_ context.Context, _ broker.Caller, id broker.DelegationID) (broker.Status, error) {
	err := f.answer(id)
	if f.onRead != nil {
		defer f.onRead()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.reads++; f.reads > 1 && f.standErr != nil {
		err = f.standErr
	}
	return f.standing, err
}

func (f *fake) Issue(_ context.Context, _ broker.Caller, r broker.StepRequest) (broker.Issued, error) {
	if f.onIssue != nil {
		f.onIssue()
	}
	if f.repeated {
		return broker.Issued{Grant: grant(), Repeated: true}, f.answer(r)
	}
	return broker.Issued{Grant: grant(), Secret: broker.NewSecret(f.secret)}, f.answer(r)
}

func (f *fake) Close(_ context.Context, _ broker.Caller, id broker.GrantID) (broker.Grant, error) {
	err := f.answer(id)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = append(f.closed, id)
	return grant(), err
}

func (f *fake) Collect(_ context.Context, _ broker.Caller, id broker.GrantID) (broker.Grant, []byte, error) {
	return grant(), []byte("a.b.c.d.e"), f.answer(id)
}

func (f *fake) Hold(_ context.Context, _ broker.Caller, id broker.GrantID) (func(), error) {
	return func() {}, f.answer(id)
}

func (f *fake) Report(_ context.Context, _ broker.Caller, r broker.ReportRequest) (broker.Reported, error) {
	return broker.Reported{Consequence: broker.ConsequenceRevokeChain, Revocation: revocationID}, f.answer(r)
}

func (f *fake) Heartbeat(_ context.Context, _ broker.Caller, id broker.DelegationID) error {
	return f.answer([]string{string(id), ""})
}

func (f *fake) Acknowledge(_ context.Context, _ broker.Caller, id broker.DelegationID, rv broker.RevocationID) error {
	return f.answer([]string{string(id), string(rv)})
}

func (f *fake) Acknowledgements(_ context.Context, id broker.RevocationID) ([]broker.Acknowledgement, error) {
	return []broker.Acknowledgement{{Chain: chainID, Delegation: delegationID, Holder: agentID, At: noon}, {Chain: chainID, Delegation: delegationID, Holder: agentID}}, f.answer(id)
}

func (f *fake) Awaited(_ context.Context, id broker.RevocationID) ([]broker.Awaited, error) {
	return []broker.Awaited{{Grant: grantID, Chain: chainID, Tool: "postgres", Backend: "db", Why: "ledger: a mint", Until: noon}}, f.answer(id)
}

func (f *fake) Watch(broker.ChainID) (<-chan struct{}, func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed, func() {}
}

func (f *fake) WatchFences(id broker.ChainID) (<-chan struct{}, func()) { return f.Watch(id) }

func (f *fake) Plan(_ context.Context, _ broker.Operator, s selector.Selector) (broker.Plan, error) {
	return broker.Plan{Token: "pl", Selector: s.String(), Revision: 3, Made: noon, Chains: 1, Nodes: 2, Later: 1, Grants: 3, Issued: 2, Live: 1,
		ByBackend: map[string]int{"db": 3}, Tasks: []broker.PlannedTask{{Chain: chainID, Task: "t", SignedTask: "ticket 17", Behalf: "ana", Delegations: 2, Grants: 3}}, TasksMore: 1,
		ByTool: map[broker.ToolName]int{"postgres": 3}, ByLabel: map[string]int{"native": 3}, ByCaller: map[string]int{agentID.String(): 3},
		Static: 1, LatestEnd: noon}, f.answer(s)
}

func (f *fake) Revoke(_ context.Context, _ broker.Operator, r selector.Request) (broker.Revocation, error) {
	return revocation(), f.answer(r)
}

func (f *fake) Unfreeze(_ context.Context, _ broker.Operator, id broker.RevocationID) (broker.Revocation, error) {
	return revocation(), f.answer(id)
}

func (f *fake) Revocation(_ context.Context, id broker.RevocationID) (broker.Revocation, error) {
	err := f.answer(id)
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.rev, err
}

func (f *fake) Revocations(_ context.Context, p broker.Page) ([]broker.Revocation, string, error) {
	return []broker.Revocation{revocation()}, string(revocationID), f.answer(p)
}

func (f *fake) Chains(_ context.Context, all bool, p broker.Page) ([]broker.ChainSummary, string, error) {
	return []broker.ChainSummary{{Chain: chain(), Delegations: 1, Live: 2, Steps: 3, Fence: fence()}}, string(chainID), f.answer(chainsAsked{all, p})
}

// chainsAsked is a request for a list of chains.
type chainsAsked struct {
	All  bool
	Page broker.Page
}

func (f *fake) Chain(_ context.Context, id broker.ChainID, p broker.Page) (broker.ChainView, error) {
	return broker.ChainView{Chain: chain(), Delegations: []broker.Delegation{delegation()}, Grants: []broker.Grant{grant()}, Next: string(grantID)}, f.answer(p)
}

func canary() broker.Canary {
	return broker.Canary{ID: canaryID, Chain: chainID, Note: "n", By: "ann", Planted: noon, Touched: noon, Touches: 2}
}

func (f *fake) Plant(_ context.Context, _ broker.Operator, r broker.PlantRequest) (broker.Canary, string, error) {
	return canary(), "hvs.CAESx", f.answer(r)
}

func (f *fake) Canaries(_ context.Context, p broker.Page) ([]broker.Canary, string, error) {
	return []broker.Canary{canary()}, string(canaryID), f.answer(p)
}

func (f *fake) Pull(_ context.Context, _ broker.Operator, id broker.CanaryID) (broker.Canary, error) {
	return canary(), f.answer(id)
}

func (f *fake) Present(_ context.Context, c broker.Caller, value string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.presented = append(f.presented, c.ID.String()+" "+value)
}

func (f *fake) Entries(_ context.Context, after broker.Revision, limit int) ([]broker.Entry, error) {
	f.limit = limit
	return []broker.Entry{entry()}, f.answer(after)
}

func (f *fake) ChainEntries(_ context.Context, _ broker.ChainID, after broker.Revision, limit int) ([]broker.Entry, error) {
	return f.Entries(context.Background(), after, limit)
}

// fakeNotary signs nothing and answers like its fake.
type fakeNotary struct{ *fake }

func (n fakeNotary) Report(_ context.Context, id broker.RevocationID) ([]byte, error) {
	return []byte("a.b.c"), n.answer(id)
}

func (n fakeNotary) Checkpoint(context.Context) ([]byte, error) {
	return []byte("pawl\n1\n"), n.answer(nil)
}

// rig is a server over a fake. A request with the header Test-Identity has an identity.
type rig struct {
	*server.Server
	t    *testing.T
	fake *fake
	log  *bytes.Buffer
}

func newRig(t *testing.T, alter ...func(*server.Config)) rig {
	t.Helper()
	r := rig{t: t, fake: newFake(), log: new(bytes.Buffer)}
	cfg := server.Config{
		Broker: r.fake, Now: func() time.Time { return noon }, Notary: fakeNotary{r.fake},
		Signals: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) }),
		Introspect: func(_ context.Context, token string) (api.Introspection, error) {
			if token == "down" {
				return api.Introspection{}, broker.Errorf(broker.Unavailable, "introspect", "down")
			}
			if token != "good" {
				return api.Introspection{}, nil
			}
			return api.Introspection{Active: true, Issuer: "https://pawl.example.org", Subject: agentID.String(), Audience: "mail",
				Scope: "read", Expires: noon.Unix() + 60, Issued: noon.Unix(), ID: string(grantID)}, nil
		},
		StatusList: func(backend string) ([]byte, error) {
			return map[string][]byte{"tokens": []byte("a.signed.list")}[backend], nil
		},
		Log: slog.New(slog.NewJSONHandler(r.log, nil)),
		Identify: func(req *http.Request) (broker.Caller, error) {
			if req.Header.Get("Test-Identity") == "" {
				return broker.Caller{}, errors.New("no certificate")
			}
			return broker.Caller{ID: agentID, Proof: broker.ProofX509, NotAfter: noon.Add(time.Hour)}, nil
		},
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", api.MetricsType)
		}),
		Operator: func(req *http.Request) (broker.Operator, error) {
			if req.Header.Get("Test-Identity") == "" {
				return broker.Operator{}, broker.Errorf(broker.Unauthenticated, "operator", "no operator")
			}
			return broker.Operator{Name: "ann"}, nil
		},
	}
	for _, a := range alter {
		a(&cfg)
	}
	s, err := server.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Server = s
	return r
}

// Agents and Operators compare each answer with the OpenAPI document.
func (r rig) Agents() http.Handler    { return documented(r.t, r.Server.Agents()) }
func (r rig) Operators() http.Handler { return documented(r.t, r.Server.Operators()) }

// openapi is the OpenAPI document. All tests of the package together must see each of its answers.
var openapi = sync.OnceValue(func() *apitest.Document {
	d, err := apitest.Read()
	if err != nil {
		panic(err)
	}
	return d
})

func TestMain(m *testing.M) { os.Exit(openapi().Main(m)) }

func documented(t testing.TB, h http.Handler) http.Handler {
	t.Helper()
	return openapi().For(t)(h)
}

func (r rig) handler(listener string) http.Handler {
	if listener == "operators" {
		return r.Operators()
	}
	return r.Agents()
}

// ask sends an authenticated request; a body is declared as JSON. Each of more is a header, as in "Name: value".
func (r rig) ask(listener, method, path, body string, more ...string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(method, path, strings.NewReader(body))
	req.Header.Set("Test-Identity", "yes")
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/json")
	}
	for _, h := range more {
		name, value, _ := strings.Cut(h, ": ")
		switch req.Header.Del(name); value {
		case "":
		case "(empty)":
			req.Header.Set(name, "")
		default:
			req.Header.Set(name, value)
		}
	}
	w := httptest.NewRecorder()
	r.handler(listener).ServeHTTP(w, req)
	return w
}

func problem(t *testing.T, w *httptest.ResponseRecorder) (p api.Problem) {
	t.Helper()
	if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil {
		t.Fatalf("answer %d %q is not a problem document: %v", w.Code, w.Body, err)
	}
	if got := w.Header().Get("Content-Type"); got != api.ProblemType || p.Status != w.Code || p.Request == "" {
		t.Errorf("problem %+v came with status %d and type %q", p, w.Code, got)
	}
	return p
}

func decoded[T any](t *testing.T, w *httptest.ResponseRecorder) (v T) {
	t.Helper()
	if err := json.Unmarshal(w.Body.Bytes(), &v, json.RejectUnknownMembers(true)); err != nil {
		t.Fatalf("answer %d %q: %v", w.Code, w.Body, err)
	}
	return v
}
