package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/attest/workload"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestDoctor runs the doctor on a healthy broker, and then breaks one part per row.
func TestDoctor(t *testing.T) {
	t.Parallel()
	parts.NeedVault(t)
	parts.NeedPostgreSQL(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	env, err := dev.Start(ctx, dev.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer env.Close()
	logins := func() (n int) {
		conn, err := pgx.Connect(ctx, env.Database)
		if err != nil {
			t.Fatal("connecting to the database")
		}
		defer conn.Close(ctx)
		err = conn.QueryRow(ctx, "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'pawl-%' AND rolcanlogin").Scan(&n)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for logins() < 2 { // the broker's own
		if ctx.Err() != nil {
			t.Fatal("the broker has no logins in the database")
		}
	}
	before := logins()
	out, err := runDoctor(ctx, env.ConfigFile)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); logins() > before; <-tick.C { // Vault ends them in the background
		if time.Now().After(deadline) {
			t.Fatalf("the doctor left %d logins in the database", logins()-before)
		}
	}
	if !strings.Contains(out, "room for 68 logins at a time with 4 connections each") {
		t.Errorf("pawl doctor does not say for how many logins the server has room:\n%s", out)
	}
	if err != nil || strings.Contains(out, "WRONG") || strings.Count(out, "ok ") != 9+len(env.Config.Backends) {
		t.Fatalf("pawl doctor = %v\n%s\nwant everything ok", err, out)
	}
	if !strings.Contains(out, "the database is set up; ") {
		t.Errorf("pawl doctor printed\n%s\nwant that the database is set up", out)
	}
	checkDoctorsClock(ctx, t, env.Config)
	chmod := func(mode os.FileMode) func() error {
		return func() error { return os.Chmod(env.Config.Ledger, mode) }
	}
	vault := func(path string, data map[string]any) func() error {
		return func() error {
			c, err := env.Vault.Client()
			if err == nil {
				_, err = c.Logical().WriteWithContext(ctx, path, data)
			}
			return err
		}
	}
	fixed := parts.OwnPooler(t, parts.PoolerConfig{Program: "pgbouncer", FixedUser: true, Server: env.Postgres})
	pgpool := parts.OwnPooler(t, parts.PoolerConfig{Program: "pgpool", Server: env.Postgres})
	database, err := pgx.ParseConfig(env.Database)
	if err != nil {
		t.Fatal("the database's DSN does not parse")
	}
	connection := func(address, name string) func() error { // of Vault
		return vault("database/config/shop", map[string]any{"verify_connection": false,
			"connection_url": "postgresql://{{username}}:{{password}}@" + address + "/" + name + "?sslmode=disable"})
	}
	direct := connection(env.Postgres.Address(), database.Database)
	text, err := os.ReadFile(env.ConfigFile)
	if err != nil {
		t.Fatal(err)
	}
	dsn := func(address string) func() error { // of the broker
		_, from, _ := strings.Cut(env.Postgres.Address(), ":")
		_, to, _ := strings.Cut(address, ":")
		changed := strings.Replace(string(text), "port="+from, "port="+to, 1)
		return func() error { return os.WriteFile(env.ConfigFile, []byte(changed), 0o600) }
	}
	issuing := "read-only,issuing-certificates,ocsp-signing"
	bundle, away := env.Config.Policy.Bundle, filepath.Join(env.Dir, "away")
	for _, row := range []struct {
		name             string
		sabotage, repair func() error
		check, want      string
	}{
		{"database down", env.Postgres.Stop, func() error { return env.Postgres.Start(ctx) },
			"backend shop", "connection refused"},
		{"an authority without a list", vault("pki/issuer/default", map[string]any{"usage": issuing}),
			vault("pki/issuer/default", map[string]any{"usage": issuing + ",crl-signing"}), "revocation lists", "give its usage crl-signing"},
		{"Vault connects through PgBouncer", connection(fixed.Address(), database.Database), direct, "backend shop",
			"Vault's connection database/shop: " + fixed.Address() + " is PgBouncer: write the PostgreSQL server itself"},
		{"Vault connects through pgpool", connection(pgpool.Address(), database.Database), direct, "backend shop", "is pgpool"},
		{"Vault connects to another database", connection(env.Postgres.Address(), "postgres"), direct, "backend shop",
			"makes logins in database \"postgres\""},
		{"the broker connects through PgBouncer", dsn(fixed.Address()), dsn(env.Postgres.Address()), "backend shop",
			"dsn: " + fixed.Address() + " is PgBouncer, not to the server itself"},
		{"Vault sealed", func() error { return env.Vault.Seal(ctx) }, func() error { return env.Vault.Unseal(ctx) },
			"vault", "is sealed"},
		{"ledger readable by others", chmod(0o644), chmod(0o600), "ledger", "only the broker's user"},
		{"bundle gone", func() error { return os.Rename(bundle, away) }, func() error { return os.Rename(away, bundle) },
			"policy bundle", "no such file"},
		{"identities gone", env.Identities.Close, nil, "identity", ""},
	} {
		if err := row.sabotage(); err != nil {
			t.Fatal(err)
		}
		out, err := runDoctor(ctx, env.ConfigFile)
		found := failedLine(out, row.check)
		if err == nil || found == "" || !strings.Contains(found, row.want) || !strings.Contains(out, "hint: ") {
			t.Errorf("%s: pawl doctor = %v\n%s\nwant %q wrong, with %q", row.name, err, out, row.check, row.want)
		}
		if row.repair != nil {
			if err := row.repair(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// checkDoctorsClock holds that the doctor names a clock that is five seconds off, and none that is two seconds off.
func checkDoctorsClock(ctx context.Context, t *testing.T, c wire.Config) {
	t.Helper()
	for _, ahead := range []time.Duration{-5 * time.Second, -2 * time.Second, 2 * time.Second, 5 * time.Second} {
		d := doctor{c: c, out: io.Discard, now: func() time.Time { return time.Now().Add(ahead) }}
		for _, check := range []func(context.Context) (string, error){d.identity, d.vaultRights} {
			if _, err := check(ctx); err != nil {
				t.Fatal(err)
			}
		}
		found, err := d.clock(ctx)
		if off := ahead.Abs() > 3*time.Second; (err != nil) != off || off && !strings.Contains(err.Error(), "Vault's clock is ") {
			t.Errorf("with this machine %v ahead, the doctor's check of the clock is %q, %v", ahead, found, err)
		}
		if err := d.vault.Logout(ctx); err != nil {
			t.Error(err)
		}
		d.vault.Close()
	}
}

// TestDoctorOnSelfTest holds that the doctor reports the result of the self-test from the broker's metrics.
func TestDoctorOnSelfTest(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "pawl") // t.TempDir is too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a temporary directory
	var c wire.Config
	c.Listen.Socket, c.SelfTest = filepath.Join(dir, "admin.sock"), wire.SelfTest{Every: time.Minute, Tool: "notes.read"}
	d := doctor{c: c}
	if found, err := d.selfTest(t.Context()); err != nil || found != "the broker is not running" {
		t.Errorf("selfTest without a broker = %q, %v", found, err)
	}
	l, err := net.Listen("unix", c.Listen.Socket)
	if err != nil {
		t.Fatal(err)
	}
	page := ""
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/metrics" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		fmt.Fprint(w, page)
	}))
	_ = server.Listener.Close() // the socket replaces it
	server.Listener = l
	server.Start()
	t.Cleanup(server.Close)
	for text, want := range map[string]string{
		"x 1\npawl_selftest_ok 1\npawl_selftest_success_timestamp_seconds 1.9e+09\n": "passed",
		"x 1\npawl_selftest_ok 1\npawl_selftest_success_timestamp_seconds 0\n":       "the first self-test has not run yet",
		"x 1\npawl_selftest_ok 0\npawl_selftest_success_timestamp_seconds 1.9e+09\n": "",
		"x 1\n": "",
	} {
		page = text
		if found, err := d.selfTest(t.Context()); found != want || (err == nil) != (want != "") {
			t.Errorf("selfTest with %q = %q, %v, want %q", text, found, err, want)
		}
	}
}

// TestDoctorOnIdentity holds the answers of the doctor about the identities that the Workload API gives the broker's process.
func TestDoctorOnIdentity(t *testing.T) {
	t.Parallel()
	var given []string
	var identities *workload.Server
	identities, err := workload.New(workload.Config{TrustDomain: "example.org",
		Identify: func(workload.Peer) (ids []spiffeid.ID) {
			for _, path := range given {
				ids = append(ids, spiffeid.RequireFromString("spiffe://example.org"+path))
			}
			return ids
		}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = identities.Close() }) // its sockets end with it
	dir, err := os.MkdirTemp("", "pawl")         // t.TempDir is too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a temporary directory
	address, err := identities.Listen(filepath.Join(dir, "workload.sock"))
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		given []string
		want  string // spiffe_id
		ok    bool
		text  string
	}{
		{[]string{"/pawl"}, "", true, "spiffe://example.org/pawl until"},
		{[]string{"/other", "/pawl"}, "", false, "spiffe://example.org/other and spiffe://example.org/pawl, and chance decides which is first: set spiffe_id"},
		{[]string{"/other", "/pawl"}, "spiffe://example.org/pawl", true, "spiffe://example.org/pawl until"},
		{[]string{"/other"}, "spiffe://example.org/pawl", false, "and not spiffe://example.org/pawl, which was chosen"},
	} {
		given = row.given
		d := doctor{c: wire.Config{TrustDomains: []string{"example.org"}, WorkloadAPI: address, SPIFFEID: row.want}}
		found, err := d.identity(t.Context())
		if err != nil {
			found = err.Error()
		}
		if (err == nil) != row.ok || !strings.Contains(found, row.text) {
			t.Errorf("identity with %q and spiffe_id %q = %q, %v, want ok %v and %q", row.given, row.want, found, err, row.ok,
				row.text)
		}
	}
}

func runDoctor(ctx context.Context, file string) (string, error) {
	var out strings.Builder
	c := command()
	c.SetArgs([]string{"doctor", "--config", file})
	c.SetOut(&out)
	err := c.ExecuteContext(ctx)
	return out.String(), err
}

// failedLine returns the line of a failed check; empty when the check passed.
func failedLine(out, check string) string {
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(line, "WRONG  "+check); ok && strings.HasPrefix(rest, " ") {
			return line
		}
	}
	return ""
}
