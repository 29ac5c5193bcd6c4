package vault_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
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

// TestListAndOCSP checks that List returns only what can be a segment of a path, and that OCSP sends its request as it
// is, without a token.
func TestListAndOCSP(t *testing.T) {
	request, answer := []byte{0x30, 1, 2}, []byte{0x30, 3}
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // compared below
		switch {
		case r.Method == "LIST" && r.URL.Path == "/v1/pki/issuers":
			_, _ = w.Write([]byte(`{"data":{"keys":["a-1","b","deeper/","../x"],"key_info":{"a-1":{"key_id":"k"}}}}`)) // the client reports a failure
		case r.Method == "POST" && r.URL.Path == "/v1/pki/ocsp" && r.Header.Get("Content-Type") == "application/ocsp-request" &&
			r.Header.Get("X-Vault-Token") == "" && bytes.Equal(body, request):
			_, _ = w.Write(answer) // the same
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	})
	c := f.client(t, nil)
	got, err := c.List(t.Context(), brokertest.Path("pki/issuers"))
	if names := slices.Sorted(maps.Keys(got)); err != nil || !slices.Equal(names, []string{"a-1", "b"}) || got["a-1"]["key_id"] != "k" {
		t.Errorf("List() = %v, %v, want a-1 with its key, and b", got, err)
	}
	if got, err := c.List(t.Context(), brokertest.Path("none")); err != nil || got != nil {
		t.Errorf("List(none) = %v, %v, want none", got, err)
	}
	if got, err := c.OCSP(t.Context(), "pki", request); err != nil || !bytes.Equal(got, answer) {
		t.Errorf("OCSP() = %x, %v, want %x", got, err, answer)
	}
	if _, err := c.OCSP(t.Context(), "other", request); err == nil {
		t.Error("OCSP() of a mount without a responder returned an answer")
	}
	if _, err := c.OCSP(t.Context(), "..", request); err == nil {
		t.Error("OCSP() accepted a path that leaves its mount")
	}
}
