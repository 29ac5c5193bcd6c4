package agent_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
)

const (
	marker = "hunter2-marker"

	chain      = "ch000000000000000000000001"
	root       = "dl000000000000000000000001" // the delegation that a script opens
	child      = "dl000000000000000000000002" // the delegation that it passes on
	revocation = "rv000000000000000000000001"
)

// grant is the id of the nth step.
func grant(n int) string { return fmt.Sprintf("gr%024d", n) }

// script is a broker with the answers that a test chooses. broker/server tests the SDK with a real engine.
type script struct {
	t         *testing.T          // nil in examples
	lifetime  time.Duration       // of secrets
	refusal   func() *api.Problem // of a step, a closing, a heartbeat or an acknowledgement; nil: none
	heartbeat int64               // interval of the chain that is opened, in seconds

	mu            sync.Mutex // guards everything below
	grants        int
	steps         int
	closed        []string
	keys          []string
	streams       int
	refuseStreams bool
	feeds         []chan text // open streams
	joined        api.Standing
	sealed        map[string]string // secrets that wait for their collectors, by grant
	beats         []string          // bodies of heartbeats and acknowledgements
	beaten        chan struct{}     // has a value for each of them that was answered
	opened        chan struct{}     // has a value for each stream that was opened
}

// text is a piece of a stream. An empty one ends the stream.
type text string

func newScript(t *testing.T) *script {
	return &script{
		t: t, lifetime: time.Minute, sealed: map[string]string{},
		joined: api.Standing{Delegation: &api.Delegation{ID: child, Chain: chain, Parent: root}},
		opened: make(chan struct{}, 100), beaten: make(chan struct{}, 100),
	}
}

func (s *script) client(cfg agent.Config) *agent.Client {
	s.t.Helper()
	h := httptest.NewServer(s)
	s.t.Cleanup(h.Close)
	s.t.Cleanup(func() { s.send("") })
	cfg.Address, cfg.HTTPClient = h.URL, h.Client()
	c, err := agent.New(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() }) // nil for a client that New made
	return c
}

func (s *script) open(cfg agent.Config) *agent.Delegation {
	s.t.Helper()
	ch := agent.Chain{Task: "t", Rights: []agent.Right{{Tool: "db", Use: true}}}
	d, err := s.client(cfg).Open(s.t.Context(), ch)
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

// awaitStream waits until the next stream is open.
func (s *script) awaitStream() {
	s.t.Helper()
	await(s.t, s.opened, "a stream")
}

// send writes to every open stream.
func (s *script) send(piece text) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.feeds {
		f <- piece
	}
	if piece == "" {
		s.feeds = nil
	}
}

func status(s api.Standing) text { return event(api.EventStanding, s) }

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
		reply(w, 201, api.Delegation{ID: root, Chain: chain, HeartbeatSeconds: s.heartbeat})
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
	case strings.HasSuffix(path, "/heartbeat"), strings.HasSuffix(path, "/acknowledge"):
		s.beat(w, string(body))
	case strings.HasSuffix(path, "/events"):
		s.events(w, r)
	default:
		reply(w, 404, api.NewProblem(api.KindNotFound, "", ""))
	}
}

func reply(w http.ResponseWriter, status int, body any) {
	w.WriteHeader(status)
	_ = json.MarshalWrite(w, body) // the test checks the answer
}

func (s *script) step(w http.ResponseWriter, r *http.Request, body []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps++
	s.keys = append(s.keys, r.Header.Get(api.IdempotencyKey))
	if s.refusal != nil {
		if p := s.refusal(); p != nil {
			reply(w, p.Status, p)
			return
		}
	}
	s.grants++
	now := time.Now()
	g := api.Grant{ID: grant(s.grants), Chain: chain, Delegation: root,
		Created: now.Add(time.Hour), Expires: now.Add(time.Hour + s.lifetime)} // its clock is wrong
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
	reply(w, 200, api.Collected{JWE: jwe, Grant: api.Grant{ID: id, Collected: now, Expires: now.Add(s.lifetime)}})
}

func (s *script) close(w http.ResponseWriter, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refusal != nil {
		if p := s.refusal(); p != nil {
			reply(w, p.Status, p)
			return
		}
	}
	s.closed = append(s.closed, id)
	reply(w, 200, api.Grant{ID: id, Chain: chain, Delegation: root})
}

// beat answers a heartbeat or an acknowledgement.
func (s *script) beat(w http.ResponseWriter, body string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.beats = append(s.beats, body)
	if s.refusal != nil {
		if p := s.refusal(); p != nil {
			reply(w, p.Status, p)
			return
		}
	}
	reply(w, 200, api.Nothing{})
	s.beaten <- struct{}{}
}

func (s *script) events(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.streams++
	if s.refuseStreams {
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
		case piece := <-feed:
			if piece == "" {
				return
			}
			_, _ = io.WriteString(w, string(piece)) // the client may be gone
			_ = flush.Flush()
		case <-r.Context().Done():
			return
		}
	}
}

func await(t *testing.T, done <-chan struct{}, event string) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatalf("waited 10 s for %s", event)
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
