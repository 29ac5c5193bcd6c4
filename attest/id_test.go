package attest_test

import (
	"net/url"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/attest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

type domain = spiffeid.TrustDomain

// sized returns an ID of n bytes.
func sized(n int) string {
	const head = "spiffe://example.org/"
	return head + strings.Repeat("a", n-len(head))
}

// idRows are valid and invalid SPIFFE IDs of workloads. ParseID does not check whether a trust domain is accepted.
var idRows = []struct {
	id string
	ok bool
}{
	{"spiffe://example.org/agent/a", true},
	{"spiffe://example.org/A", true},
	{"spiffe://example.org/...", true},
	{"spiffe://example.org./a", true}, // another domain: the allow list is exact
	{sized(attest.MaxID), true},
	{sized(attest.MaxID + 1), false},
	{"spiffe://" + strings.Repeat("a", attest.MaxTrustDomain) + "/a", true},
	{"spiffe://" + strings.Repeat("a", attest.MaxTrustDomain+1) + "/a", false},
	{"", false},
	{"spiffe://", false},
	{"spiffe:///a", false},
	{"spiffe://example.org", false}, // an authority's
	{"spiffe://example.org/", false},
	{"spiffe://example.org/a/", false},
	{"spiffe://example.org//a", false},
	{"spiffe://example.org/./a", false},
	{"spiffe://example.org/../a", false},
	{"spiffe://example.org/a%2fb", false},
	{"spiffe://example.org/a?b", false},
	{"spiffe://example.org/a?", false},
	{"spiffe://example.org/a#b", false},
	{"spiffe://example.org/a#", false},
	{"spiffe://user@example.org/a", false},
	{"spiffe://example.org:80/a", false},
	{"spiffe://Example.org/a", false},
	{"SPIFFE://example.org/a", false},
	{"https://example.org/a", false},
	{"spiffe://example.org/a b", false},
	{"spiffe://example.org/a\x00", false},
	{"spiffe://example.org/\u00e9", false},
	{" spiffe://example.org/a", false},
}

func TestParseID(t *testing.T) {
	for _, row := range idRows {
		id, err := attest.ParseID(row.id)
		if (err == nil) != row.ok {
			t.Errorf("ParseID(%.80q) = %v, want accepted %v", row.id, err, row.ok)
		}
		if err == nil && id.String() != row.id {
			t.Errorf("ParseID(%.80q) = %.80q", row.id, id)
		}
	}
}

func FuzzSPIFFEID(f *testing.F) {
	for _, row := range idRows {
		f.Add(row.id)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := attest.ParseID(s)
		if err != nil {
			return
		}
		u, err := url.Parse(s) // a parser that shares no code
		switch {
		case err != nil:
			t.Errorf("ParseID(%q) accepts an invalid URL: %v", s, err)
		case id.String() != s || u.String() != s:
			t.Errorf("ParseID(%q) = %q, as a URL %q", s, id, u)
		case u.Host != id.TrustDomain().Name() || u.Path != id.Path() || u.User != nil || u.RawQuery != "" || u.Fragment != "":
			t.Errorf("ParseID(%q) differs from the URL parser", s)
		case len(s) > attest.MaxID || len(u.Host) > attest.MaxTrustDomain || len(u.Path) < 2 || s != strings.ToValidUTF8(s, "?"):
			t.Errorf("ParseID(%q) accepts an ID beyond a limit", s)
		case strings.ToLower(u.Host) != u.Host:
			t.Errorf("ParseID(%q) accepts an upper-case trust domain", s)
		}
	})
}
