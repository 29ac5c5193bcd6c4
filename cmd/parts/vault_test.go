package parts_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/pawlsec/pawl/cmd/parts"
)

// startContext bounds the start of any server in these tests.
func startContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func rootClient(t *testing.T, server *parts.VaultServer) *api.Client {
	t.Helper()
	client, err := server.Client()
	if err != nil {
		t.Fatalf("Client() = %v, want nil", err)
	}
	return client
}

func TestVaultHasTheEngines(t *testing.T) {
	ctx, client := startContext(t), rootClient(t, parts.NeedVault(t))
	for _, engine := range []string{"kv", "database", "pki", "ssh", "transit"} {
		if err := client.Sys().MountWithContext(ctx, "have-"+engine, &api.MountInput{Type: engine}); err != nil {
			t.Errorf("mounting engine %s: %v", engine, err)
		}
	}
	for _, method := range []string{"cert", "jwt", "approle"} {
		err := client.Sys().EnableAuthWithOptionsWithContext(ctx, "have-"+method, &api.EnableAuthOptions{Type: method})
		if err != nil {
			t.Errorf("enabling auth method %s: %v", method, err)
		}
	}
}

func TestVaultMintsPostgreSQLRoles(t *testing.T) {
	ctx, client, postgres := startContext(t), rootClient(t, parts.NeedVault(t)), parts.NeedPostgreSQL(t)
	if err := client.Sys().MountWithContext(ctx, "mint", &api.MountInput{Type: "database"}); err != nil {
		t.Fatalf("mounting: %v", err)
	}
	writes := []struct {
		path string
		data map[string]any
	}{
		{"mint/config/here", map[string]any{
			"plugin_name":    "postgresql-database-plugin",
			"allowed_roles":  "*",
			"connection_url": "postgres://{{username}}:{{password}}@" + postgres.Address() + "/postgres?sslmode=disable",
			"username":       "postgres", "password": postgres.Password(),
		}},
		{"mint/roles/reader", map[string]any{
			"db_name":             "here",
			"creation_statements": `CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}'`,
		}},
	}
	for _, w := range writes {
		if _, err := client.Logical().WriteWithContext(ctx, w.path, w.data); err != nil {
			t.Fatalf("writing %s: %v", w.path, err)
		}
	}
	secret, err := client.Logical().ReadWithContext(ctx, "mint/creds/reader")
	if err != nil || secret == nil {
		t.Fatalf("minting: secret %v, error %v", secret != nil, err)
	}
	role, _ := secret.Data["username"].(string)
	password, _ := secret.Data["password"].(string)
	if err := ping(ctx, postgres.DSNFor(role, password, "postgres")); err != nil {
		t.Errorf("logging in with the minted role: %v", err)
	}
	if err := client.Sys().RevokeWithContext(ctx, secret.LeaseID); err != nil {
		t.Fatalf("revoking: %v", err)
	}
	eventually(t, "the minted role refused", func() bool {
		return ping(ctx, postgres.DSNFor(role, password, "postgres")) != nil
	})
}

func TestVaultKeepsStateAcrossAKill(t *testing.T) {
	ctx, server := startContext(t), parts.OwnVault(t, parts.VaultConfig{Persistent: true})
	if err := rootClient(t, server).Sys().MountWithContext(ctx, "kept", &api.MountInput{Type: "kv"}); err != nil {
		t.Fatalf("mounting: %v", err)
	}
	address, token := server.Address(), server.RootToken()
	if err := server.Kill(); err != nil {
		t.Fatalf("Kill() = %v, want nil", err)
	}
	if reachable(address) {
		t.Errorf("%s answers after Kill", address)
	}
	if err := server.Restart(ctx); err != nil {
		t.Fatalf("Restart() = %v, want nil", err)
	}
	if server.Address() != address || server.RootToken() != token {
		t.Errorf("address or root token changed across a persistent Restart")
	}
	mounts, err := rootClient(t, server).Sys().ListMountsWithContext(ctx)
	if err != nil {
		t.Fatalf("listing mounts: %v", err)
	}
	if mounts["kept/"] == nil {
		t.Errorf("mounts after Restart lack kept/")
	}
}

func TestVaultSealsPausesAndCloses(t *testing.T) {
	ctx := startContext(t)
	server, err := parts.Vault(ctx, parts.VaultConfig{Binaries: parts.Binaries{NoBuild: true}})
	if errors.Is(err, parts.ErrMissing) {
		parts.NeedVault(t) // skips, or fails where Vault is required
	}
	if err != nil {
		t.Fatalf("Vault() = %v, want nil", err)
	}
	defer func() {
		if err := server.Close(); err != nil {
			t.Errorf("Close() = %v, want nil", err)
		}
		if reachable(server.Address()) {
			t.Errorf("%s answers after Close", server.Address())
		}
		if exists(server.CAFile()) {
			t.Errorf("%s exists after Close", server.CAFile())
		}
	}()
	client := rootClient(t, server)
	if err := server.Seal(ctx); err != nil {
		t.Fatalf("Seal() = %v, want nil", err)
	}
	if _, err := client.Auth().Token().LookupSelfWithContext(ctx); err == nil {
		t.Errorf("a sealed Vault answers")
	}
	if err := server.Unseal(ctx); err != nil {
		t.Fatalf("Unseal() = %v, want nil", err)
	}
	if err := server.Pause(); err != nil {
		t.Fatalf("Pause() = %v, want nil", err)
	}
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if _, err := client.Sys().HealthWithContext(short); err == nil {
		t.Errorf("a paused Vault answers")
	}
	if err := server.Continue(); err != nil {
		t.Fatalf("Continue() = %v, want nil", err)
	}
	if _, err := client.Auth().Token().LookupSelfWithContext(ctx); err != nil {
		t.Errorf("after Continue: %v", err)
	}
}

// reachable reports whether a server listens at the URL or host:port.
func reachable(address string) bool {
	conn, err := net.Dial("tcp", strings.TrimPrefix(address, "https://"))
	if err != nil {
		return false
	}
	_ = conn.Close() // only the connection counts
	return true
}

func port(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

func TestVaultStandbyForwards(t *testing.T) {
	ctx, server := startContext(t), parts.OwnVault(t, parts.VaultConfig{Standby: true})
	if err := server.StepDown(ctx); err != nil {
		t.Fatalf("StepDown() = %v, want nil", err)
	}
	client := rootClient(t, server)
	if err := client.Sys().MountWithContext(ctx, "forwarded", &api.MountInput{Type: "kv"}); err != nil {
		t.Errorf("mounting at a standby: %v", err)
	}
	if health, err := client.Sys().HealthWithContext(ctx); err != nil || !health.Standby {
		t.Errorf("health = %+v, %v, want a standby", health, err)
	}
}
