package vault_test

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/plugins/vault"
)

const (
	rootID  = broker.DelegationID("dl000000000000000000000001")
	childID = broker.DelegationID("dl000000000000000000000002")
	grantID = broker.GrantID("gr000000000000000000000001")
	marker  = "s3cr3t-marker"
)

// fake is a TLS server that creates and renews tokens like Vault and passes every other request to mint. It counts the
// requests.
type fake struct {
	*httptest.Server
	mint      http.HandlerFunc
	alterAuth func(auth map[string]any) // alters the description of a new token; nil: no change

	mu   sync.Mutex
	made int
	seen map[string]int // requests by method and path
}

func newFake(t *testing.T, mint http.HandlerFunc) *fake {
	f := &fake{mint: mint, seen: map[string]int{}}
	f.Server = httptest.NewUnstartedServer(f)
	f.Config.ErrorLog = log.New(io.Discard, "", 0)
	f.StartTLS()
	t.Cleanup(f.Close)
	return f
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	f.mu.Lock()
	f.seen[r.Method+" "+path]++
	f.made++
	n := f.made
	f.mu.Unlock()
	switch {
	case strings.HasPrefix(path, "auth/token/create"):
		var t struct {
			Policies  []string
			Renewable bool
		}
		_ = json.NewDecoder(r.Body).Decode(&t)
		auth := map[string]any{
			"client_token": fmt.Sprintf("%s-token-%d", marker, n), "accessor": fmt.Sprintf("accessor-%d", n),
			"lease_duration": 60, "renewable": t.Renewable, "token_type": "service", "token_policies": t.Policies,
			"orphan": false,
		}
		if f.alterAuth != nil {
			f.alterAuth(auth)
		}
		writeJSON(w, map[string]any{"auth": auth})
	case path == "auth/token/renew-self":
		writeJSON(w, map[string]any{"auth": map[string]any{
			"client_token": "t", "accessor": "a", "lease_duration": 60, "token_type": "service",
		}})
	default:
		f.mint(w, r)
	}
}

func (f *fake) count(request string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.seen[request]
}

func writeJSON(w http.ResponseWriter, v any) { _ = json.NewEncoder(w).Encode(v) }

func (f *fake) roots() *x509.CertPool {
	return f.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
}

// client returns a client that is logged in and holds the root delegation.
func (f *fake) client(t *testing.T, change func(*vault.Config)) *vault.Client {
	t.Helper()
	cfg := vault.Config{Address: f.URL, Roots: f.roots(), Login: vault.TokenLogin("root-token")}
	if change != nil {
		change(&cfg)
	}
	c := newClient(t, cfg)
	branch(t, c, broker.Delegation{ID: rootID, Expires: time.Now().Add(time.Hour)}, "pawl-tool-a")
	return c
}

func newClient(t *testing.T, cfg vault.Config) *vault.Client {
	t.Helper()
	c, err := vault.New(cfg)
	if err != nil {
		t.Fatalf("New() = %v", err)
	}
	t.Cleanup(c.Close)
	return c
}

func branch(t *testing.T, c *vault.Client, d broker.Delegation, policies ...string) broker.Handle {
	t.Helper()
	h, err := c.CreateDelegationToken(t.Context(), d, policies)
	if err != nil {
		t.Fatalf("CreateDelegationToken(%s, %v) = %v", d.ID, policies, err)
	}
	c.Activate(d.ID, h)
	return h
}

func child(t *testing.T, c *vault.Client, d broker.DelegationID, life time.Duration, policy string) broker.Handle {
	t.Helper()
	g := broker.Grant{ID: grantID, Delegation: d, Expires: time.Now().Add(life)}
	h, err := c.CreateStepToken(t.Context(), g, string(grantID), policy)
	if err != nil {
		t.Fatalf("CreateStepToken(%s, %q) = %v", d, policy, err)
	}
	return h
}

// plainMint returns a mint that takes the data of the response as the secret.
func plainMint(path broker.VaultPath) broker.Mint {
	return broker.Mint{Path: path, Data: map[string]any{"ttl": "60s"}, Leased: true, TTL: time.Minute,
		Finish: func(data map[string]any, _ time.Time) (broker.Finished, error) {
			raw, err := json.Marshal(data)
			return broker.Finished{Secret: broker.NewSecret(raw), Ref: "ref"}, err
		}}
}

// until polls until ok, which depends on another process.
func until(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %v", what, limit)
		case <-tick.C:
		}
	}
}
