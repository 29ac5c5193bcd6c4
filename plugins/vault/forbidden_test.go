package vault_test

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/pawlsec/pawl/plugins/vault"
)

// TestForbiddenIsNotGone: a 403 at a revocation is an error that says so, whatever its text, and never that what
// was to be revoked is gone already.
func TestForbiddenIsNotGone(t *testing.T) {
	for _, says := range []string{"1 error occurred:\n\t* permission denied\n\n", "permission denied", "invalid accessor", "token not found", "invalid lease", "lease not found"} {
		f := newFake(t, say(403, quoted(says)))
		c := f.client(t, nil)
		if err := c.Kill(t.Context(), "accessor-x"); !errors.Is(err, vault.ErrForbidden) {
			t.Errorf("Kill() with a 403 that says %q = %v, want ErrForbidden", says, err)
		}
		if err := c.Revoke(t.Context(), "pki/issue/a/x1"); !errors.Is(err, vault.ErrForbidden) {
			t.Errorf("Revoke() with a 403 that says %q = %v, want ErrForbidden", says, err)
		}
	}
}

// quoted is an answer of Vault's with one error.
func quoted(text string) string {
	raw, err := json.Marshal(map[string][]string{"errors": {text}})
	if err != nil {
		panic("a text always encodes")
	}
	return string(raw)
}
