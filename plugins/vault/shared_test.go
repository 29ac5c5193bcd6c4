package vault_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/vault"
)

// shared returns the delegation's token for a step, and the mint as the engine sends it with that token.
func shared(t *testing.T, c *vault.Client, d broker.DelegationID, policy string, m broker.Mint) (broker.Handle, broker.Mint) {
	t.Helper()
	g := broker.Grant{ID: grantID, Delegation: d, Tool: "keys", Expires: time.Now().Add(time.Minute)}
	h, err := c.DelegationToken(g, policy)
	if err != nil {
		t.Fatalf("DelegationToken(%s, %q) = %v", d, policy, err)
	}
	m.Leased, m.NoLease = false, true
	m.Shared = &broker.SharedToken{Grant: g.ID, Tool: g.Tool, Policy: policy, Expires: g.Expires}
	return h, m
}

// newKeys gives the site a kv engine with one secret, and a tool that reads it.
func (s *site) newKeys(t *testing.T) (policy string, m broker.Mint) {
	t.Helper()
	mount := "kv-" + s.pki
	policy = "pawl-tool-" + mount
	s.write(t, "sys/mounts/"+mount, map[string]any{"type": "kv", "options": map[string]any{"version": "2"}})
	until(t, 10*time.Second, "the kv engine is ready", func() bool {
		return s.admin.Write(t.Context(), vault.Write{Method: "POST", Path: mount + "/data/app",
			Data: map[string]any{"data": map[string]any{"key": "k"}}}) == nil
	})
	s.setup.Tools = append(s.setup.Tools, vault.Access{Policy: policy, Path: brokertest.Path(mount + "/data/app")})
	if _, err := vault.Setup(t.Context(), s.admin, s.setup); err != nil {
		t.Fatalf("Setup() = %v", err)
	}
	m = plainMint(brokertest.Path(mount + "/data/app"))
	m.Data, m.TTL = nil, 0
	return policy, m
}

// auditLine is what the test reads of a line of Vault's audit log.
type auditLine struct {
	Type    string
	Request struct {
		ID      string
		Path    string
		Headers map[string][]string
	}
}

func auditLines(t *testing.T, path string) (lines []auditLine) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range bytes.Split(bytes.TrimSpace(raw), []byte("\n")) {
		var l auditLine
		if err := json.Unmarshal(text, &l); err != nil {
			t.Fatalf("a line of Vault's audit log: %v", err)
		}
		lines = append(lines, l)
	}
	return lines
}

// TestRealSharedToken mints with a delegation's token. It costs Vault one request, whose id in Vault's audit log is the
// one in the lease. The header with the grant's id is there too, without a setting.
func TestRealSharedToken(t *testing.T) {
	s := newSite(t, parts.OwnVault(t, parts.VaultConfig{}))
	keys, m := s.newKeys(t)
	c := newClient(t, s.config())
	branch(t, c, delegation(rootID, ""), keys, s.b())
	branch(t, c, delegation(childID, rootID), keys)
	path := filepath.Join(t.TempDir(), "audit")
	s.write(t, "sys/audit/file", map[string]any{"type": "file", "options": map[string]string{"file_path": path}})
	before := len(auditLines(t, path))
	h, m := shared(t, c, childID, keys, m)
	lease, secret, err := c.Mint(t.Context(), h, m)
	if err != nil || secret.Empty() || lease.Request == "" || lease.ID != "" {
		t.Fatalf("Mint() = %+v, %v; want a secret without a lease, and the id of the request", lease, err)
	}
	lines := auditLines(t, path)[before:]
	if len(lines) != 2 || lines[0].Type != "request" || lines[1].Type != "response" {
		t.Fatalf("Vault's audit log has %+v for the mint, want one request and its response", lines)
	}
	for _, l := range lines {
		if l.Request.ID != lease.Request || l.Request.Path != m.Path.String() ||
			!slices.Equal(l.Request.Headers["x-correlation-id"], []string{string(grantID)}) {
			t.Errorf("Vault's audit log has %+v, want request %s with the grant's id", l, lease.Request)
		}
	}
}

// TestRealSharedTokenReach checks what a mint with a delegation's token can reach: its delegation's tools, and never a
// secret with a lease.
func TestRealSharedTokenReach(t *testing.T) {
	s := newSite(t, parts.NeedVault(t))
	keys, m := s.newKeys(t)
	c := newClient(t, s.config())
	root := branch(t, c, delegation(rootID, ""), keys, s.a(), s.b())
	branch(t, c, delegation(childID, rootID), keys, s.a())
	g := broker.Grant{ID: grantID, Delegation: childID, Expires: time.Now().Add(time.Minute)}
	if _, err := c.DelegationToken(g, s.b()); !errors.Is(err, vault.ErrWider) || !errors.Is(err, broker.Denied) {
		t.Errorf("DelegationToken() for a tool of the parent's alone = %v, want ErrWider", err)
	}
	g.Delegation = "dl000000000000000000000004"
	if _, err := c.DelegationToken(g, keys); !errors.Is(err, broker.ErrNoParent) {
		t.Errorf("DelegationToken() of an unknown delegation = %v, want ErrNoParent", err)
	}
	h, outside := shared(t, c, childID, keys, s.mint("b"))
	if _, _, err := c.Mint(t.Context(), h, outside); !errors.Is(err, broker.ErrNotMinted) || !errors.Is(err, vault.ErrForbidden) {
		t.Errorf("Mint() at the path of a tool outside the delegation = %v, want ErrForbidden", err)
	}
	h, leased := shared(t, c, childID, s.a(), s.mint("a"))
	if _, secret, err := c.Mint(t.Context(), h, leased); err == nil || errors.Is(err, broker.ErrNotMinted) || !secret.Empty() {
		t.Errorf("Mint() of a secret with a lease = %v, want an unknown outcome", err)
	}
	if left, err := c.Leases(t.Context(), leased.Path); err != nil || len(left) > 0 {
		t.Errorf("Leases() after it = %v, %v; want none", left, err)
	}
	leased.NoLease = false
	if _, _, err := c.Mint(t.Context(), h, leased); !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("Mint() of a tool with leases = %v, want ErrNotMinted", err)
	}
	if left, err := c.Leases(t.Context(), leased.Path); err != nil || len(left) > 0 {
		t.Errorf("Leases() after it = %v, %v; want none", left, err)
	}
	// Another process, or an operator, revokes the token. Vault then refuses the mint, and it is not sent again.
	other := s.rootClient(t)
	if err := other.Kill(t.Context(), root.Accessor); err != nil {
		t.Fatal(err)
	}
	h, m = shared(t, c, childID, keys, m)
	if _, _, err := c.Mint(t.Context(), h, m); !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("Mint() with a revoked token = %v, want ErrNotMinted", err)
	}
	if c.HasToken(childID) {
		t.Error("HasToken() after Vault refused it = true, want false: the next step makes another")
	}
}
