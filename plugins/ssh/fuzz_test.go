package ssh_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/plugins/ssh"
)

// FuzzArguments checks that an accepted argument is one user, one line, or an address list that excludes some
// addresses. The request to Vault must have exactly these values.
func FuzzArguments(f *testing.F) {
	for _, row := range [][3]string{{"root", "uptime", "10.0.0.0/8"}, {"root,admin", "a\nb", "0.0.0.0/0"}, {"*", "", "10.0.0.1,::1"}, {"_a-b.c", "{{user}}", "::/0"},
		{"Root", "a\x00", "10.0.0.1/8"}, {"root ", "é", "fe80::1%eth0"}, {"", "a", ""}} {
		f.Add(row[0], row[1], row[2])
	}
	b, err := ssh.New(ssh.Config{})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, user, run, from string) {
		args, err := args.New(map[string]args.Value{"u": args.String(user), "r": args.String(run), "f": args.String(from)})
		if err != nil {
			return
		}
		settings := map[string]string{"arg.u": "principal", "arg.r": "force_command", "arg.f": "source_address"}
		m, _, err := b.Prepare(t.Context(), tool("ssh", broker.NarrowNative, settings, "u", "r", "f"),
			broker.Grant{ID: "gr000000000000000000000001", Args: args, Expires: time.Now().Add(time.Minute)})
		if err != nil {
			return
		}
		options, _ := m.Data["critical_options"].(map[string]string)
		if m.Data["valid_principals"] != user || len(options) != 2 || options["force-command"] != run || options["source-address"] != from {
			t.Errorf("Prepare(%q, %q, %q) asks for %q, %q", user, run, from, m.Data["valid_principals"], options)
		}
		if user == "" || user == "*" || strings.ContainsAny(user, ", \n\x00") || strings.ContainsAny(run, "\n\r\x00") || run == "" {
			t.Errorf("Prepare(%q, %q) = no error, want one", user, run)
		}
		for one := range strings.SplitSeq(from, ",") {
			network, err := netip.ParsePrefix(one)
			address, errToo := netip.ParseAddr(one)
			if (err != nil || network.Bits() == 0) && (errToo != nil || address.Zone() != "") {
				t.Errorf("Prepare(from %q) = no error, and %q excludes no address", from, one)
			}
		}
	})
}
