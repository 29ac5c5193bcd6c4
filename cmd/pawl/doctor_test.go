package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
)

// TestDoctor asks the doctor about a healthy broker, and then breaks one thing after the other.
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
	if out, err := examine(ctx, env.ConfigFile); err != nil || strings.Contains(out, "WRONG") || strings.Count(out, "ok ") != 6+len(env.Config.Backends) {
		t.Fatalf("pawl doctor = %v\n%s\nwant everything ok", err, out)
	}
	ledger := env.Config.Ledger
	for _, row := range []struct {
		name         string
		harm, mend   func() error
		wrong, words string
	}{
		{"database down", env.Postgres.Stop, func() error { return env.Postgres.Start(ctx) }, "backend shop", "connection refused"},
		{"Vault sealed", func() error { return env.Vault.Seal(ctx) }, func() error { return env.Vault.Unseal(ctx) }, "vault", "is sealed"},
		{"ledger open to others", func() error { return os.Chmod(ledger, 0o644) }, func() error { return os.Chmod(ledger, 0o600) }, "ledger", "only the broker's user"},
		{"bundle gone", func() error { return os.Rename(env.Config.Policy.Bundle, filepath.Join(env.Dir, "away")) },
			func() error { return os.Rename(filepath.Join(env.Dir, "away"), env.Config.Policy.Bundle) }, "policy bundle", "no such file"},
		{"identities gone", env.Identities.Close, nil, "identity", ""},
	} {
		if err := row.harm(); err != nil {
			t.Fatal(err)
		}
		out, err := examine(ctx, env.ConfigFile)
		if found := wrong(out, row.wrong); err == nil || found == "" || !strings.Contains(found, row.words) || !strings.Contains(out, "hint: ") {
			t.Errorf("%s: pawl doctor = %v\n%s\nwant %q wrong, with %q", row.name, err, out, row.wrong, row.words)
		}
		if row.mend != nil {
			if err := row.mend(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func examine(ctx context.Context, file string) (string, error) {
	var out strings.Builder
	c := command()
	c.SetArgs([]string{"doctor", "--config", file})
	c.SetOut(&out)
	err := c.ExecuteContext(ctx)
	return out.String(), err
}

// wrong gives the line that calls what wrong.
func wrong(out, what string) string {
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(line, "WRONG  "+what); ok && strings.HasPrefix(rest, " ") {
			return line
		}
	}
	return ""
}
