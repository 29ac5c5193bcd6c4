package wire_test

import (
	"bytes"
	"os"
	"regexp"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/pawlsec/pawl/cmd/wire"
)

// FuzzConfig holds that the parser accepts or refuses a configuration within a bounded time. An accepted
// configuration has every required key, and stays the same when it is written and read again.
func FuzzConfig(f *testing.F) {
	for _, s := range []string{
		goodConfig, goodConfig + "sweep_every: 90s\n", goodConfig + "---\nx: 1\n", goodConfig + "ledger: /other\n",
		goodConfig + "1: x\n", goodConfig + "signals: [{issuer: i, audience: a, keys: /k, action: revoke}]\n",
		"", "a: &a [*a]", "{", "- x", "a: |\n  x\n\n\n\n", "@@@", "--- a\n--- b\n", "? a\n: b\n",
	} {
		f.Add([]byte(s))
	}
	page, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		f.Fatal(err)
	}
	shown := regexp.MustCompile("(?s)```yaml configuration\n(.*?)```").FindAllSubmatch(page, -1)
	if len(shown) == 0 {
		f.Fatal("docs/configuration.md shows no configuration")
	}
	for _, m := range shown {
		f.Add(m[1])
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := read(t, raw)
		if err != nil {
			return
		}
		if len(c.TrustDomains) == 0 || c.Listen.Agents == "" || c.Listen.Socket == "" || c.Ledger == "" ||
			c.Policy.Bundle == "" || c.Policy.Keys == "" || c.Vault.Address == "" || c.Vault.CA == "" ||
			len(c.Backends) == 0 {
			t.Fatalf("ParseConfig(%q) = no error, want one about a missing key", raw)
		}
		one, err := yaml.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		again, err := read(t, one)
		if err != nil {
			t.Fatalf("ParseConfig(%q), written as %q and read again = %v", raw, one, err)
		}
		if two, err := yaml.Marshal(again); err != nil || !bytes.Equal(one, two) {
			t.Errorf("ParseConfig(%q) is %q, and then %q, %v", raw, one, two, err)
		}
	})
}

// read parses a configuration and fails the test after half a minute: a parser that hangs cannot be stopped.
func read(t *testing.T, raw []byte) (c wire.Config, err error) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err = wire.ParseConfig(raw)
	}()
	select {
	case <-done:
		return c, err
	case <-time.After(30 * time.Second):
		t.Fatalf("ParseConfig of %d bytes did not return within half a minute: %.300q", len(raw), raw)
		panic("unreachable")
	}
}
