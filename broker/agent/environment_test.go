package agent_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/pawlsec/pawl/attest/workload"
	"github.com/pawlsec/pawl/broker/agent"
)

// environment sets the three variables, each of which may be empty.
func environment(t *testing.T, address, serverID, socket string) {
	t.Helper()
	t.Setenv("PAWL_ADDRESS", address)
	t.Setenv("PAWL_SERVER_ID", serverID)
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", socket)
}

// identities is a Workload API with one socket per identity.
func identities(t *testing.T) *workload.Server {
	t.Helper()
	s, err := workload.New(workload.Config{TrustDomain: "example.org"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() }) // its sockets end with it
	return s
}

// TestFromEnvironment: three variables are enough for a client that is an agent by SPIFFE and accepts
// no other broker than the one that they name.
func TestFromEnvironment(t *testing.T) {
	ids := identities(t)
	broker, planner := ids.Source(ids.ID("/pawl")), ids.ID("/planner")
	seen := make(chan string, 1)
	s := newScript(t)
	config := tlsconfig.MTLSServerConfig(broker, broker, tlsconfig.AuthorizeMemberOf(ids.TrustDomain()))
	l, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	h := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, _ := x509svid.IDFromCert(r.TLS.PeerCertificates[0])
		seen <- id.String()
		s.ServeHTTP(w, r)
	})}
	go func() { _ = h.Serve(l) }() // it ends with Close
	t.Cleanup(func() { _ = h.Close() })
	socket, err := ids.Socket(planner)
	if err != nil {
		t.Fatal(err)
	}

	environment(t, "https://"+l.Addr().String(), ids.ID("/pawl").String(), socket)
	for name, cfg := range map[string]agent.Config{"environment": {}, "identity of its own": {Source: ids.Source(planner)}} {
		c, err := cfg.FromEnvironment(t.Context())
		if err != nil {
			t.Fatalf("FromEnvironment, %s: %v", name, err)
		}
		if _, err := c.Open(t.Context(), agent.Chain{Task: "t"}); err != nil {
			t.Fatalf("Open, %s: %v", name, err)
		}
		if id := <-seen; id != planner.String() {
			t.Errorf("the broker met %s, want %s", id, planner)
		}
		if err := c.Close(); err != nil {
			t.Errorf("Close, %s: %v", name, err)
		}
	}

	t.Setenv("PAWL_SERVER_ID", "spiffe://example.org/other")
	c, err := agent.FromEnvironment(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // its source was closed before, above
	if _, err := c.Open(t.Context(), agent.Chain{Task: "t"}); !errors.Is(err, agent.ErrUnavailable) || !strings.Contains(err.Error(), "unexpected ID") {
		t.Errorf("Open at another broker = %v, want unavailable, because of its identity", err)
	}
}

// TestFromEnvironmentSocket: a broker on a socket needs no identity, because it knows its peers.
func TestFromEnvironmentSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	h := &http.Server{Handler: newScript(t)}
	go func() { _ = h.Serve(l) }() // it ends with Close
	t.Cleanup(func() { _ = h.Close() })
	environment(t, "unix:"+path, "", "")
	c, err := agent.FromEnvironment(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // it has no source
	if _, err := c.Open(t.Context(), agent.Chain{Task: "t"}); err != nil {
		t.Errorf("Open over a socket = %v, want nil", err)
	}
}

// TestEnvironmentErrors: what is missing or malformed is named, with an example that is well formed.
func TestEnvironmentErrors(t *testing.T) {
	const address, id, socket = "https://localhost:1", "spiffe://example.org/pawl", "unix:///tmp/none"
	ids := identities(t)
	for _, row := range []struct {
		address, id, socket string
		cfg                 agent.Config
		variables           []string
		text                string
	}{
		{"", "", "", agent.Config{}, []string{"PAWL_ADDRESS", "PAWL_SERVER_ID", "SPIFFE_ENDPOINT_SOCKET"}, "PAWL_ADDRESS is not set, for example PAWL_ADDRESS=https://"},
		{address, "", socket, agent.Config{}, []string{"PAWL_SERVER_ID"}, "PAWL_SERVER_ID is not set, for example PAWL_SERVER_ID=spiffe://"},
		{address, id, "", agent.Config{}, []string{"SPIFFE_ENDPOINT_SOCKET"}, "SPIFFE_ENDPOINT_SOCKET is not set, for example SPIFFE_ENDPOINT_SOCKET=unix:///"},
		{"http://localhost:1", id, socket, agent.Config{}, []string{"PAWL_ADDRESS"}, "PAWL_ADDRESS is not https://host:port or unix:/path"},
		{"localhost:1", id, socket, agent.Config{}, []string{"PAWL_ADDRESS"}, "is not https://host:port"},
		{address, "example.org/pawl", socket, agent.Config{}, []string{"PAWL_SERVER_ID"}, "PAWL_SERVER_ID is not a SPIFFE ID"},
		{address, id, "/tmp/none", agent.Config{}, []string{"SPIFFE_ENDPOINT_SOCKET"}, "SPIFFE_ENDPOINT_SOCKET is not unix:///path"},
		{"", "", "", agent.Config{HTTPClient: http.DefaultClient}, []string{"PAWL_ADDRESS"}, "PAWL_ADDRESS is not set"},
		{"", "", "", agent.Config{Source: ids.Source(ids.ID("/a")), Address: address}, []string{"PAWL_SERVER_ID"}, "PAWL_SERVER_ID is not set"},
		{address, id, socket, agent.Config{Address: "localhost:1"}, nil, `Address "localhost:1" is not https://host:port`},
	} {
		environment(t, row.address, row.id, row.socket)
		_, err := row.cfg.FromEnvironment(t.Context())
		var wrong *agent.EnvironmentError
		var named []string
		if errors.As(err, &wrong) {
			named = wrong.Variables
		}
		if err == nil || !slices.Equal(named, row.variables) || !strings.Contains(err.Error(), row.text) {
			t.Errorf("FromEnvironment of %q, %q, %q = %v, want one that names %v and has %q", row.address, row.id, row.socket, err, row.variables, row.text)
		}
	}
}

// TestNoWorkloadAPI: the wait for an SVID ends with the caller's context, and the error says where.
func TestNoWorkloadAPI(t *testing.T) {
	socket := "unix://" + filepath.Join(t.TempDir(), "none")
	environment(t, "https://localhost:1", "spiffe://example.org/pawl", socket)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := agent.FromEnvironment(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), socket) {
		t.Errorf("FromEnvironment without a Workload API = %v, want the deadline, with %s", err, socket)
	}
}
