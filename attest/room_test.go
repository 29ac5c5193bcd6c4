package attest_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/attest/workload"
	"github.com/pawlsec/pawl/broker"
)

// place is a server with limits that answers every request with 200, or 429 with the code of the refusal. A request for
// /wait is answered when the test ends.
type place struct {
	t        *testing.T
	s        *workload.Server
	address  string
	listener *attest.Bounded
	waiting  chan struct{} // receives for each request for /wait that has come

	mu      sync.Mutex // guards refused
	refused map[string]int
}

func newPlace(t *testing.T, limits attest.Limits) *place {
	t.Helper()
	return newPlaceWith(t, limits, func() {})
}

// newPlaceWith is newPlace with a function that each handshake calls while it computes.
func newPlaceWith(t *testing.T, limits attest.Limits, compute func()) *place {
	t.Helper()
	p := &place{t: t, s: newWorkload(t, &clock{time.Now()}), refused: map[string]int{}, waiting: make(chan struct{}, 100)}
	c := config(p.s, &clock{time.Now()})
	a := newAttestor(t, c)
	limits.Refused = func(limit string) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.refused[limit]++
	}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.address = inner.Addr().String()
	conf := a.ServerTLS()
	conf.ClientAuth = tls.RequestClientCert // as with JWT-SVIDs
	own := conf.GetCertificate
	conf.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
		compute()
		return own(h)
	}
	p.listener = attest.Listener(inner, conf, limits)
	end := make(chan struct{})
	server := attest.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, err := a.Identify(r)
		var refusal *broker.Error
		switch {
		case errors.As(err, &refusal) && refusal.Kind == broker.OverLimit:
			http.Error(w, string(refusal.Code), http.StatusTooManyRequests)
		case r.URL.Path == "/wait":
			p.waiting <- struct{}{}
			<-end
		}
	}), limits)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(p.listener) }()
	t.Cleanup(func() {
		close(end)
		_ = server.Close()
		<-ended
	})
	return p
}

// dial opens a connection with a completed handshake. An empty name is a client without an SVID; each call with a name
// has an SVID of its own.
func (p *place) dial(name string, protos ...string) (*tls.Conn, error) {
	config := tlsconfig.TLSClientConfig(p.s.Source(p.s.ID("/any")), tlsconfig.AuthorizeAny())
	config.NextProtos = protos
	if name != "" {
		svid, err := p.s.X509SVID(p.s.ID(name))
		if err != nil {
			return nil, err
		}
		config.GetClientCertificate = tlsconfig.GetClientCertificate(x509svid.Source(svid))
	}
	c, err := tls.Dial("tcp", p.address, config)
	if err == nil {
		p.t.Cleanup(func() { _ = c.Close() })
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return c, err
}

// ask sends a request and returns the status of its answer, and whether the server closes the connection after it.
func ask(c net.Conn, path string) (status int, closes bool, err error) {
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: pawl\r\n\r\n", path); err != nil {
		return 0, true, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, true, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, resp.Close, err
}

func (p *place) want(what, name string, status int) *tls.Conn {
	p.t.Helper()
	c, err := p.dial(name)
	if err != nil {
		p.t.Fatalf("%s: dial = %v", what, err)
	}
	if got, closes, err := ask(c, "/"); got != status || closes != (status != http.StatusOK) {
		p.t.Fatalf("%s: status %d, closes %v, %v; want %d", what, got, closes, err, status)
	}
	return c
}

// until waits for a state of the listener.
func (p *place) until(what string, identified, strangers int) {
	p.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(20 * time.Second); ; <-tick.C {
		i, s := p.listener.Open()
		if i == identified && s == strangers {
			return
		}
		if time.Now().After(end) {
			p.t.Fatalf("%s: %d connections with an SVID and %d without, want %d and %d", what, i, s, identified, strangers)
		}
	}
}

// TestConnectionsOfOneID opens connections with many SVIDs of one SPIFFE ID. One beyond the limit is told so by name.
func TestConnectionsOfOneID(t *testing.T) {
	p := newPlace(t, attest.Limits{Each: 3})
	first := p.want("the first", "/agent/a", http.StatusOK)
	for range 2 {
		p.want("within the limit", "/agent/a", http.StatusOK)
	}
	p.want("the fourth", "/agent/a", http.StatusTooManyRequests)
	p.want("another caller", "/agent/b", http.StatusOK)
	p.until("the fourth was closed", 4, 0)
	_ = first.Close()
	p.until("one was closed", 3, 0)
	p.want("in the place of the closed one", "/agent/a", http.StatusOK)
	for range 100 { // silent ones: some wait to be told, and the others are closed
		if c, err := p.dial("/agent/a"); err == nil {
			defer c.Close()
		}
	}
	p.until("a hundred silent ones", 4+16, 0)
	p.want("another caller", "/agent/b", http.StatusOK)
}

// TestConnectionsOfOneAddress opens connections without an SVID. They drop each other, and no caller with an SVID.
func TestConnectionsOfOneAddress(t *testing.T) {
	p := newPlace(t, attest.Limits{Address: 3})
	known := p.want("a caller", "/agent/a", http.StatusOK)
	silent := func(n int) {
		for range n {
			c, err := net.Dial("tcp", p.address)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close() })
		}
	}
	silent(50)
	p.until("fifty silent connections", 1, 3)
	p.want("a caller behind the same address", "/agent/b", http.StatusOK)
	if got, _, err := ask(known, "/"); got != http.StatusOK {
		t.Errorf("on a connection from before: %d, %v, want 200", got, err)
	}
	for range 3 {
		c, err := p.dial("")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "GET /wait HTTP/1.1\r\nHost: pawl\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		<-p.waiting
	}
	p.want("the fourth without an SVID, beside three with a request under way", "", http.StatusTooManyRequests)
	silent(100)
	p.want("a caller behind the same address", "/agent/c", http.StatusOK)
}

// TestStrangersFromEverywhere has many addresses. The whole of their connections has a limit, too.
func TestStrangersFromEverywhere(t *testing.T) {
	p := newPlace(t, attest.Limits{Strangers: 5})
	for i := range 50 {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(i+1))}}
		c, err := d.Dial("tcp", p.address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	p.until("fifty silent connections", 0, 5)
	p.want("a caller", "/agent/a", http.StatusOK)
}

// TestAllConnections fills the listener with callers. A new caller takes the place of the one that has the most.
func TestAllConnections(t *testing.T) {
	p := newPlace(t, attest.Limits{Most: 6})
	few := p.want("a caller with one", "/agent/few", http.StatusOK)
	for range 5 {
		p.want("a caller with five", "/agent/many", http.StatusOK)
	}
	c := p.want("a new caller", "/agent/new", http.StatusOK)
	p.until("full", 6, 0)
	for what, c := range map[string]net.Conn{"the caller with one": few, "the new caller": c} {
		if got, _, err := ask(c, "/"); got != http.StatusOK {
			t.Errorf("%s: %d, %v, want 200", what, got, err)
		}
	}
}

// TestFirstRequest ends a connection on which no request comes, also of HTTP/2, and keeps one on which one came.
func TestFirstRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := newPipes()
		limits := attest.Limits{First: 3 * time.Second}
		l := attest.Listener(inner, nil, limits)
		server := attest.Server(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), limits)
		ended := make(chan error, 1)
		go func() { ended <- server.Serve(l) }()
		silent, used := inner.dial(), inner.dial()
		if got, _, err := ask(used, "/"); got != http.StatusOK {
			t.Errorf("a request = %d, %v, want 200", got, err)
		}
		time.Sleep(3*time.Second + time.Millisecond)
		synctest.Wait()
		if open(silent) || !open(used) {
			t.Errorf("after 3 s: silent open %v, used open %v; want false, true", open(silent), open(used))
		}
		_ = server.Shutdown(context.Background())
		<-ended
	})
}

// TestUnreadBody is refused before its body is read. The rest of the body holds the connection for a bounded time.
func TestUnreadBody(t *testing.T) {
	p := newPlace(t, attest.Limits{Body: time.Second})
	c, err := p.dial("/agent/a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "POST / HTTP/1.1\r\nHost: pawl\r\nContent-Length: 100\r\n\r\n{"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || !resp.Close {
		t.Fatalf("the answer = %+v, %v, want one that ends the connection", resp, err)
	}
	p.until("after the answer", 0, 0)
}

// TestFloodOfHandshakes fills the handshakes from one address. A slow handshake from another address is not dropped,
// although it is older.
func TestFloodOfHandshakes(t *testing.T) {
	p := newPlace(t, attest.Limits{Handshakes: 5})
	slow, err := net.Dial("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	p.until("one handshake", 0, 1)
	for range 50 {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, 1)}}
		c, err := d.Dial("tcp", p.address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	p.until("a flood", 0, 5)
	svid, err := p.s.X509SVID(p.s.ID("/agent/a"))
	if err != nil {
		t.Fatal(err)
	}
	config := tlsconfig.MTLSClientConfig(svid, p.s.Source(p.s.ID("/any")), tlsconfig.AuthorizeAny())
	c := tls.Client(slow, config)
	if status, _, err := ask(c, "/"); status != http.StatusOK {
		t.Errorf("the slow handshake = %d, %v, want 200", status, err)
	}
}
