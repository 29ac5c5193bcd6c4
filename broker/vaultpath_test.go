package broker_test

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
)

func TestParseVaultPath(t *testing.T) {
	long := strings.Repeat("a", broker.MaxVaultName)
	for _, s := range []string{
		"a", "database/pawl-app", "database/creds/reader", "pki/pawl-client", "auth/token/create/pawl-notes",
		"team/database/creds/x", "secret/notes", "Kv-2/A_b.c", "0/1", "a./b-/c_", "a.b.c", "v1.2",
		long, long + "/" + long,
		strings.Repeat("a/", broker.MaxVaultSegments-1) + "a",
	} {
		got, err := broker.ParseVaultPath(s)
		if err != nil || got.String() != s || got.IsZero() {
			t.Errorf("ParseVaultPath(%.60q) = %.60q, %v, want it as it is", s, got, err)
		}
		again, err := broker.VaultPathOf(got.Segments()...)
		if err != nil || again != got {
			t.Errorf("VaultPathOf(%.60q) = %.60q, %v, want %.60q", got.Segments(), again, err, got)
		}
	}
	for s, want := range map[string]string{
		"":                "a vault path is empty: it has 1 to 16 segments",
		"/":               `segment 1 of a vault path: "" is empty: a name in Vault has 1 to 128 letters, digits`,
		"/a":              `segment 1 of a vault path: "" is empty`,
		"a/":              `segment 2 of a vault path: "" is empty`,
		"a//b":            `segment 2 of a vault path: "" is empty`,
		".":               `segment 1 of a vault path: "." begins with '.'`,
		"a/..":            `segment 2 of a vault path: ".." begins with '.'`,
		"a/../sys/mounts": `segment 2 of a vault path: ".." begins with '.'`,
		"a/b/...":         `segment 3 of a vault path: "..." begins with '.'`,
		"a/.b":            `begins with '.'`,
		"a/-b":            `begins with '-'`,
		"a/_b":            `begins with '_'`,
		"a/b..c":          `"b..c" has '..' at byte 2: a name in Vault`,
		"a/b..":           `has '..' at byte 2`,
		"a b/c":           `segment 1 of a vault path: "a b" has ' ' at byte 2`,
		" a":              `has ' ' at byte 1`,
		"a\n":             `has '\n' at byte 2`,
		"a\x00":           `has '\x00' at byte 2`,
		"a/%2e%2e/b":      `segment 2 of a vault path: "%2e%2e" has '%' at byte 1`,
		"a/b%2fc":         `has '%' at byte 2`,
		`a\b`:             `has '\\' at byte 2`,
		"a/{{args.name}}": `has '{' at byte 1`,
		"a/*":             `has '*' at byte 1`,
		"a/+/b":           `has '+' at byte 1`,
		"a?list=true":     `has '?' at byte 2`,
		"a#b":             `has '#' at byte 2`,
		"a;b":             `has ';' at byte 2`,
		"a:b":             `has ':' at byte 2`,
		"a@b":             `has '@' at byte 2`,
		"a~b":             `has '~' at byte 2`,
		"a/é":             `has 'é' at byte 1`,
		"a/b\uff0e\uff0e": `has '．' at byte 2`,
		"a/\xff":          `has '�' at byte 1`,
		"a/" + long + "a": `has 129 bytes: a name in Vault has 1 to 128`,
		"a" + strings.Repeat("/a", broker.MaxVaultSegments): "a vault path has 17 segments: it has 1 to 16",
		strings.Repeat("/", 1<<20):                          "a vault path has 1048577 segments: it has 1 to 16",
	} {
		got, err := broker.ParseVaultPath(s)
		if err == nil || !strings.Contains(err.Error(), want) || !got.IsZero() {
			t.Errorf("ParseVaultPath(%.60q) = %.60q, %v, want an error with %q", s, got, err, want)
		}
	}
}

func TestVaultPathOf(t *testing.T) {
	got, err := broker.VaultPathOf("database", "creds", "reader")
	want := []string{"database", "creds", "reader"}
	if err != nil || got.String() != "database/creds/reader" || !slices.Equal(got.Segments(), want) {
		t.Errorf("VaultPathOf(database, creds, reader) = %q with %q, %v", got, got.Segments(), err)
	}
	got.Segments()[0] = "sys"
	if got.String() != "database/creds/reader" || got.Segments()[0] != "database" {
		t.Errorf("after a change to Segments() the path is %q", got)
	}
	for _, segments := range [][]string{
		nil, {""}, {"a", ""}, {"a/b"}, {"a", "../sys"}, {"a", "b/"}, {"..", "a"},
		make([]string, broker.MaxVaultSegments+1),
		strings.Split(strings.Repeat("a/", broker.MaxVaultSegments)+"a", "/"),
	} {
		if got, err := broker.VaultPathOf(segments...); err == nil || !got.IsZero() {
			t.Errorf("VaultPathOf(%q) = %q, %v, want an error", segments, got, err)
		}
	}
}

func TestCheckVaultName(t *testing.T) {
	for _, s := range []string{"a", "0", "pawl-app", "a.b_C-9", strings.Repeat("a", broker.MaxVaultName)} {
		if err := broker.CheckVaultName(s); err != nil {
			t.Errorf("CheckVaultName(%.60q) = %v, want nil", s, err)
		}
	}
	long := strings.Repeat("a", broker.MaxVaultName+1)
	for _, s := range []string{"", ".", "..", "-a", "_a", "a..b", "a/b", "a b", "é", long} {
		if err := broker.CheckVaultName(s); err == nil {
			t.Errorf("CheckVaultName(%.60q) = nil, want an error", s)
		}
	}
}

func TestVaultPathInsert(t *testing.T) {
	path, err := broker.VaultPathOf("transit", "agents")
	if err != nil {
		t.Fatal(err)
	}
	full, err := broker.ParseVaultPath(strings.Repeat("a/", broker.MaxVaultSegments-1) + "a")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		path broker.VaultPath
		at   int
		want string
	}{
		{path, 0, "sign/transit/agents"}, {path, 1, "transit/sign/agents"}, {path, 2, "transit/agents/sign"},
		{path, 3, ""},
		{broker.VaultPath{}, 0, ""}, {broker.VaultPath{}, 1, ""}, {full, 1, "a/sign/" + full.String()[2:]},
	} {
		if got := row.path.Insert(row.at, "sign"); got.String() != row.want || got.IsZero() != (row.want == "") {
			t.Errorf("%q.Insert(%d, sign) = %q, want %q", row.path, row.at, got, row.want)
		}
	}
	if path.String() != "transit/agents" {
		t.Errorf("after Insert the path itself is %q", path)
	}
	for _, bad := range []string{"", "..", "a/b"} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("Insert(1, %q) did not panic", bad)
				}
			}()
			path.Insert(1, bad)
		}()
	}
}

func TestZeroVaultPath(t *testing.T) {
	var zero broker.VaultPath
	if !zero.IsZero() || zero.String() != "" || zero.Segments() != nil {
		t.Errorf("VaultPath{} = %q with segments %q, want none", zero, zero.Segments())
	}
}

func TestVaultPathJSON(t *testing.T) {
	for _, text := range []string{"", "database/creds"} {
		var got broker.VaultPath
		raw, err := json.Marshal(text)
		if err != nil || json.Unmarshal(raw, &got) != nil || got.String() != text {
			t.Errorf("Unmarshal(%s) = %q, %v", raw, got, err)
		}
		if again, err := json.Marshal(got); err != nil || string(again) != string(raw) {
			t.Errorf("Marshal(%q) = %s, %v, want %s", got, again, err, raw)
		}
	}
	got, err := broker.VaultPathOf("a")
	if err != nil || got.UnmarshalText(nil) != nil || !got.IsZero() {
		t.Errorf("UnmarshalText of no text left %q, %v, want the zero path", got, err)
	}
	if err := json.Unmarshal([]byte(`"a/../b"`), &got); err == nil || !got.IsZero() {
		t.Errorf("Unmarshal(a/../b) left %q, %v, want the zero path and an error", got, err)
	}
}

// FuzzParseVaultPath compares the parser with a regular expression, and its two ways in with each other.
func FuzzParseVaultPath(f *testing.F) {
	for _, s := range []string{
		"", "a", "database/creds/reader", "a/../b", "a//b", "a/%2e%2e", "a./b", "a..b", "-a", "_a/b", "a/\xff", "é",
		strings.Repeat("a/", 15) + "a", strings.Repeat("a/", 16),
	} {
		f.Add(s)
	}
	one := regexp.MustCompile(`\A[A-Za-z0-9]([._-]?[A-Za-z0-9_-])*\.?\z`)
	f.Fuzz(func(t *testing.T, s string) {
		segments := strings.Split(s, "/")
		want := len(segments) <= broker.MaxVaultSegments && !slices.ContainsFunc(segments, func(s string) bool {
			return len(s) > broker.MaxVaultName || !one.MatchString(s)
		})
		got, err := broker.ParseVaultPath(s)
		if (err == nil) != want || got.IsZero() == want {
			t.Fatalf("ParseVaultPath(%q) = %q, %v; a regular expression accepts it: %v", s, got, err, want)
		}
		of, ofErr := broker.VaultPathOf(segments...)
		if of != got || (ofErr == nil) != want {
			t.Fatalf("VaultPathOf(%q) = %q, %v; ParseVaultPath gives %q", segments, of, ofErr, got)
		}
		if want && (got.String() != s || !slices.Equal(got.Segments(), segments)) {
			t.Fatalf("ParseVaultPath(%q) = %q with segments %q", s, got, got.Segments())
		}
	})
}
