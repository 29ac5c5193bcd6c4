package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestDoctor runs the doctor on a healthy broker, and then breaks one part per row.
func TestDoctor(t *testing.T) {
	parts.NeedVault(t)
	parts.NeedPostgreSQL(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	env, err := dev.Start(ctx, dev.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer env.Close()
	out, err := runDoctor(ctx, env.ConfigFile)
	if err != nil || strings.Contains(out, "WRONG") || strings.Count(out, "ok ") != 8+len(env.Config.Backends) {
		t.Fatalf("pawl doctor = %v\n%s\nwant everything ok", err, out)
	}
	if !strings.Contains(out, "the database is set up\n") {
		t.Errorf("pawl doctor printed\n%s\nwant that the database is set up", out)
	}
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

// TestDoctorOnSelfTest holds that the doctor reports the result of the self-test from the broker's metrics.
func TestDoctorOnSelfTest(t *testing.T) {
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
