package vault_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
)

// TestRealRootTokenEnds compares the recorded end of a root delegation's token with Vault's, after renewals. Vault
// itself drops the explicit_max_ttl of a token from a token role at its first renewal.
func TestRealRootTokenEnds(t *testing.T) {
	s := newSite(t, parts.NeedVault(t))
	cfg := s.config()
	cfg.DeadMan = 4 * time.Second
	c := newClient(t, cfg)
	d := delegation(rootID, "")
	d.Expires = time.Now().Add(6 * time.Second)
	h := branch(t, c, d, s.a())
	root := s.rootClient(t)
	role, err := root.Read(t.Context(), brokertest.Path("auth/token/roles/"+s.setup.TokenRole))
	if err != nil || fmt.Sprint(role["token_explicit_max_ttl"]) != "86400" {
		t.Errorf("the token role has token_explicit_max_ttl %v, %v, want the longest life of a chain in seconds",
			role["token_explicit_max_ttl"], err)
	}
	lastEnd := func() time.Time {
		end, err := root.TokenEnd(t.Context(), h.Accessor)
		if err != nil {
			t.Fatal(err)
		}
		return end
	}
	first := lastEnd()
	var last time.Time
	until(t, 10*time.Second, "the last renewal", func() bool {
		if gone, err := root.TokensGone(t.Context(), []string{h.Accessor}); err != nil || gone[0] {
			t.Fatalf("the token is gone, %v, before its last renewal", err)
		}
		last = lastEnd()
		return time.Until(h.Expires) < 1500*time.Millisecond
	})
	if !last.After(first) {
		t.Fatalf("Vault ends the token at %v, as before: it was not renewed", last)
	}
	if late := last.Sub(h.Expires); late > time.Second || late < -2*time.Second {
		t.Errorf("Vault ends the token %v after its recorded end, want within a second", late)
	}
	until(t, 30*time.Second, "the end of the token", func() bool {
		gone, err := root.TokensGone(t.Context(), []string{h.Accessor})
		return err == nil && gone[0]
	})
}
