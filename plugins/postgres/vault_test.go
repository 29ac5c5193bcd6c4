package postgres_test

import (
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// engine is a real Vault with a database engine for the target, set up with VaultSetup.Writes.
type engine struct {
	*target
	*api.Client
	mount string
}

func newEngine(tt *testing.T, mount string) *engine {
	vault, err := parts.NeedVault(tt).Client()
	if err != nil {
		tt.Fatal(err)
	}
	e := &engine{newTarget(tt), vault, mount}
	e.write("sys/mounts/"+mount, map[string]any{"type": "database"})
	setup := postgres.VaultSetup{Mount: mount, Connection: e.name, Address: e.server.Address(), Database: e.name,
		SSLMode: "disable", Tools: map[string]time.Duration{"pawl-app": 0},
		Service: map[postgres.Purpose]string{postgres.Revoker: "pawl-revoker"}}
	writes, err := setup.Writes()
	if err != nil {
		tt.Fatal(err)
	}
	for i, w := range writes {
		if i == 0 {
			w.Data["password"] = vaultPassword
		}
		e.write(w.Path.String(), w.Data)
	}
	return e
}

func (e *engine) write(path string, data map[string]any) map[string]any {
	e.Helper()
	answer, err := e.Logical().WriteWithContext(e.Context(), path, data)
	if err != nil {
		e.Fatalf("writing %s: %v", path, err)
	}
	if answer == nil {
		return nil
	}
	return answer.Data
}

// step makes a step's token as the broker does and returns a client with it.
func (e *engine) step(display string) (*api.Client, error) {
	token, err := e.Logical().WriteWithContext(e.Context(), "auth/token/create",
		map[string]any{"display_name": display, "ttl": "1m"})
	if err != nil {
		return nil, err
	}
	c, err := e.Clone()
	if err == nil {
		c.SetToken(token.Auth.ClientToken)
	}
	return c, err
}

// TestRealMintMany makes 1,200 logins with Vault's database engine, on 5 tables each and from 8 concurrent callers.
// None may fail, and each must have a lease.
func TestRealMintMany(tt *testing.T) {
	e := newEngine(tt, "database-of-many")
	grants := make([]broker.Grant, 1200)
	start := time.Now()
	each(len(grants), 8, func(i int) {
		args := `{"tables":["t1","t2","t3","t4","t5"],"verbs":["select"]}`
		if i%2 == 1 {
			args = `{"tables":["t1","t2","t3","t4","t5"]}`
		}
		grants[i] = newGrant(args)
		m, display, err := e.backend.Prepare(e.Context(), tool(), grants[i])
		if err != nil {
			e.Errorf("Prepare %d: %v", i, err)
			return
		}
		c, err := e.step(display)
		if err != nil {
			e.Errorf("token %d: %v", i, err)
			return
		}
		lease, err := c.Logical().ReadWithContext(e.Context(), e.mount+"/creds/pawl-app")
		if err != nil {
			e.Errorf("mint %d: %v", i, err)
			return
		}
		if f, err := m.Finish(lease.Data, time.Time{}); err != nil || f.Secret.Empty() || !m.Leased || lease.LeaseID == "" {
			e.Errorf("mint %d: lease %q, %v", i, lease.LeaseID, err)
		}
	})
	e.Logf("1200 mints through Vault in %v", time.Since(start))
	const logins = "SELECT count(*) FROM pawl.logins l JOIN pg_roles r ON r.oid = l.role WHERE r.rolcanlogin"
	if n := e.count(logins); n != 1200 {
		e.Errorf("logins = %d, want 1200", n)
	}
	e.sever(grants...) // Vault would take a minute
	if n := e.count(logins); n != 0 {
		e.Errorf("logins after Sever = %d, want 0", n)
	}
}

// TestRealVault checks with a real Vault that VaultSetup.Writes is sufficient to make and end both kinds of login.
func TestRealVault(tt *testing.T) {
	t := newEngine(tt, "database-of-plugin-postgres")
	vault, mount, write := t.Client, t.mount, t.write
	g := newGrant(`{"tables":["orders"],"verbs":["select"]}`)
	m, display, err := t.backend.Prepare(t.Context(), tool(), g)
	if err != nil {
		t.Fatal(err)
	}
	step, err := t.step(display)
	if err != nil {
		t.Fatal(err)
	}
	lease, err := step.Logical().ReadWithContext(t.Context(), mount+"/creds/pawl-app")
	if err != nil {
		t.Fatalf("minting: %v", err)
	}
	// A step's token cannot make a login of the broker, even with the root policy as here.
	if _, err := step.Logical().ReadWithContext(t.Context(), mount+"/creds/pawl-revoker"); err == nil {
		t.Error("a step's token made a revoker's login, want an error")
	}
	f, err := m.Finish(lease.Data, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	c := t.read(g, f)
	if _, err := t.login(c).Exec(t.Context(), "SELECT * FROM orders"); err != nil {
		t.Errorf("SELECT with Vault's credential = %v, want nil", err)
	}
	if life := time.Duration(lease.LeaseDuration) * time.Second; life > m.TTL {
		t.Errorf("lease = %v, want at most %v", life, m.TTL)
	}
	conn := t.cursor(c)
	_, err = vault.Logical().WriteWithContext(t.Context(), "sys/leases/renew", map[string]any{"lease_id": lease.LeaseID})
	if err == nil {
		t.Error("renewing the lease = nil, want an error: a login must not outlive its step")
	}
	write("sys/leases/revoke", map[string]any{"lease_id": lease.LeaseID, "sync": true})
	if e := t.prove(g)[0]; e.Outcome != broker.OutcomeDead || e.Answer != "no role, no session" || !t.sessionEnded(conn) {
		t.Errorf("Prove after Vault's revocation = %v %q, want no role", e.Outcome, e.Answer)
	}
	service, err := vault.Logical().ReadWithContext(t.Context(), mount+"/creds/pawl-revoker")
	if err != nil {
		t.Fatalf("minting for the broker: %v", err)
	}
	user, password := service.Data["username"].(string), service.Data["password"].(string)
	revoker := pool(tt, t.server.DSNFor(user, password, t.name))
	if _, err := revoker.Exec(t.Context(), "SELECT * FROM pawl.inspect(NULL)"); err != nil {
		t.Errorf("inspect with Vault's credential = %v, want nil", sqlState(err))
	}
	t.exec("ALTER DATABASE " + t.name + " SET default_transaction_read_only = on") // its logins must end nevertheless
	write(mount+"/reset/"+t.name, nil)
	write("sys/leases/revoke", map[string]any{"lease_id": service.LeaseID, "sync": true})
	t.exec("ALTER DATABASE " + t.name + " RESET default_transaction_read_only")
	write(mount+"/reset/"+t.name, nil)
	if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname = $1", user); n != 0 {
		t.Errorf("roles named %s = %d, want 0", user, n)
	}
	write(mount+"/rotate-root/"+t.name, nil)
}
