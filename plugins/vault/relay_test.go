package vault_test

import (
	"errors"
	"io"
	"net"
	"net/http/httptrace"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/vault"
)

// relay passes TCP connections on to a real Vault, and closes them when a test says so.
type relay struct {
	*site
	address string

	mu      sync.Mutex          // guards the fields below
	clients map[string]net.Conn // by the client's address
	swallow bool                // connections are closed at the next byte from a client, which Vault does not get
}

func newRelay(t *testing.T, s *site) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{site: s, address: l.Addr().String(), clients: map[string]net.Conn{}}
	var done sync.WaitGroup
	done.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			r.mu.Lock()
			r.clients[client.RemoteAddr().String()] = client
			r.mu.Unlock()
			done.Go(func() { r.pass(client) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		r.mu.Lock()
		for _, c := range r.clients {
			_ = c.Close()
		}
		r.mu.Unlock()
		done.Wait()
	})
	return r
}

// pass passes one connection on.
func (r *relay) pass(client net.Conn) {
	defer client.Close() //nolint:errcheck // either side may have closed it
	server, err := net.Dial("tcp", r.Address()[len("https://"):])
	if err != nil {
		return
	}
	defer server.Close() //nolint:errcheck // either side may have closed it
	go func() {
		_, _ = io.Copy(client, server) // it ends with either connection
		_ = client.Close()
	}()
	buf := make([]byte, 4096)
	for {
		n, err := client.Read(buf)
		r.mu.Lock()
		stop := err != nil || r.swallow
		r.mu.Unlock()
		if stop {
			return
		}
		if _, err := server.Write(buf[:n]); err != nil {
			return
		}
	}
}

// closeIdle closes the connection of the client at an address.
func (r *relay) closeIdle(client string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.clients[client].Close()
}

// cut mints over a kept-alive connection that is closed: after the mint has taken it and before it is written, or with
// late, when its first byte has arrived. It returns the mint's error.
func (r *relay) cut(t *testing.T, change func(*vault.Config), m broker.Mint, late bool) error {
	t.Helper()
	cfg := r.config()
	cfg.Address = "https://" + r.address
	change(&cfg)
	c := newClient(t, cfg)
	branch(t, c, delegation(rootID, ""), r.a())
	h := child(t, c, rootID, time.Minute, r.a())
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		if !info.Reused {
			t.Error("the mint has a new connection, want the one of the token's request")
		}
		if late {
			r.mu.Lock()
			r.swallow = true
			r.mu.Unlock()
			return
		}
		r.closeIdle(info.Conn.LocalAddr().String())
		until(t, 10*time.Second, "the client sees that its connection was closed", func() bool {
			_, err := info.Conn.Write(nil)
			return err != nil
		})
	}})
	_, _, err := c.Mint(ctx, h, m)
	r.mu.Lock()
	r.swallow = false
	r.mu.Unlock()
	return err
}

// TestClosedConnection closes a kept-alive connection to a real Vault under a mint. If the mint was not written, it
// certainly made nothing, and the agent may try again. If its first byte was, its outcome is unknown.
func TestClosedConnection(t *testing.T) {
	r := newRelay(t, newSite(t, parts.NeedVault(t)))
	root, err := r.Client()
	if err != nil {
		t.Fatal(err)
	}
	made := func() int {
		list, err := root.Logical().ListWithContext(t.Context(), r.pki+"/certs")
		if err != nil || list == nil {
			t.Fatalf("listing the certificates = %v, %v", list, err)
		}
		serials, _ := list.Data["keys"].([]any)
		return len(serials)
	}
	before := made()
	if before == 0 {
		t.Fatal("Vault lists no certificate, want the authority's")
	}
	read := r.mint("a")
	read.Data = nil
	for name, m := range map[string]broker.Mint{"POST": r.mint("a"), "GET": read} {
		err := r.cut(t, func(*vault.Config) {}, m, false)
		var refusal *broker.Error
		if !errors.Is(err, broker.ErrNotMinted) || !errors.As(err, &refusal) || refusal.Code != broker.CodeVaultDown ||
			refusal.RetryAfter != time.Second {
			t.Errorf("Mint by %s, closed before it was written = %v, want certainly nothing, vault_unavailable, after 1s", name, err)
		}
		if err := r.cut(t, func(*vault.Config) {}, m, true); err == nil || errors.Is(err, broker.ErrNotMinted) {
			t.Errorf("Mint by %s, closed at its first byte = %v, want an unknown outcome", name, err)
		}
	}
	if after := made(); after != before {
		t.Errorf("Vault made %d certificates, want none", after-before)
	}
}

// TestClosingServer mints at a server that closes connections at any time. A mint that certainly made nothing never
// reached it.
func TestClosingServer(t *testing.T) {
	f := newFake(t, respond(200, good))
	c := f.client(t, nil)
	stop := make(chan struct{})
	var closer sync.WaitGroup
	closer.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				f.CloseClientConnections()
			}
		}
	})
	defer closer.Wait()
	defer close(stop)
	outcomes := map[string]int{}
	for range 300 {
		g := broker.Grant{ID: grantID, Delegation: rootID, Expires: time.Now().Add(time.Minute)}
		h, err := c.CreateStepToken(t.Context(), g, "x", "pawl-tool-a")
		if err != nil {
			continue
		}
		before := f.count("POST pki/issue/a")
		_, _, err = c.Mint(t.Context(), h, plainMint(brokertest.Path("pki/issue/a")))
		switch {
		case err == nil:
			outcomes["made"]++
		case !errors.Is(err, broker.ErrNotMinted):
			outcomes["unknown"]++
		case f.count("POST pki/issue/a") != before:
			t.Fatalf("Mint = %v, and the server got it", err)
		default:
			outcomes["nothing"]++
		}
	}
	t.Logf("outcomes: %v", outcomes)
}
