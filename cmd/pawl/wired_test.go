package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/pawlsec/pawl/attest/workload"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/audit"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestWired starts a broker from a configuration, with Vault down. An identity provider pushes an event over
// TLS, and the agent's chain is fenced. The operator gets the signed report, the checkpoint and the metrics
// over the local socket.
func TestWired(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir, err := os.MkdirTemp("", "pawl") // t.TempDir is too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a temporary directory
	identities, err := workload.New(workload.Config{TrustDomain: "example.org"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = identities.Close() }) // its sockets end with it
	config, public, transmitter := wiredConfig(t, dir, identities)
	s, err := wire.Start(ctx, config, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	agent := broker.Caller{ID: identities.ID("/agent"), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	root, err := s.Broker.Open(ctx, agent,
		broker.OpenRequest{Task: "t", Rights: []broker.Right{{Tool: "notes.read", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}

	token := event(t, transmitter, agent.ID.String())
	for i, want := range []int{http.StatusAccepted, http.StatusBadRequest} {
		if status := pushEvent(t, s.Agents(), token); status != want {
			t.Fatalf("push %d = %d, want %d", i+1, status, want)
		}
	}
	status, err := s.Broker.Status(ctx, agent, root.ID)
	if err != nil || status.Fence == nil {
		t.Fatalf("Status = %+v, %v, want a fence", status, err)
	}

	c, err := operator.New(operator.Config{Address: "unix:" + config.Listen.Socket})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	jws, err := c.Report(ctx, string(status.Fence.Revocation))
	if err != nil {
		t.Fatal(err)
	}
	r, err := audit.VerifyReport(jws, public)
	if err != nil || r.Revocation.By != "set:https://idp.example.org" ||
		len(r.Chains) != 1 || r.Chains[0].ID != root.Chain {
		t.Errorf("VerifyReport = %+v, %v, want the chain, fenced by the identity provider", r, err)
	}
	signed, err := c.Checkpoint(ctx)
	if err != nil {
		t.Fatal(err)
	}
	checked, err := audit.Verify(brokerLog(ctx, c), public, signed)
	if err != nil || checked.Size < 3 || checked.Origin != "example.org/pawl" {
		t.Errorf("Verify of the broker's log = %+v, %v, want at least 3 entries of example.org/pawl", checked, err)
	}
	page := scrape(t, config.Listen.Socket)
	for _, line := range []string{"pawl_vault_ready 0", `pawl_fences_total{kind="revoke"} 1`, "pawl_live_grants 0"} {
		if !strings.Contains(page, "\n"+line+"\n") {
			t.Errorf("/metrics lacks %q", line)
		}
	}
	if strings.Contains(page, string(root.Chain)) || strings.Contains(page, "spiffe://") {
		t.Error("/metrics has an id or a name")
	}

	s.Close() // after a restart, an event that was acted on is still refused as a replay
	if s, err = wire.Start(ctx, config, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	if status := pushEvent(t, s.Agents(), token); status != http.StatusBadRequest {
		t.Errorf("push after a restart = %d, want 400", status)
	}
}

// wiredConfig makes a configuration and its files. Its Vault does not exist.
func wiredConfig(
	t *testing.T, dir string, identities *workload.Server,
) (c wire.Config, public jose.JSONWebKey, transmitter ed25519.PrivateKey) {
	t.Helper()
	private, public, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	open, transmitter, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	source, err := policy.Build(fstest.MapFS{
		"bundle.yaml": {Data: []byte("{name: wired, version: 1}")},
		"tools.yaml": {Data: []byte("tools:\n  - {name: notes.read, backend: notes, narrowing: none, " +
			"vault: {policy: pawl-tool-notes, path: secret/notes}}\n")},
		"main.cedar": {Data: []byte(notesPermit)},
	})
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := policy.Sign(source, private)
	if err != nil {
		t.Fatal(err)
	}
	api, err := identities.Socket(identities.ID("/pawl"))
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string, v any) string {
		raw, isText := v.([]byte)
		if !isText {
			if raw, err = json.Marshal(v); err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return wire.Config{
		TrustDomains: []string{"example.org"}, WorkloadAPI: api, JWTAudience: "pawl",
		Listen: wire.Listen{Agents: "127.0.0.1:0", Socket: filepath.Join(dir, "admin.sock")},
		Ledger: filepath.Join(dir, "ledger.db"),
		Policy: wire.Policy{Bundle: file("policy.jws", bundle),
			Keys: file("keys.json", jose.JSONWebKeySet{Keys: []jose.JSONWebKey{public}})},
		Vault:      wire.Vault{Address: "https://127.0.0.1:1", CA: file("ca.pem", someAuthority(t))},
		Backends:   map[string]wire.Backend{"notes": {Plugin: "kv"}},
		SweepEvery: -1, SigningKey: file("signing.key", private),
		Signals: []wire.Signal{{Issuer: "https://idp.example.org", Audience: "https://pawl.example.org", Action: "revoke",
			Keys: file("idp.json", jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: open, KeyID: "k1"}}})}},
	}, public, transmitter
}

func someAuthority(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true,
		NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// event makes a token like an identity provider, without Pawl's code.
func event(t *testing.T, key ed25519.PrivateKey, uri string) string {
	t.Helper()
	part := base64.RawURLEncoding.EncodeToString
	signed := part([]byte(`{"typ":"secevent+jwt","alg":"EdDSA","kid":"k1"}`)) + "." + part(fmt.Appendf(nil,
		`{"iss":"https://idp.example.org","jti":"756e69","iat":%d,"aud":"https://pawl.example.org",
		"sub_id":{"format":"uri","uri":%q},
		"events":{"https://schemas.openid.net/secevent/caep/event-type/session-revoked":{"initiating_entity":"policy"}}}`,
		time.Now().Unix(), uri))
	return signed + "." + part(ed25519.Sign(key, []byte(signed)))
}

// pushEvent pushes a token without a client certificate.
func pushEvent(t *testing.T, to net.Addr, token string) (status int) {
	t.Helper()
	h := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{
		InsecureSkipVerify: true, // an SVID has no host name, and this tests the broker's side
		MinVersion:         tls.VersionTLS13,
	}}}
	defer h.CloseIdleConnections()
	resp, err := h.Post("https://"+to.String()+"/v1/security-events", "application/secevent+jwt", strings.NewReader(token))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close() // only the status counts
	return resp.StatusCode
}

func scrape(t *testing.T, socket string) string {
	t.Helper()
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	h := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: dial}}
	defer h.CloseIdleConnections()
	resp, err := h.Get("http://pawl/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // only read
	page, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET /metrics = %d, %v, want 200", resp.StatusCode, err)
	}
	return string(page)
}
