package wire_test

import (
	"strings"
	"testing"

	"github.com/pawlsec/pawl/cmd/wire"
)

// TestConfigIsPlain holds that what the YAML reader panics at, or would make into more than the
// file shows, is refused with a line.
func TestConfigIsPlain(t *testing.T) {
	const good = "trust_domains: [example.org]\nlisten: {agents: \"0.0.0.0:8443\", socket: /run/pawl/admin.sock}\nledger: /l\n" +
		"policy: {bundle: /b, keys: /k}\nvault: {address: \"https://vault:8200\", ca: /c}\nbackends:\n  shop: {plugin: kv}\n"
	if _, err := wire.ParseConfig([]byte(good)); err != nil {
		t.Fatalf("ParseConfig(%q) = %v", good, err)
	}
	for what, row := range map[string][2]string{
		"a tag before a list": {"[example.org]", "![example.org]"},
		"an anchor":           {"/l", "&l /l"},
		"an alias":            {"/k}", "*b}"},
		"depth":               {"[example.org]", strings.Repeat("[", 40) + strings.Repeat("]", 40)},
	} {
		text := strings.Replace(good, row[0], row[1], 1)
		if _, err := wire.ParseConfig([]byte(text)); err == nil {
			t.Errorf("ParseConfig with %s = no error, want one", what)
		}
	}
}
