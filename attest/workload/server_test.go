package workload_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pawlsec/pawl/attest/workload"
	pb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func newServer(t *testing.T, c workload.Config) *workload.Server {
	t.Helper()
	if c.TrustDomain == "" {
		c.TrustDomain = "example.org"
	}
	s, err := workload.New(c)
	if err != nil {
		t.Fatalf("New = %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
	})
	return s
}

func socket(t *testing.T, s *workload.Server, path string) string {
	t.Helper()
	addr, err := s.Socket(s.ID(path))
	if err != nil {
		t.Fatalf("Socket(%s) = %v", path, err)
	}
	return addr
}

func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func x509Source(t *testing.T, addr string) *workloadapi.X509Source {
	t.Helper()
	source, err := workloadapi.NewX509Source(soon(t), workloadapi.WithClientOptions(workloadapi.WithAddr(addr)))
	if err != nil {
		t.Fatalf("NewX509Source = %v", err)
	}
	t.Cleanup(func() { _ = source.Close() })
	return source
}

func leaf(t *testing.T, source x509svid.Source) *x509.Certificate {
	t.Helper()
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatalf("GetX509SVID = %v", err)
	}
	return svid.Certificates[0]
}

// until waits until a push to the source makes ok true.
func until(t *testing.T, updated <-chan struct{}, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-updated:
		case <-deadline:
			t.Fatalf("%s: not seen in 20 s", what)
		}
	}
}

func TestConfigRefused(t *testing.T) {
	for _, c := range []workload.Config{
		{},
		{TrustDomain: "Example.org"},
		{TrustDomain: "spiffe://example.org"},
		{TrustDomain: "example.org", SVIDTTL: -1},
	} {
		if _, err := workload.New(c); err == nil {
			t.Errorf("New(%+v) = nil error, want one", c)
		}
	}
}

func TestX509SVIDOverSocket(t *testing.T) {
	s := newServer(t, workload.Config{})
	source := x509Source(t, socket(t, s, "/agent/a"))
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatalf("GetX509SVID = %v", err)
	}
	id, _, err := x509svid.Verify(svid.Certificates, source)
	if err != nil || id != s.ID("/agent/a") {
		t.Errorf("Verify = %v, %v, want %v", id, err, s.ID("/agent/a"))
	}
	cert := svid.Certificates[0]
	if life := time.Until(cert.NotAfter); life > 5*time.Minute || life < 4*time.Minute {
		t.Errorf("life of the SVID = %v, want about 5m", life)
	}
	if cert.SerialNumber.BitLen() < 64 {
		t.Errorf("serial number has %d bits, want at least 64", cert.SerialNumber.BitLen())
	}
	if again := socket(t, s, "/agent/a"); again != socket(t, s, "/agent/a") || again == socket(t, s, "/agent/b") {
		t.Error("Socket does not give one address per identity")
	}
}

func TestRotationIsPushed(t *testing.T) {
	s := newServer(t, workload.Config{})
	source := x509Source(t, socket(t, s, "/agent/a"))
	first := leaf(t, source)

	s.Rotate()
	until(t, source.Updated(), "Rotate", func() bool { return !leaf(t, source).Equal(first) })

	if err := s.RotateAuthority(); err != nil {
		t.Fatalf("RotateAuthority = %v", err)
	}
	authorities := func() int {
		b, err := source.GetX509BundleForTrustDomain(s.ID("/agent/a").TrustDomain())
		if err != nil {
			t.Fatalf("GetX509BundleForTrustDomain = %v", err)
		}
		return len(b.X509Authorities())
	}
	until(t, source.Updated(), "RotateAuthority", func() bool { return authorities() == 2 })
	if _, _, err := x509svid.Verify([]*x509.Certificate{first}, source); err != nil {
		t.Errorf("the old authority's SVID before Retire: %v, want accepted", err)
	}

	s.Retire()
	until(t, source.Updated(), "Retire", func() bool { return authorities() == 1 })
	if _, _, err := x509svid.Verify([]*x509.Certificate{first}, source); err == nil {
		t.Error("the old authority's SVID after Retire: accepted, want refused")
	}
	if _, _, err := x509svid.Verify([]*x509.Certificate{leaf(t, source)}, source); err != nil {
		t.Errorf("the new authority's SVID after Retire: %v, want accepted", err)
	}
}

func TestSVIDIsRenewedAtHalfLife(t *testing.T) {
	now := time.Now()
	s := newServer(t, workload.Config{SVIDTTL: time.Minute, Now: func() time.Time { return now }})
	source := s.Source(s.ID("/agent/a"))
	first := leaf(t, source)
	now = now.Add(29 * time.Second)
	if !leaf(t, source).Equal(first) {
		t.Error("SVID after 29 s of 60 is another, want the same")
	}
	now = now.Add(time.Second)
	if leaf(t, source).Equal(first) {
		t.Error("SVID after 30 s of 60 is the same, want a new one")
	}
}

// TestStreamRenewsByItself waits for a push without a call of Rotate.
func TestStreamRenewsByItself(t *testing.T) {
	s := newServer(t, workload.Config{SVIDTTL: 2 * time.Second})
	source := x509Source(t, socket(t, s, "/agent/a"))
	first := leaf(t, source)
	until(t, source.Updated(), "renewal", func() bool { return !leaf(t, source).Equal(first) })
}

func TestJWTSVID(t *testing.T) {
	s := newServer(t, workload.Config{})
	source, err := workloadapi.NewJWTSource(soon(t), workloadapi.WithClientOptions(workloadapi.WithAddr(socket(t, s, "/agent/a"))))
	if err != nil {
		t.Fatalf("NewJWTSource = %v", err)
	}
	defer source.Close()
	fetch := func() *jwtsvid.SVID {
		svid, err := source.FetchJWTSVID(soon(t), jwtsvid.Params{Audience: "pawl"})
		if err != nil {
			t.Fatalf("FetchJWTSVID = %v", err)
		}
		return svid
	}
	accepted := func(svid *jwtsvid.SVID) bool {
		_, err := jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{"pawl"})
		return err == nil
	}
	first := fetch()
	if first.ID != s.ID("/agent/a") || !accepted(first) {
		t.Errorf("JWT-SVID of %v is not accepted, or not %v's", first.ID, s.ID("/agent/a"))
	}
	if err := s.RotateAuthority(); err != nil {
		t.Fatalf("RotateAuthority = %v", err)
	}
	second := fetch()
	until(t, source.Updated(), "RotateAuthority", func() bool { return accepted(second) })
	if !accepted(first) {
		t.Error("the old key's JWT-SVID before Retire is refused, want accepted")
	}
	s.Retire()
	until(t, source.Updated(), "Retire", func() bool { return !accepted(first) })
	if !accepted(second) {
		t.Error("the new key's JWT-SVID after Retire is refused, want accepted")
	}
}

func TestValidateJWTSVID(t *testing.T) {
	now := time.Now()
	s := newServer(t, workload.Config{Now: func() time.Time { return now }})
	client, err := workloadapi.New(soon(t), workloadapi.WithAddr(socket(t, s, "/broker")))
	if err != nil {
		t.Fatalf("workloadapi.New = %v", err)
	}
	defer client.Close()
	token, err := s.JWTSVID(s.ID("/agent/a"), "pawl")
	if err != nil {
		t.Fatalf("JWTSVID = %v", err)
	}
	if svid, err := client.ValidateJWTSVID(soon(t), token, "pawl"); err != nil || svid.ID != s.ID("/agent/a") {
		t.Errorf("ValidateJWTSVID = %v, want accepted", err)
	}
	if _, err := client.ValidateJWTSVID(soon(t), token, "vault"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("ValidateJWTSVID for another audience = %v, want InvalidArgument", err)
	}
	foreign := newServer(t, workload.Config{})
	forged, err := foreign.JWTSVID(foreign.ID("/agent/a"), "pawl")
	if err != nil {
		t.Fatalf("JWTSVID = %v", err)
	}
	if _, err := client.ValidateJWTSVID(soon(t), forged, "pawl"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("ValidateJWTSVID of another server's = %v, want InvalidArgument", err)
	}
	now = now.Add(5*time.Minute + time.Second)
	if _, err := client.ValidateJWTSVID(soon(t), token, "pawl"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("ValidateJWTSVID of an expired one = %v, want InvalidArgument", err)
	}
}

func TestPeerCredentials(t *testing.T) {
	var seen workload.Peer
	known := true
	s := newServer(t, workload.Config{Identify: func(p workload.Peer) []spiffeid.ID {
		if seen = p; !known {
			return nil
		}
		return []spiffeid.ID{spiffeid.RequireFromString("spiffe://example.org/first"), spiffeid.RequireFromString("spiffe://example.org/second")}
	}})
	addr, err := s.Listen(filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatalf("Listen = %v", err)
	}
	client, err := workloadapi.New(soon(t), workloadapi.WithAddr(addr))
	if err != nil {
		t.Fatalf("workloadapi.New = %v", err)
	}
	defer client.Close()
	svids, err := client.FetchX509SVIDs(soon(t))
	if err != nil || len(svids) != 2 || svids[0].ID.Path() != "/first" {
		t.Fatalf("FetchX509SVIDs = %d SVIDs, %v, want /first and /second", len(svids), err)
	}
	want := workload.Peer{UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), PID: int32(os.Getpid())}
	if seen != want {
		t.Errorf("peer = %+v, want %+v", seen, want)
	}
	svid, err := client.FetchJWTSVID(soon(t), jwtsvid.Params{Audience: "pawl", Subject: svids[1].ID})
	if err != nil || svid.ID.Path() != "/second" {
		t.Errorf("FetchJWTSVID for /second = %v", err)
	}
	other := jwtsvid.Params{Audience: "pawl", Subject: s.ID("/third")}
	if _, err := client.FetchJWTSVID(soon(t), other); status.Code(err) != codes.PermissionDenied {
		t.Errorf("FetchJWTSVID for /third = %v, want PermissionDenied", err)
	}
	known = false
	if _, err := client.FetchX509SVID(soon(t)); status.Code(err) != codes.PermissionDenied {
		t.Errorf("FetchX509SVID by an unknown process = %v, want PermissionDenied", err)
	}
}

func TestHeaderIsRequired(t *testing.T) {
	s := newServer(t, workload.Config{})
	conn, err := grpc.NewClient(socket(t, s, "/agent/a"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatalf("NewClient = %v", err)
	}
	defer conn.Close()
	client := pb.NewSpiffeWorkloadAPIClient(conn)
	for name, ctx := range map[string]context.Context{
		"none":  soon(t),
		"false": metadata.AppendToOutgoingContext(soon(t), "workload.spiffe.io", "false"),
		"twice": metadata.AppendToOutgoingContext(soon(t), "workload.spiffe.io", "true", "workload.spiffe.io", "true"),
	} {
		stream, err := client.FetchX509SVID(ctx, &pb.X509SVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("header %s: FetchX509SVID = %v, want InvalidArgument", name, err)
		}
		if _, err := client.FetchJWTSVID(ctx, &pb.JWTSVIDRequest{Audience: []string{"pawl"}}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("header %s: FetchJWTSVID = %v, want InvalidArgument", name, err)
		}
	}
	ctx := metadata.AppendToOutgoingContext(soon(t), "workload.spiffe.io", "true")
	if _, err := client.FetchJWTSVID(ctx, &pb.JWTSVIDRequest{Audience: []string{"pawl"}}); err != nil {
		t.Errorf("header true: FetchJWTSVID = %v, want a token", err)
	}
	if _, err := client.FetchJWTSVID(ctx, &pb.JWTSVIDRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no audience: FetchJWTSVID = %v, want InvalidArgument", err)
	}
}

func TestListenWhereSomethingIs(t *testing.T) {
	dir := t.TempDir()
	stale, used, file := filepath.Join(dir, "stale"), filepath.Join(dir, "used"), filepath.Join(dir, "file")
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatalf("ListenUnix = %v", err)
	}
	left.SetUnlinkOnClose(false) // like a process that was killed
	if err := left.Close(); err != nil {
		t.Fatalf("Close = %v", err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatalf("WriteFile = %v", err)
	}
	s := newServer(t, workload.Config{})
	if _, err := s.Listen(used); err != nil {
		t.Fatalf("Listen = %v", err)
	}
	for path, ok := range map[string]bool{stale: true, used: false, file: false} {
		if _, err := s.Listen(path); (err == nil) != ok {
			t.Errorf("Listen(%s) = %v, want success %v", filepath.Base(path), err, ok)
		}
	}
}

func TestForeignIdentityIsNotIssued(t *testing.T) {
	s := newServer(t, workload.Config{})
	for _, id := range []string{"spiffe://example.com/a", "spiffe://example.org"} {
		id := spiffeid.RequireFromString(id)
		if _, err := s.X509SVID(id); err == nil {
			t.Errorf("X509SVID(%v) = nil error, want one", id)
		}
		if _, err := s.JWTSVID(id, "pawl"); err == nil {
			t.Errorf("JWTSVID(%v) = nil error, want one", id)
		}
		if _, err := s.Socket(id); err == nil {
			t.Errorf("Socket(%v) = nil error, want one", id)
		}
	}
}

func TestClose(t *testing.T) {
	s := newServer(t, workload.Config{})
	addr := socket(t, s, "/agent/a")
	source := x509Source(t, addr)
	if err := s.Close(); err != nil { // although a stream is open
		t.Fatalf("Close = %v", err)
	}
	if _, err := source.GetX509SVID(); err != nil {
		t.Errorf("GetX509SVID after the server is gone = %v, want the last SVID", err)
	}
	if _, err := os.Stat(addr[len("unix://"):]); !os.IsNotExist(err) {
		t.Errorf("socket after Close: %v, want it gone", err)
	}
	if _, err := s.Socket(s.ID("/agent/b")); err == nil {
		t.Error("Socket after Close = nil error, want one")
	}
}

// One process with two identities, each on its own socket, like two real workloads.
func Example() {
	server, err := workload.New(workload.Config{TrustDomain: "example.org"})
	if err != nil {
		panic(err)
	}
	defer server.Close()

	ctx := context.Background()
	for _, path := range []string{"/pawl", "/agent/planner"} {
		addr, err := server.Socket(server.ID(path)) // in production: the value of SPIFFE_ENDPOINT_SOCKET
		if err != nil {
			panic(err)
		}
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(addr)))
		if err != nil {
			panic(err)
		}
		svid, err := source.GetX509SVID()
		if err != nil {
			panic(err)
		}
		fmt.Println(svid.ID)
		source.Close()
	}
	// Output:
	// spiffe://example.org/pawl
	// spiffe://example.org/agent/planner
}
