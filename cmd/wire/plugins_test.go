package wire_test

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	xssh "golang.org/x/crypto/ssh"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestPluginsAreDocumented holds that docs/configuration.md has each plugin of the table and each of its keys,
// with the plugin's name first.
func TestPluginsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	text := func(key string) string {
		m := regexp.MustCompile("(?m)^\\| `backends\\.NAME\\." + key + "` \\|[^|]*\\|(.*)\\|$").FindSubmatch(page)
		if m == nil {
			t.Errorf("docs/configuration.md has no row for key %s of a backend", key)
			return ""
		}
		return string(m[1])
	}
	names := text("plugin")
	for name, keys := range wire.Plugins() {
		if !regexp.MustCompile(`\b` + name + `\b`).MatchString(names) {
			t.Errorf("the row of backends.NAME.plugin is %q, want plugin %s in it", names, name)
		}
		for _, key := range keys {
			if row := text(key); !strings.HasPrefix(strings.TrimSpace(row), name+": ") {
				t.Errorf("the row of backends.NAME.%s is %q, want it to begin with %q", key, row, name+": ")
			}
		}
	}
}

// TestPluginKeys holds that the table and the fields of Backend have the same keys.
func TestPluginKeys(t *testing.T) {
	fields, listed := []string{}, []string{"plugin"}
	for f := range reflect.TypeFor[wire.Backend]().Fields() {
		fields = append(fields, f.Tag.Get("yaml"))
	}
	for _, keys := range wire.Plugins() {
		listed = append(listed, keys...)
	}
	slices.Sort(fields)
	slices.Sort(listed)
	if !slices.Equal(fields, listed) {
		t.Errorf("the plugins take the keys %q, want the fields of Backend, %q", listed, fields)
	}
}

// TestVaultNeeds holds what each plugin's row adds to the plan for Vault.
func TestVaultNeeds(t *testing.T) {
	backends := map[string]wire.Backend{}
	for name := range wire.Plugins() {
		backends[name] = wire.Backend{Plugin: name}
	}
	backends["other"] = wire.Backend{Plugin: "postgres", Mount: "db", Shaper: "s", Revoker: "r"}
	for _, row := range []struct {
		backend               string
		path                  string
		settings              map[string]string
		access, reads, writes string
	}{
		{"postgres", "database/orders", nil, "read database/creds/orders leased",
			"database/creds/pawl-shaper database/creds/pawl-revoker database/roles/orders database/roles/pawl-shaper " +
				"database/roles/pawl-revoker database/config/*", ""},
		{"other", "db/orders", nil, "read db/creds/orders leased",
			"db/creds/s db/creds/r db/roles/orders db/roles/s db/roles/r db/config/*", ""},
		{"pki", "pki/client", nil, "write pki/issue/client leased", "pki/cert/* pki/issuer/* pki/config/crl pki/crl/rotate", ""},
		{"ssh", "ssh/uptime", nil, "write ssh/sign/uptime", "", ""},
		{"jwt", "transit/key", nil, "write transit/sign/key/sha2-256", "transit/keys/key", ""},
		{"token", "auth/token/create/notes", map[string]string{"policies": "dev"},
			"write auth/token/create/notes wrapped", "", "auth/token/roles/notes"},
		{"kv", "secret/notes", nil, "read secret/data/notes", "", ""},
		{"exec", "any/path", map[string]string{"pawl.mint": "write"}, "write any/path leased", "", ""},
		{"none", "any/path", nil, "", "", ""},
	} {
		tool := broker.Tool{Name: "tool", Backend: row.backend, Path: brokertest.Path(row.path), Settings: row.settings}
		tools := []broker.Tool{tool}
		if got := access(tools, backends); got != row.access {
			t.Errorf("Access(a tool of %s) = %q, want %q", row.backend, got, row.access)
		}
		if got := reads(t, []broker.Tool{tool, tool}, backends); got != row.reads {
			t.Errorf("Reads(two tools of %s) = %q, want %q", row.backend, got, row.reads)
		}
		if got := writes(t, tools, backends); got != row.writes {
			t.Errorf("Writes(a tool of %s) = %q, want %q", row.backend, got, row.writes)
		}
		tools[0].Canary = true
		if access, writes := access(tools, backends), writes(t, tools, backends); access != "" || writes != "" {
			t.Errorf("Access and Writes(a canary of %s) = %q and %q, want neither", row.backend, access, writes)
		}
	}
}

func access(tools []broker.Tool, backends map[string]wire.Backend) string {
	var all []string
	for _, a := range wire.Access(tools, backends) {
		text := map[bool]string{false: "read ", true: "write "}[a.Write] + a.Path.String()
		if a.Leased {
			text += " leased"
		}
		if a.Wrap {
			text += " wrapped"
		}
		all = append(all, text)
	}
	return strings.Join(all, ", ")
}

func reads(t *testing.T, tools []broker.Tool, backends map[string]wire.Backend) string {
	t.Helper()
	list, err := wire.Reads(tools, backends)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, r := range list {
		all = append(all, r.String())
	}
	return strings.Join(all, " ")
}

func writes(t *testing.T, tools []broker.Tool, backends map[string]wire.Backend) string {
	t.Helper()
	list, err := wire.Writes(tools, backends)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, w := range list {
		all = append(all, fmt.Sprint(w.Path))
	}
	return strings.Join(all, " ")
}

// TestReachSSH holds what the doctor says of a revocation list: whether it can be written, whether the hosts to ask
// answer, and that nothing confirms it otherwise.
func TestReachSSH(t *testing.T) {
	server := parts.OwnSSHD(t, parts.SSHDConfig{})
	host := wire.Host{Address: server.Address(), HostKey: strings.TrimSpace(string(xssh.MarshalAuthorizedKey(server.HostKey())))}
	away := wire.Host{Address: "127.0.0.1:1", HostKey: host.HostKey}
	krl := filepath.Join(t.TempDir(), "krl")
	for _, row := range []struct {
		backend wire.Backend
		ok      bool
		want    string
	}{
		{wire.Backend{}, true, "in Vault"},
		{wire.Backend{KRL: krl}, true, "stay unknown until they expire"},
		{wire.Backend{KRL: krl, KRLInUse: true}, true, "by the configuration"},
		{wire.Backend{KRL: krl, Hosts: []wire.Host{host}}, true, "the sshd of 1 hosts answer"},
		{wire.Backend{KRL: krl, Hosts: []wire.Host{host, away}}, false, "sshd at 127.0.0.1:1"},
		{wire.Backend{KRL: filepath.Join(krl, "none", "krl")}, false, "the directory of krl"},
	} {
		row.backend.Plugin = "ssh"
		found, err := wire.Reach(t.Context(), row.backend)
		if err != nil {
			found = err.Error()
		}
		if (err == nil) != row.ok || !strings.Contains(found, row.want) {
			t.Errorf("Reach(%+v) = %q, %v; want ok %v and %q", row.backend, found, err, row.ok, row.want)
		}
	}
}
