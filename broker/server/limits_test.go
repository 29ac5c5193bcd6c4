package server_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/server"
)

// named authenticates each request as the agent that its header names.
func named(c *server.Config) {
	c.Identify = func(req *http.Request) (broker.Caller, error) {
		id, err := spiffeid.FromPath(agentID.TrustDomain(), "/"+req.Header.Get("Test-Caller"))
		return broker.Caller{ID: id, Proof: broker.ProofX509, NotAfter: noon.Add(time.Hour)}, err
	}
}

// asCaller sends a request of an agent to the agents' handler, without a socket.
func asCaller(h http.Handler, caller, method, path, body string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(method, path, strings.NewReader(body))
	req.Header.Set("Test-Caller", caller)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req)
	return w
}

// TestRateOfOneCaller sends more requests than a caller may in a second. Only that caller is refused, and it can still
// end its steps.
func TestRateOfOneCaller(t *testing.T) {
	now, refused := noon, map[string]int{}
	r := newRig(t, named, func(c *server.Config) {
		c.Now = func() time.Time { return now }
		c.Limits = server.Limits{Requests: 3, Introspections: 5, Refused: func(limit string) { refused[limit]++ }}
	})
	h := r.Agents()
	standing := "/v1/delegations/" + string(delegationID)
	for i := range 3 {
		if w := asCaller(h, "a", "GET", standing, ""); w.Code != http.StatusOK {
			t.Fatalf("request %d = %d, want 200", i, w.Code)
		}
	}
	for _, do := range [][3]string{{"GET", standing, ""}, {"POST", standing + "/steps", `{"tool":"postgres"}`},
		{"GET", standing + "/events", ""}, {"POST", "/v1/chains", `{}`}, {"POST", "/v1/violations", `{}`},
		{"POST", "/v1/grants/" + string(grantID) + "/collect", `{}`}, {"POST", standing + "/delegate", `{}`}} {
		w := asCaller(h, "a", do[0], do[1], do[2])
		p := problem(t, w)
		if p.Code != "too_many_requests" || p.Kind != "over_limit" || w.Code != http.StatusTooManyRequests ||
			w.Header().Get("Retry-After") != "1" || p.RetryAfterMS < 300 || p.RetryAfterMS > 400 ||
			!strings.Contains(p.Detail, "spiffe://example.org/a ") {
			t.Errorf("%s %s beyond the rate = %+v, Retry-After %q; want 429 with a third of a second",
				do[0], do[1], p, w.Header().Get("Retry-After"))
		}
	}
	if refused["requests"] != 7 {
		t.Errorf("refused = %v, want seven requests", refused)
	}
	for _, path := range []string{"/v1/grants/" + string(grantID) + "/close", standing + "/heartbeat"} {
		if w := asCaller(h, "a", "POST", path, "{}"); w.Code != http.StatusOK {
			t.Errorf("POST %s beyond the rate = %d, want 200: it only ends something", path, w.Code)
		}
	}
	if w := asCaller(h, "b", "GET", standing, ""); w.Code != http.StatusOK {
		t.Errorf("another caller = %d, want 200", w.Code)
	}
	now = now.Add(time.Second / 3)
	if w := asCaller(h, "a", "GET", standing, ""); w.Code != http.StatusOK {
		t.Errorf("after the time of Retry-After = %d, want 200", w.Code)
	}
	if n := strings.Count(r.log.String(), `"code":"too_many_requests"`); n < 1 || n > 4 {
		t.Errorf("the log has %d lines of refused requests, want one a second", n)
	}
}

// TestCallersAreForgotten sends requests of more callers than are remembered.
func TestCallersAreForgotten(t *testing.T) {
	if n := server.RememberedCallers(25000); n != 10000 {
		t.Errorf("%d callers are remembered, want 10000", n)
	}
}

// slowBodies is a server with real sockets.
type slowBodies struct {
	t       *testing.T
	address string
	server  *server.Server
}

// send begins a request whose body does not come.
func (s slowBodies) send(caller, path, kind string) *bufio.Reader {
	s.t.Helper()
	conn, err := net.Dial("tcp", s.address)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, err = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: pawl\r\nTest-Caller: %s\r\nContent-Type: %s\r\n"+
		"Content-Length: 50\r\n\r\n{", path, caller, kind)
	if err != nil {
		s.t.Fatal(err)
	}
	return bufio.NewReader(conn)
}

// answer returns the status and body of an answer.
func answer(t *testing.T, in *bufio.Reader) (int, string) {
	t.Helper()
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(raw)
}

// until waits until n bodies arrive.
func (s slowBodies) until(n int) {
	s.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(20 * time.Second); s.server.Arriving() < n; <-tick.C {
		if time.Now().After(end) {
			s.t.Fatalf("%d bodies arrive, want %d", s.server.Arriving(), n)
		}
	}
}

// counted waits until a limit has refused or dropped n bodies. A body is counted a moment after it was dropped.
func (s slowBodies) counted(limit *atomic.Int64, n int64) {
	s.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(20 * time.Second); limit.Load() < n; <-tick.C {
		if time.Now().After(end) {
			s.t.Fatalf("%d bodies were counted, want %d", limit.Load(), n)
		}
	}
}

// TestSlowBodies sends bodies that do not come. One caller, and all clients without identity, can have a number of
// them, and all callers together can have a number. Beyond that the oldest is dropped, so that an honest body arrives.
func TestSlowBodies(t *testing.T) {
	var mine, all atomic.Int64 // bodies that the limits refused or dropped
	r := newRig(t, named, func(c *server.Config) {
		c.Limits = server.Limits{Bodies: 40, Refused: func(limit string) {
			map[string]*atomic.Int64{"bodies": &mine, "all_bodies": &all}[limit].Add(1)
		}}
	})
	s := slowBodies{t: t, server: r.Server}
	h := httptest.NewServer(r.Agents())
	t.Cleanup(h.CloseClientConnections)
	s.address = h.Listener.Addr().String()
	const chains, js = "/v1/chains", "application/json"

	first := s.send("a", chains, js)
	s.until(1)
	for range 39 {
		s.send("a", chains, js)
	}
	s.until(40)
	if status, body := answer(t, s.send("a", chains, js)); status != 429 || !strings.Contains(body, "too_many_bodies") {
		t.Errorf("a body beyond the caller's = %d %s, want 429", status, body)
	}
	if w := asCaller(r.Agents(), "b", "POST", "/v1/delegations/"+string(delegationID)+"/heartbeat", "{}"); w.Code != 200 {
		t.Errorf("another caller = %d, want 200", w.Code)
	}
	event := s.send("", "/v1/security-events", "application/secevent+jwt")
	s.until(41)
	for range 40 {
		s.send("", "/v1/security-events", "application/secevent+jwt")
	}
	if status, body := answer(t, event); status != 408 || !strings.Contains(body, "body_too_slow") {
		t.Errorf("the oldest body without identity = %d %s, want it dropped with 408", status, body)
	}
	s.counted(&mine, 2)
	for i := range 512 {
		s.send(fmt.Sprint("c", i/40), chains, js)
	}
	if status, _ := answer(t, first); status != 408 || r.Arriving() > 512 {
		t.Errorf("the oldest body of all = %d, want it dropped with 408", status)
	}
	s.counted(&all, 1)
	if w := asCaller(r.Agents(), "z", "POST", "/v1/delegations/"+string(delegationID)+"/heartbeat", "{}"); w.Code != 200 {
		t.Errorf("an honest body beside 512 slow ones = %d, want 200", w.Code)
	}
}

// TestOperatorsReads has more reads of one operator under way than it may. It can still revoke, and others can read.
func TestOperatorsReads(t *testing.T) {
	blocked, done := make(chan struct{}, 100), make(chan struct{})
	r := newRig(t, func(c *server.Config) {
		c.Metrics = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			blocked <- struct{}{}
			<-done
			w.Header().Set("Content-Type", api.MetricsType)
		})
		c.Operator = func(req *http.Request) (broker.Operator, error) {
			return broker.Operator{Name: req.Header.Get("Test-Caller")}, nil
		}
	})
	h := r.Operators()
	for range 64 {
		go asCaller(h, "ann", "GET", "/metrics", "")
	}
	for range 64 {
		<-blocked
	}
	defer close(done)
	if p := problem(t, asCaller(h, "ann", "GET", "/v1/chains", "")); p.Code != "too_many_requests" {
		t.Errorf("a read beside 64 = %+v, want too_many_requests", p)
	}
	w := asCaller(h, "ann", "POST", "/v1/revocations", `{"selector":"tool:postgres","reason":"r"}`)
	if w.Code != http.StatusAccepted {
		t.Errorf("revoking beside 64 reads = %d %s, want 202", w.Code, w.Body)
	}
	if w := asCaller(h, "bob", "GET", "/v1/chains", ""); w.Code != http.StatusOK {
		t.Errorf("another operator = %d, want 200", w.Code)
	}
}
