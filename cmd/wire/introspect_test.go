package wire_test

import (
	"strings"
	"testing"

	"github.com/pawlsec/pawl/cmd/wire"
)

// TestStatusURI: a status list needs a key to sign it, and only tokens have one.
func TestStatusURI(t *testing.T) {
	const rest = `
trust_domains: [example.org]
listen: {agents: ":8443", socket: admin.sock}
ledger: ledger.db
policy: {bundle: policy.jws, keys: keys.json}
vault: {address: "https://vault", ca: ca.pem}
`
	for name, row := range map[string]struct{ text, want string }{
		"good":      {"signing_key: k\nbackends: {a: {plugin: jwt, issuer: \"https://i\", status_uri: \"https://i/v1/status-lists/a\"}}", ""},
		"no key":    {"backends: {a: {plugin: jwt, issuer: \"https://i\", status_uri: \"https://i/v1/status-lists/a\"}}", "signing_key (with backends.a.status_uri) is required"},
		"no tokens": {"signing_key: k\nbackends: {a: {plugin: kv, status_uri: \"https://i\"}}", "is not a key of plugin kv"},
	} {
		_, err := wire.ParseConfig([]byte(rest + row.text))
		if (err == nil) != (row.want == "") || err != nil && !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: ParseConfig = %v, want an error with %q", name, err, row.want)
		}
	}
}
