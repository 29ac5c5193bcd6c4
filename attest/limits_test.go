package attest_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/attest"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

// pipes is a listener with connections in memory, so that synctest's clock controls them.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
}

func newPipes() *pipes { return &pipes{make(chan net.Conn), make(chan struct{})} }

func (p *pipes) dial() net.Conn {
	client, server := net.Pipe()
	p.conns <- server
	return client
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { close(p.done); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes", Net: "pipe"} }

// open reports whether the other side keeps the connection open. It takes a nanosecond.
func open(c net.Conn) bool {
	_ = c.SetReadDeadline(time.Now().Add(time.Nanosecond))
	_, err := c.Read(make([]byte, 1))
	return !errors.Is(err, io.EOF)
}

func TestHandshakeTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newWorkload(t, &clock{start})
		inner := newPipes()
		l := attest.Listener(inner, newAttestor(t, config(s, &clock{start})).ServerTLS(), attest.Limits{})
		silent := inner.dial()
		time.Sleep(5*time.Second - time.Millisecond) // on synctest's clock
		synctest.Wait()
		if !open(silent) {
			t.Error("a silent client is dropped before 5 s")
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if open(silent) {
			t.Error("a silent client is kept after 5 s")
		}
		if err := l.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
	})
}

// TestHandshakeCap fills the listener with silent clients. The oldest one is dropped, and an honest client connects.
func TestHandshakeCap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newWorkload(t, &clock{start})
		inner := newPipes()
		config := newAttestor(t, config(s, &clock{start})).ServerTLS()
		l := attest.Listener(inner, config, attest.Limits{Handshakes: 2})
		silent := []net.Conn{inner.dial(), inner.dial()}
		synctest.Wait()
		if !open(silent[0]) || !open(silent[1]) {
			t.Error("a handshake is dropped at the limit, want all kept")
		}
		silent = append(silent, inner.dial())
		synctest.Wait()
		if open(silent[0]) || !open(silent[1]) || !open(silent[2]) {
			t.Error("one beyond the limit: want only the oldest dropped")
		}

		trust := tlsconfig.TLSClientConfig(s.Source(s.ID("/any")), tlsconfig.AuthorizeAny())
		trust.Time = func() time.Time { return start }
		trust.InsecureSkipVerify, trust.VerifyPeerCertificate = true, nil // the server has another clock
		honest := tls.Client(inner.dial(), trust)
		done := make(chan error, 1)
		go func() { done <- honest.HandshakeContext(t.Context()) }()
		conn, err := l.Accept()
		if err != nil {
			t.Fatalf("Accept = %v", err)
		}
		if err := <-done; err != nil || !conn.(*tls.Conn).ConnectionState().HandshakeComplete {
			t.Errorf("an honest client's handshake = %v", err)
		}
		if open(silent[1]) || !open(silent[2]) {
			t.Error("the honest client: want the oldest handshake dropped, and only that")
		}
		go func() { _, _ = io.Copy(io.Discard, honest) }() // a pipe has no buffer for close_notify
		_ = conn.Close()
		before := time.Now()
		if err := l.Close(); err != nil || open(silent[2]) {
			t.Errorf("Close = %v, or it left a handshake open", err)
		}
		if waited := time.Since(before); waited > time.Second {
			t.Errorf("Close took %v, want it to drop the handshakes", waited)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept after Close = %v, want %v", err, net.ErrClosed)
		}
	})
}

// failing is a listener that fails on every Accept.
type failing struct{ net.Listener }

func (failing) Accept() (net.Conn, error) { return nil, errors.New("too many open files") }
func (failing) Close() error              { return nil }

func TestAcceptErrorIsPassedOn(t *testing.T) {
	l := attest.Listener(failing{}, &tls.Config{}, attest.Limits{})
	for range 2 {
		if _, err := l.Accept(); err == nil || errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept = %v, want the inner error", err)
		}
	}
	if err := l.Close(); err != nil {
		t.Errorf("Close = %v", err)
	}
}

func TestConnectionAge(t *testing.T) {
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		s := newWorkload(t, &clock{time.Now()})
		var age atomic.Int64
		limits := attest.Limits{Now: func() time.Time { return start.Add(time.Duration(age.Load())) }}
		a := newAttestor(t, config(s, &clock{time.Now()}))
		server := a.ServerTLS()
		if !http2 {
			server.NextProtos = nil
		}
		url := serve(t, a, server, limits)
		c := client(t, s, s.Source(s.ID("/agent/a")), tls.VersionTLS13, false)
		ask := func(what string, reused bool) {
			t.Helper()
			if got := get(t, c, url, ""); got.status != http.StatusOK || got.reused != reused || (got.proto == 2) != http2 {
				t.Errorf("%s, %s: got %d, connection reused %v, want 200, %v", name, what, got.status, got.reused, reused)
			}
		}
		ask("at first", false)
		age.Store(int64(5*time.Minute - 1))
		ask("just before its age", true)
		age.Store(int64(5 * time.Minute))
		ask("at its age, the last response", true)
		ask("after that", false)
	}
}

func TestHeaderLimits(t *testing.T) {
	s := newWorkload(t, &clock{time.Now()})
	a := newAttestor(t, config(s, &clock{time.Now()}))
	server := a.ServerTLS()
	server.NextProtos = nil
	url := serve(t, a, server, attest.Limits{Header: time.Second})
	trust := tlsconfig.MTLSClientConfig(s.Source(s.ID("/agent/a")), s.Source(s.ID("/any")), tlsconfig.AuthorizeAny())
	send := func(text string) (*http.Response, error) {
		conn, err := tls.Dial("tcp", strings.TrimPrefix(url, "https://"), trust)
		if err != nil {
			t.Fatalf("Dial = %v", err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.WriteString(conn, text); err != nil {
			return nil, err
		}
		return http.ReadResponse(bufio.NewReader(conn), nil)
	}
	const head = "GET / HTTP/1.1\r\nHost: pawl\r\nX: "
	if resp, err := send(head + strings.Repeat("x", 32<<10-len(head)-4) + "\r\n\r\n"); err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("a header of 32 KiB: %v, want 200", err)
	}
	// net/http adds 4 KiB to the configured limit.
	if resp, err := send(head + strings.Repeat("x", 36<<10) + "\r\n\r\n"); err != nil || resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a header of 36 KiB: %v, want 431", err)
	}
	if _, err := send(head); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		t.Errorf("a header that does not end: %v, want the connection closed", err)
	}
}

// TestStalledBody holds that the read of a body that does not come fails after the limit, and that a handler which returns
// at that very moment harms nothing.
func TestStalledBody(t *testing.T) {
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				protocols := new(http.Protocols)
				protocols.SetHTTP1(!http2)
				protocols.SetUnencryptedHTTP2(http2)
				limits := attest.Limits{Body: 3 * time.Second, First: time.Hour}
				inner := newPipes()
				server := attest.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/late" {
						time.Sleep(3 * time.Second) // on synctest's clock
						return
					}
					if _, err := io.ReadAll(r.Body); !errors.Is(err, os.ErrDeadlineExceeded) {
						t.Errorf("reading the body = %v, want that its time has passed", err)
					}
				}), limits)
				server.Protocols = protocols
				ended := make(chan error, 1)
				go func() { ended <- server.Serve(attest.Listener(inner, nil, limits)) }()
				transport := &http.Transport{Protocols: protocols,
					DialContext: func(context.Context, string, string) (net.Conn, error) { return inner.dial(), nil }}
				for _, path := range []string{"/", "/late", "/late", "/late"} {
					body, never := io.Pipe()
					req, err := http.NewRequest(http.MethodPost, "http://pawl"+path, body)
					if err != nil {
						t.Fatal(err)
					}
					began := time.Now()
					resp, err := transport.RoundTrip(req)
					if took := time.Since(began); err != nil || resp.StatusCode != http.StatusOK || took != 3*time.Second {
						t.Errorf("%s was answered with %+v, %v after %v, want 200 after 3 s", path, resp, err, took)
					}
					_ = never.Close()
					transport.CloseIdleConnections()
				}
				_ = server.Close()
				<-ended
			})
		})
	}
}
