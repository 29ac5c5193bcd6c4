package pki_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/plugins/pki"
)

// FuzzNames checks that one argument becomes one name of the certificate, unchanged. Vault splits lists at commas,
// reads stars as patterns and trims spaces.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"a.example.org", "a,b", "*.a", "", " a", "spiffe://example.org/a", "spiffe://example.org/a,b", "10.0.0.1", "::1", "10.0.0.1/8", "a\x00", "é"} {
		for field := range 4 {
			f.Add(field, s)
		}
	}
	b, err := pki.New(pki.Config{Vault: none{}})
	if err != nil {
		f.Fatal(err)
	}
	list := []string{"common_name", "alt_names", "uri_sans", "ip_sans"}
	f.Fuzz(func(t *testing.T, n int, value string) {
		field := list[uint(n)%uint(len(list))]
		args, err := args.New(map[string]args.Value{"x": args.String(value)})
		if err != nil {
			return
		}
		g := broker.Grant{ID: "gr1", Args: args, Expires: time.Now().Add(time.Minute)}
		m, _, err := b.Prepare(t.Context(), tool(map[string]string{"arg.x": field}, "x:string"), g)
		fixed := b.Load(tool(map[string]string{field: value}))
		if err != nil {
			if fixed == nil && !strings.Contains(value, ",") {
				t.Errorf("%s = %q is accepted as a setting and rejected as an argument", field, value)
			}
			return
		}
		if fixed != nil {
			t.Errorf("%s = %q is accepted as an argument and rejected as a setting: %v", field, value, fixed)
		}
		for _, name := range list {
			want := ""
			if name == field {
				want = value
			}
			if m.Data[name] != want {
				t.Errorf("%s = %q asks Vault for %s = %q", field, value, name, m.Data[name])
			}
		}
		if value == "" || strings.ContainsAny(value, ",* \t\n\x00") || strings.TrimSpace(value) != value {
			t.Errorf("%s accepts %q", field, value)
		}
		if field != "uri_sans" && strings.ToLower(fmt.Sprintf("%+q", value)) != `"`+value+`"` {
			t.Errorf("%s accepts %q, which has a second spelling", field, value)
		}
	})
}
