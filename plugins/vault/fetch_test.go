package vault_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/plugins/vault"
)

// TestFetch holds that what is not JSON comes as it is, however long it may be by the limit of other answers, and
// not beyond its own.
func TestFetch(t *testing.T) {
	raw := bytes.Repeat([]byte{0x30, 0}, 1<<20)
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v1/pki/crl":
			_, _ = w.Write(raw) // the client has it or not
		case "/v1/pki/forbidden":
			w.WriteHeader(http.StatusForbidden)
			_, _ = fmt.Fprintf(w, `{"errors":["permission denied: %s"]}`, marker) // the same
		default:
			w.WriteHeader(map[bool]int{true: http.StatusNoContent, false: http.StatusNotFound}[r.URL.Path == "/v1/pki/empty"])
		}
	})
	c := f.client(t, nil)
	if got, err := c.Fetch(t.Context(), []string{"pki", "crl"}, int64(len(raw))); err != nil || !bytes.Equal(got, raw) {
		t.Errorf("Fetch() = %d bytes, %v, want the %d that are served", len(got), err, len(raw))
	}
	if got, err := c.Fetch(t.Context(), []string{"pki", "crl"}, int64(len(raw))-1); err == nil || got != nil {
		t.Errorf("Fetch() of more than is allowed = %d bytes, %v, want an error", len(got), err)
	}
	for _, nothing := range []string{"empty", "missing"} {
		if got, err := c.Fetch(t.Context(), []string{"pki", nothing}, 10); err != nil || got != nil {
			t.Errorf("Fetch() of what is %s = %d bytes, %v, want nothing", nothing, len(got), err)
		}
	}
	if _, err := c.Fetch(t.Context(), []string{"pki", "forbidden"}, 10); !errors.Is(err, vault.ErrForbidden) || strings.Contains(err.Error(), marker) {
		t.Errorf("Fetch() of what is forbidden = %v, want ErrForbidden and no more", err)
	}
	if _, err := c.Fetch(t.Context(), []string{"pki", "..", "sys"}, 10); err == nil {
		t.Error("Fetch() took a path that leaves its mount")
	}
}
