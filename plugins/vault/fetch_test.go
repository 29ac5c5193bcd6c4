package vault_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/plugins/vault"
)

// TestFetch checks that Fetch returns a body that is not JSON unchanged. Its own limit applies, not the limit of other
// responses.
func TestFetch(t *testing.T) {
	raw := bytes.Repeat([]byte{0x30, 0}, 1<<20)
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v1/pki/crl":
			_, _ = w.Write(raw) // the client reports a failure
		case "/v1/pki/forbidden":
			w.WriteHeader(http.StatusForbidden)
			_, _ = fmt.Fprintf(w, `{"errors":["permission denied: %s"]}`, marker) // the same
		case "/v1/pki/empty":
			w.WriteHeader(http.StatusNoContent)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	})
	c := f.client(t, nil)
	if got, err := c.Fetch(t.Context(), brokertest.Path("pki/crl"), int64(len(raw))); err != nil || !bytes.Equal(got, raw) {
		t.Errorf("Fetch() = %d bytes, %v, want the served body of %d bytes", len(got), err, len(raw))
	}
	if got, err := c.Fetch(t.Context(), brokertest.Path("pki/crl"), int64(len(raw))-1); err == nil || got != nil {
		t.Errorf("Fetch() over the limit = %d bytes, %v, want an error", len(got), err)
	}
	for _, nothing := range []string{"empty", "missing"} {
		if got, err := c.Fetch(t.Context(), brokertest.Path("pki/"+nothing), 10); err != nil || got != nil {
			t.Errorf("Fetch(%s) = %d bytes, %v, want none", nothing, len(got), err)
		}
	}
	_, err := c.Fetch(t.Context(), brokertest.Path("pki/forbidden"), 10)
	if !errors.Is(err, vault.ErrForbidden) || strings.Contains(err.Error(), marker) {
		t.Errorf("Fetch(forbidden) = %v, want ErrForbidden without the server's text", err)
	}
	if _, err := c.Fetch(t.Context(), broker.VaultPath{}, 10); err == nil {
		t.Error("Fetch() accepted the zero path")
	}
}
