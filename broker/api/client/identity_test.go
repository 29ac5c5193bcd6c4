package client_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/pawlsec/pawl/broker/api/client"
)

// TestChoose holds which of several SVIDs is a process's own. None is guessed.
func TestChoose(t *testing.T) {
	id := func(path string) (id spiffeid.ID) {
		if path != "" {
			id = spiffeid.RequireFromString("spiffe://example.org" + path)
		}
		return id
	}
	all := []*x509svid.SVID{{ID: id("/a"), Hint: "one"}, {ID: id("/b"), Hint: "two"}, {ID: id("/c"), Hint: "two"}, {ID: id("/d")}}
	for _, row := range []struct {
		choice, present string
		given           []*x509svid.SVID
		is, text        string
	}{
		{"", "", all[:1], "/a", ""},
		{"", "", all, "", "chance decides which is first: choose it"},
		{"", "/c", all, "/c", ""},
		{"", "/c", all[:2], "", "no longer spiffe://example.org/c"},
		{"", "/c", all[:1], "", "no longer spiffe://example.org/c"},
		{"spiffe://example.org/b", "", all, "/b", ""},
		{"spiffe://example.org/b", "/c", all, "/b", ""},
		{"spiffe://example.org/gone", "/c", all, "", "not spiffe://example.org/gone, which was chosen"},
		{"one", "", all, "/a", ""},
		{"one", "/c", all, "/a", ""},
		{"two", "", all, "", `several have hint "two"`},
		{"two", "", all[:2], "/b", ""},
		{"three", "", all, "", `not hint "three", which was chosen`},
		{"", "", nil, "", "no SVID"},
	} {
		own, err := client.ParseIdentity(row.choice)
		if err != nil {
			t.Fatal(err)
		}
		got, err := own.Choose(row.given, id(row.present), "choose it")
		switch {
		case row.is != "" && (err != nil || got.ID != id(row.is)):
			t.Errorf("%+v: %v, %v", row, got, err)
		case row.is == "" && (!errors.Is(err, client.ErrIdentity) || !strings.Contains(err.Error(), row.text)):
			t.Errorf("%+v: %v, want an ErrIdentity with %q", row, err, row.text)
		}
	}
	for _, wrong := range []string{"spiffe://", "https://example.org/a", "spiffe:/example.org/a"} {
		if own, err := client.ParseIdentity(wrong); err == nil {
			t.Errorf("ParseIdentity(%q) = %v, want an error", wrong, own)
		}
	}
}
