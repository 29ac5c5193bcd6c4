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
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/pawlsec/pawl/attest/workload"
	"github.com/pawlsec/pawl/broker/agent"
)

// environment sets the three variables. Each may be empty.
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

// TestFromEnvironment: three variables make a client that presents the agent's SVID and accepts only the
// broker that they name.
func TestFromEnvironment(t *testing.T) {
	ids := identities(t)
	broker, planner := ids.Source(ids.ID("/pawl")), ids.ID("/planner")
	seen := make(chan string, 1)
	s := newScript(t)
	config := tlsconfig.MTLSServerConfig(broker, broker, tlsconfig.AuthorizeMemberOf(planner.TrustDomain()))
	l, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, _ := x509svid.IDFromCert(r.TLS.PeerCertificates[0]) // the test compares it
		seen <- id.String()
		s.ServeHTTP(w, r)
	})
	h := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: handler}
	go func() { _ = h.Serve(l) }() // it ends with Close
	t.Cleanup(func() { _ = h.Close() })
	socket, err := ids.Socket(planner)
	if err != nil {
		t.Fatal(err)
	}

	environment(t, "https://"+l.Addr().String(), ids.ID("/pawl").String(), socket)
	for name, cfg := range map[string]agent.Config{"all three": {}, "its own source": {Source: ids.Source(planner)}} {
		c, err := cfg.FromEnvironment(t.Context())
		if err != nil {
			t.Fatalf("FromEnvironment, %s: %v", name, err)
		}
		if _, err := c.Open(t.Context(), agent.Chain{Task: "t"}); err != nil {
			t.Fatalf("Open, %s: %v", name, err)
		}
		if id := <-seen; id != planner.String() {
			t.Errorf("the broker authenticated %s, want %s", id, planner)
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
	defer c.Close() //nolint:errcheck // the loop above checks it
	_, err = c.Open(t.Context(), agent.Chain{Task: "t"})
	if !errors.Is(err, agent.ErrUnavailable) || !strings.Contains(err.Error(), "unexpected ID") {
		t.Errorf("Open at another broker = %v, want unavailable, because of its identity", err)
	}
}

// TestFromEnvironmentSocket: a unix socket as the address needs no other variable.
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

// TestEnvironmentErrors: the error names each missing and malformed variable, with an example.
func TestEnvironmentErrors(t *testing.T) {
	const (
		address = "https://localhost:1"
		id      = "spiffe://example.org/pawl"
		socket  = "unix:///tmp/none"

		theAddress, theID, theSocket = "PAWL_ADDRESS", "PAWL_SERVER_ID", "SPIFFE_ENDPOINT_SOCKET"
	)
	ids := identities(t)
	source := ids.Source(ids.ID("/agent"))
	for _, row := range []struct {
		address, id, socket string
		cfg                 agent.Config
		variables           []string
		text                string
	}{
		{"", "", "", agent.Config{}, []string{theAddress, theID, theSocket}, "is not set, for example PAWL_ADDRESS=https://"},
		{address, "", socket, agent.Config{}, []string{theID}, "is not set, for example PAWL_SERVER_ID=spiffe://"},
		{address, id, "", agent.Config{}, []string{theSocket}, "is not set, for example SPIFFE_ENDPOINT_SOCKET=unix:///"},
		{"http://localhost:1", id, socket, agent.Config{}, []string{theAddress}, "is not https://host:port or unix:/path"},
		{"localhost:1", id, socket, agent.Config{}, []string{theAddress}, "is not https://host:port or unix:/path"},
		{address, "example.org/pawl", socket, agent.Config{}, []string{theID}, "is not a SPIFFE ID"},
		{address, id, "/tmp/none", agent.Config{}, []string{theSocket}, "is not unix:///path or tcp://ip:port"},
		{"", "", "", agent.Config{HTTPClient: http.DefaultClient}, []string{theAddress}, "is not set"},
		{"", "", "", agent.Config{Source: source, Address: address}, []string{theID}, "is not set"},
		{address, id, socket, agent.Config{Address: "localhost:1"}, nil, `"localhost:1" is not https://host:port`},
	} {
		environment(t, row.address, row.id, row.socket)
		_, err := row.cfg.FromEnvironment(t.Context())
		var wrong *agent.EnvironmentError
		var named []string
		if errors.As(err, &wrong) {
			named = wrong.Variables
		}
		if err == nil || !slices.Equal(named, row.variables) || !strings.Contains(err.Error(), row.text) {
			t.Errorf("FromEnvironment of %q, %q, %q = %v, want an error about %v that has %q",
				row.address, row.id, row.socket, err, row.variables, row.text)
		}
	}
}

// TestNoWorkloadAPI: the wait for an SVID ends with the caller's context. The error has the socket.
func TestNoWorkloadAPI(t *testing.T) {
	socket := "unix://" + filepath.Join(t.TempDir(), "none")
	environment(t, "https://localhost:1", "spiffe://example.org/pawl", socket)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := agent.FromEnvironment(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), socket) {
		t.Errorf("FromEnvironment without a Workload API = %v, want the deadline and %s", err, socket)
	}
}

// TestSeveralIdentities: of several SVIDs the agent takes the chosen one, at each update anew, and guesses none.
func TestSeveralIdentities(t *testing.T) {
	var given atomic.Value // []string, paths of the SPIFFE IDs of this process
	var ids *workload.Server
	ids, err := workload.New(workload.Config{TrustDomain: "example.org", Identify: func(workload.Peer) (all []spiffeid.ID) {
		for _, path := range given.Load().([]string) {
			all = append(all, ids.ID(path))
		}
		return all
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ids.Close() }) // its sockets end with it
	dir := t.TempDir()
	socket, err := ids.Listen(filepath.Join(dir, "api"))
	if err != nil {
		t.Fatal(err)
	}
	broker := ids.Source(ids.ID("/pawl"))
	l, err := tls.Listen("tcp", "127.0.0.1:0",
		tlsconfig.MTLSServerConfig(broker, broker, tlsconfig.AuthorizeMemberOf(ids.ID("/pawl").TrustDomain())))
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan string, 1)
	script := newScript(t)
	h := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, _ := x509svid.IDFromCert(r.TLS.PeerCertificates[0]) // the test compares it
		seen <- id.Path()
		w.Header().Set("Connection", "close") // the next request makes a new handshake
		script.ServeHTTP(w, r)
	})}
	go func() { _ = h.Serve(l) }() // it ends with Close
	t.Cleanup(func() { _ = h.Close() })
	environment(t, "https://"+l.Addr().String(), ids.ID("/pawl").String(), socket)
	mine := ids.ID("/agent").String()

	given.Store([]string{"/mesh", "/agent"})
	for _, row := range []struct{ variable, id, is, text string }{
		{"", "", "", "set PAWL_ID or Config.ID"},
		{mine, "", "/agent", ""},
		{"", mine, "/agent", ""},
		{ids.ID("/mesh").String(), mine, "/agent", ""}, // the field replaces the variable
		{"", ids.ID("/gone").String(), "", "not spiffe://example.org/gone, which was chosen"},
		{"", "a-hint", "", `not hint "a-hint", which was chosen`},
		{"https://example.org", "", "", "PAWL_ID is neither a SPIFFE ID nor a hint"},
	} {
		t.Setenv("PAWL_ID", row.variable)
		c, err := agent.Config{ID: row.id}.FromEnvironment(t.Context())
		if row.is == "" {
			if err == nil || !strings.Contains(err.Error(), row.text) {
				t.Errorf("FromEnvironment with PAWL_ID %q and ID %q = %v, want %q", row.variable, row.id, err, row.text)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Open(t.Context(), agent.Chain{Task: "t"}); err != nil {
			t.Fatal(err)
		}
		if is := <-seen; is != row.is {
			t.Errorf("with PAWL_ID %q and ID %q the agent is %s, want %s", row.variable, row.id, is, row.is)
		}
		_ = c.Close() // TestFromEnvironment checks it
	}

	// A second entry comes while the agent runs, and its own goes.
	t.Setenv("PAWL_ID", "")
	given.Store([]string{"/agent"})
	c, err := agent.FromEnvironment(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // TestFromEnvironment checks it
	for _, row := range []struct {
		given    []string
		is, text string
	}{
		{[]string{"/mesh", "/agent"}, "/agent", ""}, {[]string{"/mesh"}, "", "no longer spiffe://example.org/agent"},
		{[]string{"/agent"}, "/agent", ""},
	} {
		given.Store(row.given)
		ids.Rotate()
		tick := time.NewTicker(10 * time.Millisecond)
		for {
			_, err := c.Open(t.Context(), agent.Chain{Task: "t"})
			if err == nil {
				if is := <-seen; is != "/agent" {
					t.Fatalf("the agent became %s after %v", is, row.given)
				}
			}
			if row.is != "" && err == nil || row.is == "" && err != nil && strings.Contains(err.Error(), row.text) {
				break
			}
			select {
			case <-tick.C:
			case <-t.Context().Done():
				t.Fatalf("after %v: %v", row.given, err)
			}
		}
		tick.Stop()
	}
}
