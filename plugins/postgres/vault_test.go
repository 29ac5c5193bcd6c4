package postgres_test

import (
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// TestRealVault goes the whole way with a real Vault: what Writes says is enough for it to make and end
// both kinds of login.
func TestRealVault(tt *testing.T) {
	vault, err := parts.NeedVault(tt).Client()
	if err != nil {
		tt.Fatal(err)
	}
	t := newTarget(tt)
	const mount = "database-of-plugin-postgres"
	write := func(path string, data map[string]any) map[string]any {
		t.Helper()
		answer, err := vault.Logical().WriteWithContext(t.Context(), path, data)
		if err != nil {
			t.Fatalf("writing %s: %v", path, err)
		}
		if answer == nil {
			return nil
		}
		return answer.Data
	}
	write("sys/mounts/"+mount, map[string]any{"type": "database"})
	for i, w := range (postgres.VaultSetup{Mount: mount, Connection: t.name, Address: t.server.Address(), Database: t.name, SSLMode: "disable",
		Tools: map[string]time.Duration{"pawl-app": 0}, Service: map[postgres.Purpose]string{postgres.Revoker: "pawl-revoker"}}).Writes() {
		if i == 0 {
			w.Data["password"] = vaultPassword
		}
		write(strings.Join(w.Path, "/"), w.Data)
	}
	g := newGrant(`{"tables":["orders"],"verbs":["select"]}`)
	m, display, err := t.backend.Prepare(t.Context(), tool(), g)
	if err != nil {
		t.Fatal(err)
	}
	token, err := vault.Logical().WriteWithContext(t.Context(), "auth/token/create", map[string]any{"display_name": display, "ttl": "1m"})
	if err != nil {
		t.Fatal(err)
	}
	root := vault.Token()
	vault.SetToken(token.Auth.ClientToken)
	lease, err := vault.Logical().ReadWithContext(t.Context(), mount+"/creds/pawl-app")
	if err != nil {
		t.Fatalf("minting: %v", err)
	}
	// A step's token cannot make a login of the broker's, whatever its policy says: here it is root's.
	if _, err := vault.Logical().ReadWithContext(t.Context(), mount+"/creds/pawl-revoker"); err == nil {
		t.Error("a step's token makes a revoker's login")
	}
	vault.SetToken(root)
	f, err := m.Finish(lease.Data, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	c := t.read(g, f)
	if _, err := t.login(c).Exec(t.Context(), "SELECT * FROM orders"); err != nil {
		t.Errorf("SELECT with Vault's credential = %v, want no error", err)
	}
	if life := time.Duration(lease.LeaseDuration) * time.Second; life > m.TTL {
		t.Errorf("lease = %v, want at most %v", life, m.TTL)
	}
	conn := t.cursor(c)
	if _, err := vault.Logical().WriteWithContext(t.Context(), "sys/leases/renew", map[string]any{"lease_id": lease.LeaseID}); err == nil {
		t.Error("Vault renews the lease: a login must not outlive its step")
	}
	write("sys/leases/revoke", map[string]any{"lease_id": lease.LeaseID, "sync": true})
	if e := t.prove(g)[0]; e.Outcome != broker.OutcomeDead || e.Answer != "no role, no session" || !t.cutOff(conn) {
		t.Errorf("Prove after Vault's revocation = %v %q, want no role", e.Outcome, e.Answer)
	}
	service, err := vault.Logical().ReadWithContext(t.Context(), mount+"/creds/pawl-revoker")
	if err != nil {
		t.Fatalf("minting for the broker: %v", err)
	}
	user, password := service.Data["username"].(string), service.Data["password"].(string)
	if _, err := pool(t.T, t.server.DSNFor(user, password, t.name)).Exec(t.Context(), "SELECT * FROM pawl.inspect(NULL)"); err != nil {
		t.Errorf("inspect with Vault's credential = %v, want no error", codeOf(err))
	}
	write("sys/leases/revoke", map[string]any{"lease_id": service.LeaseID, "sync": true})
	if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname = $1", user); n != 0 {
		t.Errorf("roles called %s = %d, want 0", user, n)
	}
	write("database-of-plugin-postgres/rotate-root/"+t.name, nil)
}
