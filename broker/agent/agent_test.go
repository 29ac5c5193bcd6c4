package agent_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"go.uber.org/goleak"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	marker = "hunter2-marker"

	chain      = "ch000000000000000000000001"
	root       = "dl000000000000000000000001" // the delegation that a script opens
	child      = "dl000000000000000000000002" // the delegation that it passes on
	revocation = "rv000000000000000000000001"
)

// grant is the id of the nth step.
func grant(n int) string { return fmt.Sprintf("gr%024d", n) }

// script is a broker that says what it is told to. broker/server tests the SDK with a real one.
type script struct {
	t      *testing.T
	life   time.Duration       // of secrets
	answer func() *api.Problem // to a step, a closing or a sign of life; nil: yes
	beat   int64               // heartbeat of the chain that is opened

	mu      sync.Mutex // guards everything below
	grants  int
	steps   int
	closed  []string
	keys    []string
	streams int
	refuse  bool        // streams
	feeds   []chan text // open streams
	joined  api.Standing
	sealed  map[string]string // secrets that wait for their collectors, by grant
	heard   []string          // bodies
	told    chan struct{}     // has a value for each heard that was answered
	opened  chan struct{}     // has a value for each stream that was opened
}

// text is a piece of a stream; an empty one ends it.
type text string

func newScript(t *testing.T) *script {
	return &script{t: t, life: time.Minute, opened: make(chan struct{}, 100), told: make(chan struct{}, 100),
		joined: api.Standing{Delegation: &api.Delegation{ID: child, Chain: chain, Parent: root}}, sealed: map[string]string{}}
}

func (s *script) client(cfg agent.Config) *agent.Client {
	s.t.Helper()
	h := httptest.NewServer(s)
	s.t.Cleanup(h.Close)
	s.t.Cleanup(func() { s.say("") })
	cfg.Address, cfg.HTTPClient = h.URL, h.Client()
	c, err := agent.New(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() }) // it always succeeds
	return c
}

func (s *script) open(cfg agent.Config) *agent.Delegation {
	s.t.Helper()
	d, err := s.client(cfg).Open(s.t.Context(), agent.Chain{Task: "t", Rights: []agent.Right{{Tool: "db", Use: true}}})
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

func (s *script) begin(d *agent.Delegation) *agent.Step {
	s.t.Helper()
	step, err := d.Begin(s.t.Context(), agent.Call{Tool: "db", Args: agent.Args{"table": "orders"}})
	if err != nil {
		s.t.Fatal(err)
	}
	return step
}

// stream waits for the next stream to be open.
func (s *script) stream() {
	s.t.Helper()
	await(s.t, s.opened, "a stream")
}

// say writes to every open stream.
func (s *script) say(what text) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.feeds {
		f <- what
	}
	if what == "" {
		s.feeds = nil
	}
}

func standing(st api.Standing) text { return event(api.EventStanding, st) }

func event(name string, data any) text {
	raw, err := json.Marshal(data)
	if err != nil {
		panic(err)
	}
	return text(fmt.Sprintf("event: %s\ndata: %s\n\n", name, raw))
}

func (s *script) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body) // so that the connection is used again
	switch path := r.URL.EscapedPath(); {
	case path == "/v1/chains":
		reply(w, 201, api.Delegation{ID: root, Chain: chain, HeartbeatSeconds: s.beat})
	case path == "/v1/delegations/"+root, path == "/v1/delegations/"+child:
		reply(w, 200, s.joined)
	case strings.HasSuffix(path, "/delegate"):
		reply(w, 201, api.Delegation{ID: child, Chain: chain, Parent: root})
	case strings.HasSuffix(path, "/steps"):
		s.step(w, r, body)
	case strings.HasSuffix(path, "/collect"):
		s.collect(w, strings.Split(path, "/")[3])
	case strings.HasSuffix(path, "/close"):
		s.close(w, strings.Split(path, "/")[3])
	case strings.HasSuffix(path, "/heard"):
		s.hear(w, string(body))
	case strings.HasSuffix(path, "/events"):
		s.events(w, r)
	default:
		reply(w, 404, api.NewProblem(api.KindNotFound, "", ""))
	}
}

func reply(w http.ResponseWriter, status int, body any) {
	w.WriteHeader(status)
	_ = json.MarshalWrite(w, body) // the test reads what came
}

func (s *script) step(w http.ResponseWriter, r *http.Request, body []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps++
	s.keys = append(s.keys, r.Header.Get(api.IdempotencyKey))
	if s.answer != nil {
		if p := s.answer(); p != nil {
			reply(w, p.Status, p)
			return
		}
	}
	s.grants++
	now := time.Now()
	g := api.Grant{ID: grant(s.grants), Chain: chain, Delegation: root,
		Created: now.Add(time.Hour), Expires: now.Add(time.Hour + s.life)} // its clock is wrong
	out := api.Issued{Secret: []byte(`{"username":"reader","password":"` + marker + `","port":5432}`), Grant: g}
	var in api.StepRequest
	if json.Unmarshal(body, &in) == nil && in.Seal != nil {
		out.Grant.Sealed, out.Grant.Collector = "thumbprint", in.Seal.Collector
		s.sealed[g.ID] = seal(in.Seal.Key, g.ID, out.Secret)
		out.Secret = nil
	}
	reply(w, 201, out)
}

// seal encrypts a secret as the broker does.
func seal(key []byte, grant string, secret []byte) string {
	var k jose.JSONWebKey
	if err := k.UnmarshalJSON(key); err != nil {
		panic(err)
	}
	options := new(jose.EncrypterOptions).WithType(api.SealedType).WithHeader("grant", grant)
	e, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{Algorithm: jose.ECDH_ES, Key: k.Key}, options)
	if err != nil {
		panic(err)
	}
	jwe, err := e.Encrypt(secret)
	if err != nil {
		panic(err)
	}
	text, err := jwe.CompactSerialize()
	if err != nil {
		panic(err)
	}
	return text
}

func (s *script) collect(w http.ResponseWriter, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	jwe, ok := s.sealed[id]
	if !ok {
		reply(w, 409, api.NewProblem(api.KindConflict, "already_collected", ""))
		return
	}
	delete(s.sealed, id)
	now := time.Now().Add(time.Hour) // its clock is wrong
	reply(w, 200, api.Collected{JWE: jwe, Grant: api.Grant{ID: id, Collected: now, Expires: now.Add(s.life)}})
}

func (s *script) close(w http.ResponseWriter, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.answer != nil {
		if p := s.answer(); p != nil {
			reply(w, p.Status, p)
			return
		}
	}
	s.closed = append(s.closed, id)
	reply(w, 200, api.Grant{ID: id, Chain: chain, Delegation: root})
}

func (s *script) hear(w http.ResponseWriter, body string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heard = append(s.heard, body)
	if s.answer != nil {
		if p := s.answer(); p != nil {
			reply(w, p.Status, p)
			return
		}
	}
	reply(w, 200, api.Heard{})
	s.told <- struct{}{}
}

func (s *script) events(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.streams++
	if s.refuse {
		s.mu.Unlock()
		reply(w, 503, api.NewProblem(api.KindUnavailable, "", ""))
		return
	}
	feed := make(chan text, 100)
	s.feeds = append(s.feeds, feed)
	s.mu.Unlock()
	w.Header().Set("Content-Type", "text/event-stream")
	flush := http.NewResponseController(w)
	_ = flush.Flush() // a test server's writer flushes
	s.opened <- struct{}{}
	for {
		select {
		case what := <-feed:
			if what == "" {
				return
			}
			_, _ = io.WriteString(w, string(what)) // the client may have gone
			_ = flush.Flush()
		case <-r.Context().Done():
			return
		}
	}
}

func await(t *testing.T, done <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatalf("waited 10 s for %s", what)
	}
}

func wantEnd(t *testing.T, ctx context.Context, kind error) {
	t.Helper()
	await(t, ctx.Done(), fmt.Sprintf("a context to end with %v", kind))
	if cause := context.Cause(ctx); !errors.Is(cause, kind) {
		t.Errorf("the context ended because of %v, want %v", cause, kind)
	}
}

func wantRunning(t *testing.T, ctx context.Context) {
	t.Helper()
	if ctx.Err() != nil {
		t.Errorf("the context ended because of %v, want it running", context.Cause(ctx))
	}
}

// TestStep: the secret is there during the call and nowhere after it, however the call ends.
func TestStep(t *testing.T) {
	failed := errors.New("the work failed")
	for name, row := range map[string]struct {
		f    func(cancel func()) error
		want error
	}{
		"good":      {func(func()) error { return nil }, nil},
		"fails":     {func(func()) error { return failed }, failed},
		"cancelled": {func(cancel func()) error { cancel(); return nil }, nil},
		"panics":    {func(func()) error { panic(failed) }, failed},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScript(t)
			d := s.open(agent.Config{})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var kept *agent.Secret
			var inside context.Context
			err := func() (err error) {
				defer func() {
					if p := recover(); p != nil {
						err = p.(error)
					}
				}()
				return d.Step(ctx, agent.Call{Tool: "db"}, func(ctx context.Context, secret *agent.Secret) error {
					if kept, inside = secret, ctx; secret.Field("password") != marker || secret.Field("port") != "5432" || secret.Field("user") != "" {
						t.Error("the secret's members are not what the broker sent")
					}
					return row.f(cancel)
				})
			}()
			if !errors.Is(err, row.want) || row.want == nil && err != nil {
				t.Errorf("Step = %v, want %v", err, row.want)
			}
			if len(s.closed) != 1 || kept.JSON() != nil || kept.Field("password") != "" || inside.Err() == nil {
				t.Errorf("after the step: closed %v, context %v, want it closed, ended and the secret wiped", s.closed, inside.Err())
			}
		})
	}
}

// TestPushed: what the broker says on the stream ends what it is about, and nothing else.
func TestPushed(t *testing.T) {
	final := &api.Fence{Revocation: revocation}
	for name, row := range map[string]struct {
		event      text
		kind       error // how the first step ends; nil: it goes on
		all        bool  // the second and the delegation, too
		revocation string
	}{
		"nothing yet":        {standing(api.Standing{}), nil, false, ""},
		"one grant":          {standing(api.Standing{Ended: []string{grant(1)}}), agent.ErrRevoked, false, ""},
		"frozen":             {standing(api.Standing{Fence: &api.Fence{Frozen: true}}), nil, false, ""},
		"revoked":            {standing(api.Standing{Fence: final}), agent.ErrRevoked, true, revocation},
		"over":               {event(api.EventProblem, api.NewProblem(api.KindExpired, "", "over")), agent.ErrExpired, true, ""},
		"no longer ours":     {event(api.EventProblem, api.NewProblem(api.KindNotFound, "", "")), agent.ErrNotFound, true, ""},
		"of a later version": {event("news", map[string]int{"x": 1}), nil, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScript(t)
			d := s.open(agent.Config{})
			one, two := s.begin(d), s.begin(d)
			s.stream()
			s.say(row.event)
			s.say(standing(api.Standing{Ended: []string{grant(3)}})) // the handshake: grant 3 is begun below
			if row.kind != nil {
				wantEnd(t, one.Context(), row.kind)
			}
			if row.all {
				wantEnd(t, two.Context(), row.kind)
				wantEnd(t, d.Context(), row.kind)
				var p *agent.Error
				if _, err := d.Begin(t.Context(), agent.Call{Tool: "db"}); !errors.As(err, &p) || !errors.Is(err, row.kind) || p.Revocation != row.revocation || s.steps != 2 {
					t.Errorf("Begin afterwards = %v after %d requests, want %v without another", err, s.steps, row.kind)
				}
				return
			}
			// Heard of before the answer to its own step: the step is stopped all the same.
			wantEnd(t, s.begin(d).Context(), agent.ErrRevoked)
			if row.kind == nil {
				wantRunning(t, one.Context())
			}
			wantRunning(t, two.Context())
			wantRunning(t, d.Context())
		})
	}
}

// TestAcknowledge: what was heard is acknowledged once the steps were told, although one of their
// functions hangs, and again when the answer is lost.
func TestAcknowledge(t *testing.T) {
	s := newScript(t)
	d := s.open(agent.Config{})
	step := s.begin(d) // never closed: whoever uses it hangs
	s.stream()
	lost := 2
	s.mu.Lock()
	s.answer = func() *api.Problem {
		if step.Context().Err() == nil {
			t.Error("acknowledged before the step's context had ended")
		}
		if lost--; lost >= 0 {
			return api.NewProblem(api.KindUnavailable, "ledger_unavailable", "")
		}
		return nil
	}
	s.mu.Unlock()
	s.say(standing(api.Standing{Fence: &api.Fence{Revocation: revocation}}))
	await(t, s.told, "the acknowledgement")
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.heard) != 3 || s.heard[2] != `{"revocation":"`+revocation+`"}` {
		t.Errorf("the broker was told %q, want the revocation three times", s.heard)
	}
}

// TestAcknowledgesOnlyRevocations: an end that is no revocation has nothing to acknowledge.
func TestAcknowledgesOnlyRevocations(t *testing.T) {
	for _, event := range []text{event(api.EventProblem, api.NewProblem(api.KindExpired, "", "over")),
		standing(api.Standing{Fence: &api.Fence{}})} {
		s := newScript(t)
		c := s.client(agent.Config{})
		d, err := c.Open(t.Context(), agent.Chain{Task: "t"})
		if err != nil {
			t.Fatal(err)
		}
		over := d.Context()
		s.stream()
		s.say(event)
		await(t, over.Done(), "the delegation to end")
		if err := c.Close(); err != nil || len(s.heard) != 0 {
			t.Errorf("Close = %v after the broker was told %q, want nil and nothing", err, s.heard)
		}
	}
}

// TestHeartbeat: the promise to be heard is kept until the delegation is left, and what comes back
// is heard.
func TestHeartbeat(t *testing.T) {
	s := newScript(t)
	s.beat = 1
	d := s.open(agent.Config{})
	await(t, s.told, "a sign of life")
	await(t, s.told, "another")
	s.mu.Lock()
	if s.heard[0] != "{}" || s.streams != 0 {
		t.Errorf("the broker was told %q over %d streams, want a sign of life without any", s.heard, s.streams)
	}
	p := api.NewProblem(api.KindRevoked, "fenced", "")
	p.Revocation = revocation
	s.answer = func() *api.Problem {
		if s.heard[len(s.heard)-1] == "{}" {
			return p
		}
		return nil
	}
	s.mu.Unlock()
	wantEnd(t, d.Context(), agent.ErrRevoked)
	await(t, s.told, "the acknowledgement")

	s = newScript(t)
	s.beat = 1
	c := s.client(agent.Config{})
	left, err := c.Open(t.Context(), agent.Chain{Task: "t"})
	if err != nil {
		t.Fatal(err)
	}
	await(t, s.told, "a sign of life")
	left.Leave()
	if err := c.Close(); err != nil { // which waits for whoever still tells the broker anything
		t.Error(err)
	}
}

// TestReconnect: a stream that ends for no reason of ours is opened again, and heard.
func TestReconnect(t *testing.T) {
	s := newScript(t)
	d := s.open(agent.Config{})
	step := s.begin(d)
	for range 3 {
		s.stream()
		s.say("")
	}
	s.stream()
	wantRunning(t, step.Context())
	s.say(standing(api.Standing{Fence: &api.Fence{}}))
	wantEnd(t, step.Context(), agent.ErrRevoked)
}

// TestFailClosed: with the option, losing the broker ends steps; without, it does not.
func TestFailClosed(t *testing.T) {
	for after, want := range map[time.Duration]error{50 * time.Millisecond: agent.ErrUnavailable, 0: nil} {
		s := newScript(t)
		s.refuse = true
		step := s.begin(s.open(agent.Config{FailClosed: after}))
		if want != nil {
			wantEnd(t, step.Context(), want)
			continue
		}
		for deadline := time.Now().Add(10 * time.Second); ; {
			s.mu.Lock()
			tried := s.streams
			s.mu.Unlock()
			if tried >= 3 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("waited 10 s for three attempts at a stream")
			}
			<-time.After(time.Millisecond)
		}
		wantRunning(t, step.Context())
	}
}

// TestDeadline: a step's context ends with its secret, whatever the broker's clock says.
func TestDeadline(t *testing.T) {
	s := newScript(t)
	s.life = 30 * time.Millisecond
	wantEnd(t, s.begin(s.open(agent.Config{})).Context(), agent.ErrExpired)
}

// TestNoRetry: a step is asked for once, whatever the answer.
func TestNoRetry(t *testing.T) {
	for _, p := range []*api.Problem{
		api.NewProblem(api.KindUnavailable, "outcome_unknown", "").After(time.Millisecond),
		api.NewProblem(api.KindDenied, "too_fast", "").After(time.Millisecond),
		api.NewProblem(api.KindInternal, "", ""),
	} {
		s := newScript(t)
		d := s.open(agent.Config{})
		s.answer = func() *api.Problem { return p }
		var got *agent.Error
		_, err := d.Begin(t.Context(), agent.Call{Tool: "db", IdempotencyKey: "k1"})
		if !errors.As(err, &got) || !errors.Is(err, p.Kind) || got.Code != p.Code || got.RetryAfter() != p.RetryAfter() || s.steps != 1 {
			t.Errorf("Begin = %v after %d requests, want %v after one", err, s.steps, p)
		}
		if s.keys[0] != "k1" {
			t.Errorf("the idempotency key arrived as %q, want k1", s.keys[0])
		}
	}
}

// TestCloseAgain: closing may be repeated until it succeeds, and then does nothing.
func TestCloseAgain(t *testing.T) {
	s := newScript(t)
	step := s.begin(s.open(agent.Config{}))
	s.answer = func() *api.Problem { return api.NewProblem(api.KindUnavailable, "", "") }
	if err := step.Close(t.Context()); !errors.Is(err, agent.ErrUnavailable) || step.Secret().JSON() != nil {
		t.Errorf("Close = %v, want unavailable, and the secret wiped all the same", err)
	}
	s.answer = nil
	for range 2 {
		if err := step.Close(t.Context()); err != nil || len(s.closed) != 1 {
			t.Errorf("Close = %v, and the broker closed %v", err, s.closed)
		}
	}
}

// TestClosedUnderWork: work that was cut short says why, and closing's own failure as well.
func TestClosedUnderWork(t *testing.T) {
	s := newScript(t)
	d := s.open(agent.Config{})
	err := d.Step(t.Context(), agent.Call{Tool: "db"}, func(ctx context.Context, _ *agent.Secret) error {
		s.stream()
		s.say(standing(api.Standing{Fence: &api.Fence{}}))
		<-ctx.Done()
		s.mu.Lock()
		s.answer = func() *api.Problem { return api.NewProblem(api.KindInternal, "", "") }
		s.mu.Unlock()
		return ctx.Err()
	})
	for _, want := range []error{context.Canceled, agent.ErrRevoked, agent.ErrInternal} {
		if !errors.Is(err, want) {
			t.Errorf("Step = %v, want %v in it", err, want)
		}
	}
}

func TestClientClose(t *testing.T) {
	s := newScript(t)
	c := s.client(agent.Config{FailClosed: time.Hour})
	d, err := c.Open(t.Context(), agent.Chain{Task: "t"})
	if err != nil {
		t.Fatal(err)
	}
	step := s.begin(d)
	s.stream()
	for range 2 {
		if err := c.Close(); err != nil {
			t.Errorf("Close = %v, want nil", err)
		}
		if step.Context().Err() == nil {
			t.Error("Close returned while something of the client ran")
		}
	}
	wantEnd(t, step.Context(), context.Canceled)
	if _, err := d.Begin(t.Context(), agent.Call{Tool: "db"}); !errors.Is(err, context.Canceled) {
		t.Errorf("Begin after Close = %v, want canceled", err)
	}
}

func TestLeave(t *testing.T) {
	s := newScript(t)
	d := s.open(agent.Config{})
	step := s.begin(d)
	s.stream()
	d.Leave()
	wantEnd(t, step.Context(), context.Canceled)
	if err := step.Close(t.Context()); err != nil {
		t.Errorf("closing a step after Leave = %v, want nil", err)
	}
}

func TestJoin(t *testing.T) {
	good := api.Delegation{ID: root, Chain: chain}
	for name, row := range map[string]struct {
		st   api.Standing
		want error
	}{
		"good":    {api.Standing{Delegation: &good}, nil},
		"frozen":  {api.Standing{Delegation: &good, Fence: &api.Fence{Frozen: true}}, nil},
		"revoked": {api.Standing{Delegation: &good, Fence: &api.Fence{}}, agent.ErrRevoked},
		"absent":  {api.Standing{}, agent.ErrUnavailable},
		"garbage": {api.Standing{Delegation: &api.Delegation{ID: child[:25], Chain: chain}}, agent.ErrUnavailable},
	} {
		s := newScript(t)
		s.joined = row.st
		d, err := s.client(agent.Config{}).Join(t.Context(), root)
		if !errors.Is(err, row.want) || row.want == nil && (err != nil || d.ID() != root) {
			t.Errorf("Join of one that is %s = %v, want %v", name, err, row.want)
		}
	}
	if _, err := newScript(t).client(agent.Config{}).Join(t.Context(), agent.DelegationID("../grants/"+grant(1)+"/close")); !errors.Is(err, agent.ErrNotFound) {
		t.Errorf("Join of a path = %v, want not found", err)
	}
}

func TestDelegate(t *testing.T) {
	if id, err := newScript(t).open(agent.Config{}).Delegate(t.Context(), "spiffe://example.org/b", agent.Share{}); err != nil || id != child {
		t.Errorf("Delegate = %q, %v, want %s", id, err, child)
	}
}

// TestRedaction: however a secret is printed, logged or encoded, it says nothing.
func TestRedaction(t *testing.T) {
	s := newScript(t)
	step := s.begin(s.open(agent.Config{}))
	var out strings.Builder
	secret := step.Secret()
	log := slog.New(slog.NewJSONHandler(&out, nil))
	log.Info("m", "pointer", secret, "value", *secret, "step", step.Grant())
	holder := struct{ S *agent.Secret }{secret}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%c", "%U", "%t", "%e", "%p"} {
		fmt.Fprintf(&out, verb+verb+verb, secret, *secret, holder)
	}
	fmt.Fprintln(&out, secret, *secret, struct{ s agent.Secret }{*secret})
	for _, v := range []any{secret, *secret, holder} {
		if err := json.MarshalWrite(&out, v); err != nil {
			t.Error(err)
		}
	}
	decimal := strings.Trim(fmt.Sprint([]byte(marker)), "[]")
	for _, form := range []string{marker, fmt.Sprintf("%x", marker), fmt.Sprintf("%X", marker), decimal} {
		if strings.Contains(out.String(), form) {
			t.Error("a secret shows when it is printed")
		}
	}
	if !strings.Contains(out.String(), "[redacted]") {
		t.Errorf("nothing says that the secret is redacted: %s", out.String())
	}
	if (agent.Secret{}).Field("x") != "" || (agent.Secret{}).JSON() != nil {
		t.Error("the zero Secret is not empty")
	}
}
