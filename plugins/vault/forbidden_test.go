package vault_test

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/pawlsec/pawl/plugins/vault"
)

// TestForbiddenIsNotGone checks that a 403 at a revocation is an errForbidden, whatever its text. It never counts as
// "already gone".
func TestForbiddenIsNotGone(t *testing.T) {
	for _, text := range []string{
		"1 error occurred:\n\t* permission denied\n\n", "permission denied",
		"invalid accessor", "token not found", "invalid lease", "lease not found",
	} {
		f := newFake(t, respond(403, errorBody(text)))
		c := f.client(t, nil)
		if err := c.Kill(t.Context(), "accessor-x"); !errors.Is(err, vault.ErrForbidden) {
			t.Errorf("Kill() after a 403 %q = %v, want ErrForbidden", text, err)
		}
		if err := c.Revoke(t.Context(), "pki/issue/a/x1"); !errors.Is(err, vault.ErrForbidden) {
			t.Errorf("Revoke() after a 403 %q = %v, want ErrForbidden", text, err)
		}
	}
}

// errorBody returns the body of a Vault response with one error.
func errorBody(text string) string {
	raw, err := json.Marshal(map[string][]string{"errors": {text}})
	if err != nil {
		panic("a text always encodes")
	}
	return string(raw)
}
