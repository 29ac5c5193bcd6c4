package server_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/server"
)

// handsOut is a fake whose every step has a secret of its own. It counts the grants that are closed.
type handsOut struct {
	*fake
	hold   func(ctx context.Context, key string) // called before the secret is returned
	closed atomic.Int32
}

func (h *handsOut) Issue(ctx context.Context, _ broker.Caller, r broker.StepRequest) (broker.Issued, error) {
	if h.hold != nil {
		h.hold(ctx, r.Key)
	}
	return broker.Issued{Grant: grant(), Secret: broker.NewSecret([]byte(`{"password":"` + marker + `"}`))}, nil
}

func (h *handsOut) Close(context.Context, broker.Caller, broker.GrantID) (broker.Grant, error) {
	h.closed.Add(1)
	return grant(), nil
}

const stepBody = `{"tool":"postgres"}`

// once takes a step with a key, over a connection of its own, and returns the answer. It hangs up as soon as it has
// read it, or once ctx ends.
type once func(ctx context.Context, s *httptest.Server, key string) (string, error)

func overHTTP1(ctx context.Context, s *httptest.Server, key string) (string, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", s.Listener.Addr().String())
	if err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // it breaks the read below
	defer stop()
	defer conn.Close() //nolint:errcheck // everything was read
	if _, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: pawl\r\nTest-Identity: yes\r\nContent-Type: application/json\r\n"+
		"Idempotency-Key: %s\r\nContent-Length: %d\r\n\r\n%s", steps, key, len(stepBody), stepBody); err != nil {
		return "", err
	}
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(answer.Body)
	return string(body), err
}

func overHTTP2(ctx context.Context, s *httptest.Server, key string) (string, error) {
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.URL+steps, strings.NewReader(stepBody))
	if err != nil {
		return "", err
	}
	req.Header.Set("Test-Identity", "yes")
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", key)
	answer, err := transport.RoundTrip(req)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(answer.Body)
	if answer.ProtoMajor != 2 {
		return "", fmt.Errorf("the protocol is %s, want HTTP/2", answer.Proto)
	}
	return string(body), err
}

// plain serves both protocols without TLS. The function waits for the handlers, as closing the server does not.
func plain(t *testing.T, h http.Handler) (s *httptest.Server, wait func()) {
	t.Helper()
	var running sync.WaitGroup
	s = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		running.Add(1)
		defer running.Done()
		h.ServeHTTP(w, r)
	}))
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return s, running.Wait
}

// TestDelivered checks clients that use a connection once. A secret that was written is the client's, although it hangs
// up with the last byte. The grant of a client that was gone before the first byte is closed.
func TestDelivered(t *testing.T) {
	const n = 1000
	for protocol, take := range map[string]once{"HTTP/1.1": overHTTP1, "HTTP/2": overHTTP2} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			h := &handsOut{fake: newFake()}
			r := newRig(t, func(c *server.Config) { c.Broker, c.Limits.Requests = h, 10_000 })
			s, wait := plain(t, r.Agents())
			var g errgroup.Group
			g.SetLimit(8)
			for i := range n {
				g.Go(func() error {
					body, err := take(t.Context(), s, strconv.Itoa(i))
					if err == nil && !strings.Contains(body, marker) {
						err = fmt.Errorf("the answer has no secret: %.100q", body)
					}
					return err
				})
			}
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			wait()
			if lost := h.closed.Load(); lost != 0 {
				t.Errorf("grants closed under their clients: %d of %d, want none", lost, n)
			}
		})
		t.Run("gone/"+protocol, func(t *testing.T) {
			t.Parallel()
			asked := make([]chan struct{}, n)
			for i := range asked {
				asked[i] = make(chan struct{})
			}
			h := &handsOut{fake: newFake(), hold: func(ctx context.Context, key string) {
				i, _ := strconv.Atoi(key)
				close(asked[i])
				select {
				case <-ctx.Done(): // the server has noticed
				case <-time.After(10 * time.Second):
				}
			}}
			r := newRig(t, func(c *server.Config) { c.Broker, c.Limits.Requests = h, 10_000 })
			s, wait := plain(t, r.Agents())
			var g errgroup.Group
			g.SetLimit(8)
			for i := range n {
				g.Go(func() error {
					ctx, hangUp := context.WithCancel(t.Context())
					defer hangUp()
					go func() { <-asked[i]; hangUp() }()
					if body, err := take(ctx, s, strconv.Itoa(i)); err == nil && strings.Contains(body, marker) {
						return errors.New("a client that had gone got the secret")
					}
					return nil
				})
			}
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			wait()
			if closed := h.closed.Load(); closed != n {
				t.Errorf("grants closed after their clients had gone: %d of %d, want all", closed, n)
			}
		})
	}
}
