package wire_test

import (
	"strings"
	"testing"

	"github.com/pawlsec/pawl/cmd/wire"
)

const goodConfig = "trust_domains: [example.org]\n" +
	"listen: {agents: \"0.0.0.0:8443\", socket: /run/pawl/admin.sock}\nledger: /l\n" +
	"policy: {bundle: /b, keys: /k}\nvault: {address: \"https://vault:8200\", ca: /c}\nbackends:\n  shop: {plugin: kv}\n"

// TestConfigIsPlain holds that input which the YAML reader panics on, or would expand to more than the
// file shows, is refused with its line.
func TestConfigIsPlain(t *testing.T) {
	if _, err := wire.ParseConfig([]byte(goodConfig)); err != nil {
		t.Fatalf("ParseConfig(%q) = %v", goodConfig, err)
	}
	for name, row := range map[string][3]string{
		"a tag before a list": {"[example.org]", "![example.org]", "line 1: anchors, "},
		"an anchor":           {"/l", "&l /l", "line 3: anchors, "},
		"an alias":            {"/k}", "*b}", "line 4: anchors, "},
		"depth": {"[example.org]", strings.Repeat("[", 40) + strings.Repeat("]", 40),
			"line 1: nested more than 32 deep"},
		"blank lines":    {"/l", "|\n  /l" + strings.Repeat("\n", 10_000), "line 69: more than 64 blank lines"},
		"many documents": {"ledger", strings.Repeat("---\n", 10_000) + "ledger", "holds more than one document"},
		"many keys": {"ledger", strings.Repeat("ledger: /l\n", 2000) + "ledger",
			"line 1025: the map has more than 1024 keys"},
		"a number as a key": {"kv}", "kv, 1: x}", "line 7: a key is no text; put it in quotes"},
	} {
		text := strings.Replace(goodConfig, row[0], row[1], 1)
		if _, err := wire.ParseConfig([]byte(text)); err == nil || !strings.HasPrefix(err.Error(), row[2]) {
			t.Errorf("ParseConfig with %s = %v, want an error that begins with %q", name, err, row[2])
		}
	}
}

// TestConfigVaultNames checks that the names of mounts and roles in Vault are names when the file is read, and that the
// error names the field.
func TestConfigVaultNames(t *testing.T) {
	postgres := strings.Replace(goodConfig, "{plugin: kv}", "{plugin: postgres, dsn: \"host=db dbname=shop\", mount: team-db, shaper: s.1, revoker: r_1}", 1)
	if _, err := wire.ParseConfig([]byte(postgres)); err != nil {
		t.Fatalf("ParseConfig(%q) = %v", postgres, err)
	}
	for field, row := range map[string][2]string{
		"vault.mount":           {"ca: /c", "ca: /c, mount: ../sys"},
		"vault.role":            {"ca: /c", "ca: /c, role: a/b"},
		"backends.shop.mount":   {"team-db", "\"team/../sys\""},
		"backends.shop.shaper":  {"s.1", "_s"},
		"backends.shop.revoker": {"r_1", "r..1"},
	} {
		text := strings.Replace(postgres, row[0], row[1], 1)
		if _, err := wire.ParseConfig([]byte(text)); err == nil || !strings.Contains(err.Error(), field+": ") || !strings.Contains(err.Error(), "a name in Vault has") {
			t.Errorf("ParseConfig(%s = %s) = %v, want an error about %s", field, row[1], err, field)
		}
	}
}
