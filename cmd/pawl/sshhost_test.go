package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/ssh"
)

// TestDoctorOnSSHHost runs the doctor against the configurations of real sshd: it finds a ForceCommand in whatever block
// it is, a missing list, and an empty one.
func TestDoctorOnSSHHost(t *testing.T) {
	t.Parallel()
	krl, empty := filepath.Join(t.TempDir(), "krl"), filepath.Join(t.TempDir(), "empty")
	if _, err := ssh.New(ssh.Config{KRL: krl}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	included := filepath.Join(t.TempDir(), "included")
	if err := os.WriteFile(included, []byte("# of another team\nMatch User other\n  revokedkeys="+empty+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		settings string
		list     string
		address  string
		wrong    string // the failed check; empty: none
		want     string
	}{
		"good":                 {"", krl, "127.0.0.1", "", "version 1, lists 0 certificates of Pawl"},
		"a forced command":     {"ForceCommand /usr/bin/record", krl, "127.0.0.1", "user root", `ForceCommand "/usr/bin/record" runs instead`},
		"of the user's block":  {"Match User root\nForceCommand x", krl, "127.0.0.1", "user root", "runs instead"},
		"of another user":      {"Match User other\nForceCommand x", krl, "127.0.0.1", "", "the certificate's command runs"},
		"of an address":        {"Match Address 10.0.0.0/8\nForceCommand x", krl, "10.0.0.5", "user root", "runs instead"},
		"of another address":   {"Match Address 10.0.0.0/8\nForceCommand x", krl, "127.0.0.1", "", "the certificate's command runs"},
		"an empty list":        {"", empty, "127.0.0.1", "revoked keys", "is empty"},
		"a missing list":       {"", krl + ".none", "127.0.0.1", "revoked keys", "no such file"},
		"no list":              {"", "none", "127.0.0.1", "revoked keys", "RevokedKeys is not set"},
		"another list":         {"Match Address 127.0.0.2\nRevokedKeys " + empty, krl, "127.0.0.1", "revoked keys", "another list"},
		"in an included file":  {"Match all\nInclude " + included, krl, "127.0.0.1", "revoked keys", "another list"},
		"principals of a file": {"AuthorizedPrincipalsFile /etc/ssh/principals", krl, "127.0.0.1", "", "decides which principals"},
	} {
		server := parts.OwnSSHD(t, parts.SSHDConfig{Settings: strings.Split(row.settings, "\n"), RevokedKeysFile: row.list})
		var out strings.Builder
		c := command()
		c.SetArgs([]string{"doctor", "--ssh-host", "--user", "root", "--address", row.address, "--sshd-config", server.ConfigFile()})
		c.SetOut(&out)
		err := c.ExecuteContext(t.Context())
		failed := row.wrong == "" || failedLine(out.String(), row.wrong) != ""
		if (err == nil) != (row.wrong == "") || !failed || !strings.Contains(out.String(), row.want) {
			t.Errorf("%s: pawl doctor = %v\n%s\nwant %q wrong, and %q", name, err, out.String(), row.wrong, row.want)
		}
	}
}
