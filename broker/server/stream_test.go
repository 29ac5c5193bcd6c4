package server_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/server"
)

const events = "/v1/delegations/" + string(delegationID) + "/events"

// listener is one client of a stream inside a synctest bubble.
type listener struct {
	mu     sync.Mutex // guards text, broken
	text   strings.Builder
	broken bool
	head   http.Header
	status int
	done   chan struct{} // closed when the handler has returned
	cancel context.CancelFunc
}

func (l *listener) Header() http.Header    { return l.head }
func (l *listener) WriteHeader(status int) { l.status = status }
func (l *listener) Flush()                 {}
func (l *listener) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken {
		return 0, io.ErrClosedPipe
	}
	return l.text.Write(b)
}

// received returns the text received since the last call, once all goroutines are idle.
func (l *listener) received() string {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.text.String()
	l.text.Reset()
	return s
}

func (l *listener) ended() bool {
	synctest.Wait()
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

func listen(t *testing.T, h http.Handler, path string) *listener {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &listener{head: http.Header{}, done: make(chan struct{}), cancel: cancel}
	req := httptest.NewRequestWithContext(ctx, "GET", path, nil)
	req.Header.Set("Test-Identity", "yes")
	go func() {
		defer close(l.done)
		h.ServeHTTP(l, req)
	}()
	t.Cleanup(cancel)
	return l
}

// ticking makes the server's clock follow the bubble's clock, starting at noon.
func ticking(c *server.Config) {
	start := time.Now()
	c.Now = func() time.Time { return noon.Add(time.Since(start)) }
}

func wantEvent(t *testing.T, l *listener, parts ...string) {
	t.Helper()
	got := l.received()
	if strings.Count(got, "data: ") != 1 || !strings.HasSuffix(got, "\n\n") {
		t.Errorf("received %q, want one event", got)
	}
	for _, part := range parts {
		if !strings.Contains(got, part) {
			t.Errorf("received %q, want %q in it", got, part)
		}
	}
}

func wantSilence(t *testing.T, l *listener) {
	t.Helper()
	if got := strings.ReplaceAll(l.received(), ": \n\n", ""); got != "" {
		t.Errorf("received %q, want nothing", got)
	}
}

func TestStandingEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, ticking)
		l := listen(t, r.Agents(), events)
		wantEvent(t, l, "id: 1\nevent: standing\n", `data: {"ended":[]}`)
		if l.status != http.StatusOK || l.head.Get("Content-Type") != "text/event-stream" || l.head.Get("Cache-Control") != "no-store" {
			t.Errorf("stream began with %d %v", l.status, l.head)
		}
		r.fake.change(func() {})
		wantSilence(t, l)
		time.Sleep(16 * time.Second)
		if got := l.received(); got != ": \n\n" {
			t.Errorf("received %q after 16 s, want one comment", got)
		}
		if r.fake.beats != 1 || r.fake.reads < 2 {
			t.Errorf("of %d reads %d counted as requests by the holder, want only the first", r.fake.reads, r.fake.beats)
		}
		r.fake.change(func() { r.fake.standing.Ended = []broker.GrantID{grantID} })
		wantEvent(t, l, "id: 2\n", string(grantID))
		r.fake.change(func() { r.fake.standing.Fence = fence() })
		wantEvent(t, l, "id: 3\n", `"frozen":true`)
		r.fake.change(func() { r.fake.standing.Fence = &broker.Fence{At: noon, Revocation: revocationID} })
		wantEvent(t, l, "id: 4\n", `"revocation":"`+string(revocationID)+`"`)
		if !l.ended() {
			t.Error("the stream stays open after a final fence")
		}
		if !strings.Contains(r.log.String(), `"events":4`) {
			t.Errorf("the log %s lacks the number of events", r.log)
		}
	})
}

// TestChangeWhileReading checks that a change after a read and before the wait is not lost.
func TestChangeWhileReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, ticking)
		reads := 0
		r.fake.onRead = func() {
			if reads++; reads == 2 { // the first read checks the permission
				r.fake.change(func() { r.fake.standing.Ended = []broker.GrantID{grantID} })
			}
		}
		l := listen(t, r.Agents(), events)
		if got := l.received(); strings.Count(got, "data: ") != 2 || !strings.Contains(got, string(grantID)) {
			t.Errorf("received %q, want the state before and the state after", got)
		}
	})
}

func TestStreamEnds(t *testing.T) {
	for name, row := range map[string]struct {
		act  func(rig, *listener)
		want string // in the received text; empty: nothing more
	}{
		"the delegation expires":    {func(rig, *listener) { time.Sleep(time.Hour) }, `event: problem`},
		"no longer the caller's":    {func(r rig, _ *listener) { fail(r, broker.Errorf(broker.NotFound, "standing", "gone")) }, `"code":"not_found"`},
		"the ledger cannot be read": {func(r rig, _ *listener) { fail(r, broker.Errorf(broker.Unavailable, "standing", "down")) }, ""},
		"an internal error":         {func(r rig, _ *listener) { fail(r, errors.New("inside-marker")) }, ""},
		"the server closes":         {func(r rig, _ *listener) { r.Close() }, ""},
		"the client disconnects":    {func(_ rig, l *listener) { l.cancel() }, ""},
		"the client stops reading":  {func(_ rig, l *listener) { l.mu.Lock(); l.broken = true; l.mu.Unlock(); time.Sleep(time.Minute) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, ticking, func(c *server.Config) {
					c.Identify = func(*http.Request) (broker.Caller, error) {
						return broker.Caller{ID: agentID, Proof: broker.ProofX509, NotAfter: noon.Add(2 * time.Hour)}, nil
					}
				})
				l := listen(t, r.Agents(), events)
				wantEvent(t, l)
				row.act(r, l)
				got := strings.ReplaceAll(l.received(), ": \n\n", "")
				if !strings.Contains(got, row.want) || row.want == "" && got != "" {
					t.Errorf("received %q, want %q", got, row.want)
				}
				if !l.ended() {
					t.Error("the stream stays open")
				}
			})
		})
	}
}

func fail(r rig, err error) { r.fake.change(func() { r.fake.standErr = err }) }

// TestStreamEndsWithIdentity checks that a stream does not outlive the SVID that opened it.
func TestStreamEndsWithIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, ticking, func(c *server.Config) {
			c.Identify = func(*http.Request) (broker.Caller, error) {
				return broker.Caller{ID: agentID, Proof: broker.ProofX509, NotAfter: noon.Add(time.Minute)}, nil
			}
		})
		l := listen(t, r.Agents(), events)
		time.Sleep(59 * time.Second)
		if l.ended() {
			t.Error("the stream ended before the identity")
		}
		time.Sleep(2 * time.Second)
		if !l.ended() {
			t.Error("the stream outlives the identity")
		}
	})
}

func TestStreamsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, ticking, func(c *server.Config) { c.Limits.Streams = 2 })
		h := r.Agents()
		first, _ := listen(t, h, events), listen(t, h, events)
		synctest.Wait()
		if p := problem(t, r.ask("agents", "GET", events, "")); p.Code != "too_many_streams" || p.Status != 429 {
			t.Errorf("a third stream = %+v, want too_many_streams", p)
		}
		first.cancel()
		if !first.ended() {
			t.Fatal("the first stream stays open")
		}
		third := listen(t, h, events)
		if wantEvent(t, third, "event: standing"); third.status != http.StatusOK {
			t.Errorf("a stream after one was closed = %d, want 200", third.status)
		}
	})
}

func TestStreamRefused(t *testing.T) {
	r := newRig(t)
	r.fake.err = broker.Errorf(broker.NotFound, "standing", "no").With(broker.CodeDelegationUnknown)
	if p := problem(t, r.ask("agents", "GET", events, "")); p.Code != "delegation_unknown" {
		t.Errorf("a stream of another caller's delegation = %+v, want delegation_unknown", p)
	}
	if p := problem(t, r.ask("operators", "GET", "/v1/revocations/"+string(revocationID)+"/events", "")); p.Status != 404 {
		t.Errorf("a stream of no revocation = %+v, want 404", p)
	}
}

func TestRevocationEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, ticking)
		l := listen(t, r.Operators(), "/v1/revocations/"+string(revocationID)+"/events")
		wantEvent(t, l, "event: revocation\n", `"dead":1`)
		for n := range 50 { // a burst causes one read
			r.fake.change(func() { r.fake.rev.Dead = n })
		}
		time.Sleep(time.Second)
		wantEvent(t, l, `"dead":49`)
		r.fake.change(func() { r.fake.rev.Closure, r.fake.rev.Settled = broker.ClosureClosed, noon })
		time.Sleep(time.Second)
		wantEvent(t, l, `"closure":"CLOSED"`)
		if !l.ended() {
			t.Error("the stream stays open after the revocation is final")
		}
	})
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, ticking)
		r.fake.rev.Freeze = true
		l := listen(t, r.Operators(), "/v1/revocations/"+string(revocationID)+"/events")
		if wantEvent(t, l, `"freeze":true`); !l.ended() {
			t.Error("the stream of a freeze stays open, though there is nothing to wait for")
		}
	})
}
