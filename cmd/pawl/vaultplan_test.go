package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/pawlsec/pawl/attest/workload"
	"github.com/pawlsec/pawl/cmd/wire"
	"github.com/pawlsec/pawl/plugins/vault"
)

// TestVaultPlanForEachLogin prints the plan for each kind of login. It has the auth method of vault.auth at vault.mount, and
// no other.
func TestVaultPlanForEachLogin(t *testing.T) {
	t.Parallel()
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
	config, _, _ := wiredConfig(t, dir, identities)
	file := filepath.Join(dir, "pawl.yaml")
	for _, row := range []struct {
		vault wire.Vault
		flags []string
		want  map[string]string // a path of the plan that the row alone has, and a text in its data
		err   string
	}{
		{wire.Vault{}, nil, map[string]string{"auth/cert/certs/pawl-broker": "BEGIN CERTIFICATE"}, ""},
		{wire.Vault{Mount: "spiffe"}, nil, map[string]string{"sys/auth/spiffe": `"cert"`, "auth/spiffe/certs/pawl-broker": "BEGIN CERTIFICATE"}, ""},
		{wire.Vault{Auth: "jwt", Audience: "vault"}, nil,
			map[string]string{"auth/jwt/config": "BEGIN PUBLIC KEY", "auth/jwt/role/pawl-broker": `"bound_audiences":["vault"]`}, ""},
		{wire.Vault{Auth: "jwt", Audience: "vault", Mount: "workloads", Role: "our-broker"}, []string{"--jwks-url", "https://spire/keys"},
			map[string]string{"sys/auth/workloads": `"jwt"`, "auth/workloads/config": "https://spire/keys",
				"auth/workloads/role/our-broker": `"bound_subject":"spiffe://example.org/pawl"`}, ""},
		{wire.Vault{}, []string{"--jwks-url", "https://spire/keys"}, nil, "vault.auth jwt"},
	} {
		row.vault.Address, row.vault.CA = config.Vault.Address, config.Vault.CA
		config.Vault = row.vault
		raw, err := yaml.Marshal(config)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := runPawl(t.Context(), append([]string{"vault", "plan", "--config", file, "--broker", "spiffe://example.org/pawl"}, row.flags...)...)
		if row.err != "" {
			if err == nil || !strings.Contains(err.Error(), row.err) {
				t.Errorf("pawl vault plan %q = %q, %v, want an error with %q", row.flags, out, err, row.err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		auth := map[string]string{}
		for line := range strings.Lines(out) {
			var w vault.Write
			if err := json.Unmarshal([]byte(line), &w); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			if strings.Contains(w.Path, "auth/") && !strings.HasPrefix(w.Path, "auth/token/") {
				auth[w.Path] = line
			}
		}
		for path, text := range row.want {
			if !strings.Contains(auth[path], text) {
				t.Errorf("with %+v the plan has at %q %q, want %q", row.vault, path, auth[path], text)
			}
		}
		method, other := "cert", "/role/"
		if row.vault.Auth == "jwt" {
			method, other = "jwt", "/certs/"
		}
		for path, line := range auth {
			if strings.Contains(path, other) || strings.HasPrefix(path, "sys/auth/") && !strings.Contains(line, `"type":"`+method+`"`) {
				t.Errorf("with %+v the plan has %q too: %s", row.vault, path, line)
			}
		}
	}
}
