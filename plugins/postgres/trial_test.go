package postgres_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// TestTry uses secrets as an agent does. Each row changes one thing between the secret and its server.
func TestTry(tt *testing.T) {
	t := ownTarget(tt)
	fixed := parts.OwnPooler(tt, parts.PoolerConfig{Program: "pgbouncer", FixedUser: true, Server: t.server})
	through := parts.OwnPooler(tt, parts.PoolerConfig{Program: "pgbouncer", Server: t.server})
	standby := parts.OwnStandby(tt, t.server)
	r := &replica{target: t, standby: standby, there: pool(tt, standby.DSN(t.name))}
	orders, filtered := `{"tables":["orders"],"verbs":["select"]}`,
		`{"tables":["orders"],"verbs":["select","insert"],"filter_column":"customer","filter_value":"1"}`
	t.exec("CREATE TABLE open (id int); GRANT SELECT ON open TO PUBLIC")
	group := func(c credential) string { return `"pawl-shape-` + strings.Split(c.User, "-")[2] + `"` }
	for _, row := range []struct {
		name, args, at string
		change         func(credential)
		want           string // of the error; empty: everything is as it was minted
		works          string // what works after the end
	}{
		{"as minted", orders, t.server.Address(), nil, "", ""},
		{"with a filter", filtered, t.server.Address(), nil, "", ""},
		{"write only", `{"tables":["t1"],"verbs":["insert"]}`, t.server.Address(), nil, "", ""},
		{"through a pooler", orders, through.Address(), nil, "", ""},
		{"through a pooler with a fixed user", orders, fixed.Address(), nil, "not the secret's login", "still works"},
		{"at a standby that is not named", orders, standby.Address(), nil, "another server", ""},
		{"with more rights", orders, t.server.Address(),
			func(c credential) { t.exec("GRANT SELECT ON salaries TO " + group(c)) }, "select on public.salaries", ""},
		{"with a column more", orders, t.server.Address(),
			func(c credential) { t.exec("GRANT UPDATE (note) ON orders TO " + group(c)) }, "update on public.orders", ""},
		{"without its right", `{"tables":["t2"]}`, t.server.Address(),
			func(c credential) {
				t.exec(`DO $$ DECLARE g name; BEGIN SET LOCAL ROLE pawl_maker;
					FOR g IN SELECT rolname FROM pg_roles
						WHERE rolname LIKE 'pawl-table-%' AND has_table_privilege(oid, 't2', 'select')
					LOOP EXECUTE format('REVOKE SELECT ON t2 FROM %I', g); END LOOP; END $$`)
			}, "reading public.t2, which the step may: SQLSTATE 42501", ""},
	} {
		g := newGrant(row.args)
		m, display, err := t.backend.Prepare(t.Context(), tool(), g)
		if err != nil {
			t.Fatal(err)
		}
		c, secret := t.vaultMint(g, m, display)
		if row.change != nil {
			row.change(c)
		}
		r.replay()
		secret = []byte(strings.Replace(string(secret), t.server.Address(), row.at, 1))
		ended, err := t.backend.Try(t.Context(), tool(), g.Args, secret)
		if (err == nil) != (row.want == "") || err != nil && !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: Try = %v, want %q", row.name, err, row.want)
		}
		t.sever(c.grant)
		r.replay()
		err = ended(t.Context())
		if (err == nil) != (row.works == "") && !strings.Contains(row.at, standby.Address()) {
			t.Errorf("%s: after Sever: %v, want %q", row.name, err, row.works)
		}
	}
}

// TestTryUnended checks that a session that was not ended is noticed.
func TestTryUnended(tt *testing.T) {
	t := newTarget(tt)
	g := newGrant(`{"tables":["orders"]}`)
	m, display, err := t.backend.Prepare(t.Context(), tool(), g)
	if err != nil {
		t.Fatal(err)
	}
	c, secret := t.vaultMint(g, m, display)
	for _, want := range []string{"session", "logs in"} {
		ended, err := t.backend.Try(t.Context(), tool(), g.Args, secret)
		if err != nil {
			t.Fatal(err)
		}
		if want == "logs in" {
			t.exec("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", c.User)
			t.awaitNone("SELECT count(*) FROM pg_stat_activity WHERE usename = $1", c.User)
		}
		if err := ended(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ended = %v, want an error with %q", err, want)
		}
	}
}

// vaultMint makes the login that Vault would make, and returns the secret as the agent gets it.
func (t *target) vaultMint(g broker.Grant, m broker.Mint, display string) (credential, []byte) {
	t.Helper()
	name, password := "pawl-"+display+"-"+random8(), "a password that is long enough"
	verifier, err := postgres.Verifier(password)
	if err == nil {
		_, err = t.vault.Exec(t.Context(), "SELECT pawl.grant_login($1, $2, $3)", name, verifier, time.Now().Add(m.TTL))
	}
	if err != nil {
		t.Fatal(err)
	}
	f, err := m.Finish(map[string]any{"username": name, "password": password}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	secret := f.Secret.Reveal()
	if !json.Valid(secret) {
		t.Fatal("the secret is not JSON")
	}
	return t.read(g, f), secret
}
