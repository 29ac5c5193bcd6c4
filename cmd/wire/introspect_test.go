package wire_test

import (
	"strings"
	"testing"

	"github.com/pawlsec/pawl/cmd/wire"
)

// TestStatusURI holds that a status list needs a signing key, and that only the jwt plugin takes one.
func TestStatusURI(t *testing.T) {
	const rest = `
trust_domains: [example.org]
listen: {agents: ":8443", socket: admin.sock}
ledger: ledger.db
policy: {bundle: policy.jws, keys: keys.json}
vault: {address: "https://vault", ca: ca.pem}
`
	const backend = `backends: {a: {plugin: jwt, issuer: "https://i", status_uri: "https://i/v1/status-lists/a"}}`
	for name, row := range map[string]struct{ text, want string }{
		"good":      {"signing_key: k\n" + backend, ""},
		"no key":    {backend, "signing_key (with backends.a.status_uri) is required"},
		"no tokens": {"signing_key: k\nbackends: {a: {plugin: kv, status_uri: \"https://i\"}}", "is not a key of plugin kv"},
	} {
		_, err := wire.ParseConfig([]byte(rest + row.text))
		if (err == nil) != (row.want == "") || err != nil && !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: ParseConfig = %v, want an error with %q", name, err, row.want)
		}
	}
}
