package wire_test

import (
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/cmd/wire"
)

const config = `
trust_domains: [example.org]
listen: {agents: ":8443", socket: /run/pawl.sock}
ledger: ledger.db
policy: {bundle: b, keys: k}
vault: {address: "https://vault:8200", ca: ca.pem}
backends: {notes: {plugin: kv}}
`

// TestSignalsConfig holds that the configuration must state the action for a transmitter's events: there is no
// default.
func TestSignalsConfig(t *testing.T) {
	const good = `signals: [{issuer: "https://idp", audience: us, keys: k.json, action: freeze, ` +
		`subjects: {acme: "label.customer:acme"}}]`
	c, err := wire.ParseConfig([]byte(config + good))
	if err != nil || len(c.Signals) != 1 || c.Signals[0].Subjects["acme"] == "" {
		t.Fatalf("ParseConfig = %+v, %v, want the transmitter", c.Signals, err)
	}
	for name, row := range map[string]struct{ text, want string }{
		"no action":      {`signals: [{issuer: i, audience: us, keys: k}]`, "signals.0.action"},
		"another action": {`signals: [{issuer: i, audience: us, keys: k, action: kill}]`, "revoke or freeze"},
		"no audience":    {`signals: [{issuer: i, keys: k, action: revoke}]`, "signals.0.audience is required"},
		"no keys":        {`signals: [{issuer: i, audience: us, action: revoke}]`, "signals.0.keys is required"},
		"a bad selector": {`signals: [{issuer: i, audience: us, keys: k, action: revoke, subjects: {a: "label:x"}}]`,
			"signals.0.subjects.a"},
		"an unknown field": {`signals: [{issuer: i, audience: us, keys: k, action: revoke, alg: none}]`, "alg"},
	} {
		if _, err := wire.ParseConfig([]byte(config + row.text)); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("ParseConfig with %s = %v, want an error with %q", name, err, row.want)
		}
	}
}

// TestKeys holds that a signing key must be private, and the keys of a transmitter public.
func TestKeys(t *testing.T) {
	private, public, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := wire.Config{TrustDomains: []string{"example.org"}}
	if s, err := wire.LoadSigner(c); s != nil || err != nil {
		t.Errorf("LoadSigner without a key = %v, %v, want none", s, err)
	}
	c.SigningKey = write(t, private)
	if s, err := wire.LoadSigner(c); err != nil || s.Name() != "example.org/pawl" {
		t.Errorf("LoadSigner = %v, %v, want the signer of example.org", s, err)
	}
	c.SigningKey = write(t, public)
	if _, err := wire.LoadSigner(c); err == nil {
		t.Error("LoadSigner of a public key = nil, want an error")
	}
	c.Signals = []wire.Signal{{Issuer: "i", Audience: "us", Action: "freeze",
		Keys: write(t, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{public}})}}
	list, err := wire.LoadTransmitters(c)
	if err != nil || len(list) != 1 || !list[0].Freeze || len(list[0].Keys) != 1 {
		t.Errorf("LoadTransmitters = %+v, %v, want one that freezes", list, err)
	}
	c.Signals[0].Keys = write(t, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{private}})
	if _, err := wire.LoadTransmitters(c); err == nil {
		t.Error("LoadTransmitters of a private key = nil, want an error")
	}
}

func write(t *testing.T, v any) string {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key.json")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
