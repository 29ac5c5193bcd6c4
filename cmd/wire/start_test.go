package wire_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestFenceWithoutIdentity restarts a broker that cannot get an SVID, or gets an expired one. Operators can
// fence over the socket and agents are refused. The broker recovers without another restart.
func TestFenceWithoutIdentity(t *testing.T) {
	for name, row := range map[string]struct{ sabotage, repair func(*site) }{
		"the Workload API is gone": {func(*site) {}, (*site).identify},
		"the broker's SVID has expired": {
			func(s *site) { s.behind.Store(int64(time.Hour)); s.identify() },
			func(s *site) { s.behind.Store(0); s.identities.Rotate() },
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, "example.org")
			w := s.start() // nothing has an identity yet
			root := s.open(w, nil)
			w.Close()
			row.sabotage(s)

			w = s.start()
			rv, err := s.operator().Revoke(t.Context(),
				api.RevokeRequest{Selector: "chain:" + string(root.Chain), Reason: "test"})
			if err != nil || rv.Fenced.IsZero() {
				t.Fatalf("Revoke over the socket = %+v, %v, want fenced", rv, err)
			}
			if status := health(t, s); status != http.StatusServiceUnavailable {
				t.Errorf("GET /healthz = %d, want 503, because the broker cannot issue", status)
			}
			open := agent.Chain{Task: "t", Rights: []agent.Right{{Tool: "notes.read", Use: true}}}
			if _, err := s.validAgent().Open(t.Context(), open); !errors.Is(err, agent.ErrUnavailable) {
				t.Fatalf("Open by an agent = %v, want unavailable", err)
			}

			row.repair(s)
			s.behind.Store(0) // the agent's SVID is valid in every row
			within(t, time.Minute, "an agent is let in", func() bool {
				_, err := s.agent().Open(t.Context(), open)
				return err == nil
			})
			fenced, err := w.Broker.Revocation(t.Context(), broker.RevocationID(rv.ID))
			if err != nil || fenced.Fenced.IsZero() {
				t.Errorf("Revocation = %+v, %v, want it still fenced", fenced, err)
			}
		})
	}
}

// validAgent is the agent's client with a valid SVID even while the broker's SVID is expired. Only the
// broker's identity can then refuse the connection.
func (s *site) validAgent() *agent.Client {
	behind := s.behind.Swap(0)
	defer s.behind.Store(behind)
	svid, err := s.identities.X509SVID(s.identities.ID("/agent"))
	if err != nil || !time.Now().Before(svid.Certificates[0].NotAfter) {
		s.t.Fatalf("the agent's own SVID = %v, %v, want a valid one", svid, err)
	}
	return s.agent()
}

// socketTransport connects to the operators' socket for every host.
func socketTransport(s *site) http.RoundTripper {
	return &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.config.Listen.Socket)
	}}
}

func health(t *testing.T, s *site) int {
	t.Helper()
	h := &http.Client{Transport: socketTransport(s)}
	resp, err := h.Get("http://pawl/healthz")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close() // only the status counts
	return resp.StatusCode
}

// TestStartFailsFast holds that a fault which retrying cannot repair is an error of Start.
func TestStartFailsFast(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = taken.Close() }) // it has no connection
	for name, row := range map[string]struct {
		change func(*wire.Config)
		want   string
	}{
		"no socket of that form": {func(c *wire.Config) { c.WorkloadAPI = "/run/workload.sock" }, "workload_api"},
		"a port in use":          {func(c *wire.Config) { c.Listen.Agents = taken.Addr().String() }, "listening for agents"},
		"no authority of Vault":  {func(c *wire.Config) { c.Vault.CA += ".gone" }, "vault.ca"},
		"no backend for a tool": {func(c *wire.Config) {
			c.Backends = map[string]wire.Backend{"other": {Plugin: "kv"}}
		}, "not configured"},
		"no signing key": {func(c *wire.Config) { c.SigningKey += ".gone" }, "signing_key"},
	} {
		s := newSite(t, "example.org")
		row.change(&s.config)
		w, err := wire.Start(t.Context(), s.config, slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), row.want) {
			w.Close()
			t.Errorf("Start with %s = %v, want an error about %q", name, err, row.want)
		}
	}
}

// TestFenceOnAFullDiskAfterARestart fills the ledger's file system and restarts the broker on it.
func TestFenceOnAFullDiskAfterARestart(t *testing.T) {
	s := newSite(t, "example.org")
	dir := s.path("disk")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=80m"); err != nil {
		if os.Getenv("PAWL_REQUIRE") == "all" {
			t.Fatalf("mounting a tmpfs: %v", err)
		}
		t.Skipf("SKIPPED: a full disk is not tested: mounting a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmounting: %v", err)
		}
	})
	s.config.Ledger = s.path("disk/ledger.db")
	w := s.start()
	root := s.open(w, nil)
	w.Close()
	if err := os.WriteFile(s.path("disk/ballast"), make([]byte, 80<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filling the disk = %v, want ENOSPC", err)
	}

	w = s.start()
	defer w.Close() // before the disk is unmounted
	caller := broker.Caller{ID: s.identities.ID("/agent"), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	if _, err := w.Broker.Open(t.Context(), caller, broker.OpenRequest{Task: "t",
		Rights: []broker.Right{{Tool: "notes.read", Use: true}}}); !errors.Is(err, broker.Unavailable) {
		t.Errorf("Open on a full disk = %v, want unavailable", err)
	}
	rv, err := s.operator().Revoke(t.Context(), api.RevokeRequest{Selector: "chain:" + string(root.Chain), Reason: "test"})
	if err != nil || rv.Fenced.IsZero() {
		t.Fatalf("Revoke after a restart on a full disk = %+v, %v, want fenced", rv, err)
	}
}
