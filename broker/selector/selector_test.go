package selector_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// anID returns an id of the right form with a recognizable end.
func anID(prefix, end string) string { return prefix + strings.Repeat("0", 24-len(end)) + end }

var selectorNoon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

// subjects returns the three delegations of root -> planner -> writer, and a grant of the writer.
func subjects(t testing.TB) map[string]selector.Subject {
	args, err := args.Parse([]byte(
		`{"table":"users","limit":5,"dry":true,"verbs":["select","insert"],"text":"a \"b\" ü"}`))
	if err != nil {
		t.Fatal(err)
	}
	chain := broker.Chain{ID: broker.ChainID(anID("ch", "1")), Task: "rotate the keys",
		Labels: map[string]string{"env": "prod", "empty": ""}}
	node := func(end, holder string) broker.Delegation {
		return broker.Delegation{ID: broker.DelegationID(anID("dl", end)),
			Holder: spiffeid.RequireFromString("spiffe://example.org/" + holder)}
	}
	path := []broker.Delegation{node("a", "root"), node("b", "team/planner"), node("c", "team/writer/x")}
	at := func(n int) selector.Subject { return selector.Subject{Chain: chain, Path: path[:n], At: selectorNoon} }
	grant := at(3)
	grant.Grant, grant.Tool, grant.Args = broker.GrantID(anID("gr", "1")), "psql", args
	grant.Vault, grant.Bundle = brokertest.Path("database/creds/writer"), "sha256:abc"
	grant.Leaked = []broker.ValueDigest{broker.DigestValue("a value"), broker.DigestValue("another")}
	timeless := at(1)
	timeless.At = time.Time{}
	return map[string]selector.Subject{
		"root": at(1), "planner": at(2), "writer": at(3), "grant": grant, "timeless": timeless, "zero": {},
	}
}

// leakedAnother has the sum of "another" as sha256sum prints it.
const leakedAnother = "leaked:sha256:ae448ac86c4e8e4dec645729708ef41873ae79c6dff84eff73360989487f08e5"

func TestForLeaked(t *testing.T) {
	grant := subjects(t)["grant"]
	for value, want := range map[string]string{
		"another": leakedAnother, "another\n": leakedAnother, "another\r\n": leakedAnother,
	} {
		s := selector.ForLeaked(value)
		again, err := selector.Parse(s.String())
		if s.String() != want || err != nil || !s.Matches(grant) || !again.Matches(grant) {
			t.Errorf("ForLeaked(%q) = %s, %v; want %s, which matches the grant", value, s, err, want)
		}
		if broker.DigestValue(value) != broker.DigestValue("another") {
			t.Errorf("DigestValue(%q) counts the line break", value)
		}
	}
	for _, other := range []string{"another\n\n", " another", "Another", ""} {
		if s := selector.ForLeaked(other); s.String() == leakedAnother || s.Matches(grant) {
			t.Errorf("ForLeaked(%q) = %s", other, s)
		}
	}
}

func TestSelectorMatches(t *testing.T) {
	all, firstChain := subjects(t), "chain:"+anID("ch", "1")
	// The zero Subject has no chain, so that a selector of all chains but one matches it too.
	order := []string{"root", "planner", "writer", "grant", "timeless", "zero"}
	for text, want := range map[string]string{
		"chain:" + anID("ch", "1"):                         "root planner writer grant timeless",
		"chain:" + anID("ch", "2"):                         "",
		"subtree:" + anID("dl", "b"):                       "planner writer grant",
		"subtree:" + anID("dl", "c"):                       "writer grant",
		"grant:" + anID("gr", "1"):                         "grant",
		"not grant:" + anID("gr", "1"):                     "",
		"not grant:" + anID("gr", "2"):                     "grant",
		"spiffe:spiffe://example.org/root":                 "root timeless",
		"spiffe:spiffe://example.org/team/writer/x":        "writer grant",
		"spiffe:spiffe://example.org/team/*":               "planner writer grant",
		"spiffe:spiffe://example.org/team/writer/*":        "writer grant",
		"spiffe:spiffe://example.org/te/*":                 "",
		"spiffe:spiffe://example.org/root/*":               "",
		"spiffe:spiffe://example.org/*":                    "root planner writer grant timeless",
		"spiffe:spiffe://example.or/*":                     "",
		`task:"rotate the keys"`:                           "root planner writer grant timeless",
		"task:rotate":                                      "",
		"label.env:prod":                                   "root planner writer grant timeless",
		"label.env:dev":                                    "",
		`label.empty:""`:                                   "root planner writer grant timeless",
		`label.none:""`:                                    "",
		"not label.none:x and chain:" + anID("ch", "1"):    "root planner writer grant timeless",
		"tool:psql":                                        "grant",
		"not tool:psql":                                    "",
		"not tool:ssh":                                     "grant",
		"not not tool:psql":                                "grant",
		"arg.table:users":                                  "grant",
		"arg.table:user":                                   "",
		"arg.limit:5":                                      "grant",
		"arg.dry:true":                                     "grant",
		"arg.verbs:insert":                                 "grant",
		"arg.verbs:delete":                                 "",
		"not arg.verbs:delete":                             "grant",
		`arg.text:"a \"b\" ü"`:                             "grant",
		`arg.none:""`:                                      "",
		"vault:database/creds/writer":                      "grant",
		"vault:database/creds":                             "",
		"vault:database/*":                                 "grant",
		"vault:database/creds/*":                           "grant",
		"vault:data/*":                                     "",
		"vault:database/creds/writer/*":                    "",
		"bundle:sha256:abc":                                "grant",
		"not bundle:sha256:abc":                            "",
		leakedAnother:                                      "grant",
		"not " + leakedAnother:                             "",
		"leaked:sha256:" + strings.Repeat("0", 64):         "",
		"not leaked:sha256:" + strings.Repeat("0", 64):     "grant",
		leakedAnother + " or chain:" + anID("ch", "1"):     "root planner writer grant timeless",
		"since:2026-01-02T12:00:00Z":                       "root planner writer grant",
		"since:2026-01-02T12:00:01Z":                       "",
		"since:2026-01-02T13:00:00+01:00":                  "root planner writer grant",
		"until:2026-01-02T12:00:00Z":                       "",
		"until:2026-01-02T12:00:00.000000001Z":             "root planner writer grant",
		"not until:2026-01-02T12:00:00Z":                   "root planner writer grant",
		"tool:psql and spiffe:spiffe://example.org/team/*": "grant",
		"tool:psql or spiffe:spiffe://example.org/root":    "root grant timeless",
		"not (tool:psql or tool:ssh)":                      "",
		"not (tool:ssh and chain:" + anID("ch", "2") + ") and " + firstChain: "root planner writer grant timeless",
		"not (tool:ssh and chain:" + anID("ch", "1") + ")":                   "grant zero",
		"label.env:dev or label.env:prod and tool:psql":                      "grant",
		"(label.env:prod or label.env:dev) and tool:psql":                    "grant",
		"(tool:psql or label.env:prod) and not label.env:prod":               "",
	} {
		s, err := selector.Parse(text)
		if err != nil {
			t.Errorf("Parse(%s): %v", text, err)
			continue
		}
		var got []string
		for _, name := range order {
			if s.Matches(all[name]) {
				got = append(got, name)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s matches %q, want %q", text, got, want)
		}
	}
}

func TestZeroSelector(t *testing.T) {
	var zero selector.Selector
	for name, subject := range subjects(t) {
		if zero.Matches(subject) {
			t.Errorf("Selector{}.Matches(%s) = true, want false", name)
		}
	}
	if _, _, _, ok := zero.Target(); ok || zero.String() != "" {
		t.Errorf("Selector{} = %q with target %v, want nothing", zero, ok)
	}
	raw, err := json.Marshal(zero)
	again, _ := selector.Parse("tool:a")
	if err != nil || json.Unmarshal(raw, &again) != nil || again != zero {
		t.Errorf("Unmarshal(Marshal(Selector{})) = %q, %v, want the zero Selector", again, err)
	}
	if err := again.UnmarshalText([]byte("tool:psql or")); err == nil || again != zero {
		t.Errorf("UnmarshalText of garbage left %q, %v, want the zero Selector and an error", again, err)
	}
}

func TestSelectorIsCanonical(t *testing.T) {
	for text, want := range map[string]string{
		"  tool:a\tand\ntool:b ":             "tool:a and tool:b",
		"(tool:a)":                           "tool:a",
		"((tool:a)or(tool:b))":               "tool:a or tool:b",
		"(tool:a and tool:b) and tool:c":     "tool:a and tool:b and tool:c",
		"tool:a or (tool:b or tool:c)":       "tool:a or tool:b or tool:c",
		"(tool:a and tool:b) or tool:c":      "tool:a and tool:b or tool:c",
		"tool:a and (tool:b or tool:c)":      "tool:a and (tool:b or tool:c)",
		"not(tool:a)":                        "not tool:a",
		"not (not tool:a and tool:b)":        "not (not tool:a and tool:b)",
		"not not tool:a":                     "not not tool:a",
		"not tool:a and tool:b":              "not tool:a and tool:b",
		`tool:"a"`:                           "tool:a",
		`task:"a b"`:                         `task:"a b"`,
		`task:"a\x20b\u00e9"`:                `task:"a bé"`,
		`label.x:a:b\c`:                      `label.x:a:b\c`,
		`label.a.b:c`:                        `label.a.b:c`,
		"since:2026-01-02T13:00:00.50+01:00": "since:2026-01-02T12:00:00.5Z",
	} {
		s, err := selector.Parse(text)
		if err != nil || s.String() != want {
			t.Errorf("Parse(%q) = %q, %v, want %q", text, s, err, want)
		}
	}
}

func TestSelectorTarget(t *testing.T) {
	chain, node, grant := anID("ch", "1"), anID("dl", "1"), anID("gr", "1")
	for text, want := range map[string]string{
		"chain:" + chain:                        chain + "||",
		"( subtree:" + node + ")":               "|" + node + "|",
		"grant:" + grant:                        "||" + grant,
		"not chain:" + chain:                    "",
		"chain:" + chain + " or chain:" + chain: "",
		"tool:psql":                             "",
	} {
		s, err := selector.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if c, n, g, ok := s.Target(); ok {
			got = fmt.Sprintf("%s|%s|%s", c, n, g)
		}
		if got != want {
			t.Errorf("%s.Target() = %q, want %q", text, got, want)
		}
	}
}

func TestSelectorErrors(t *testing.T) {
	for text, want := range map[string]string{
		"":                            `character 1: expected a term such as chain:…, "not" or "(", found the end`,
		"  ":                          `character 3: expected a term`,
		"tool:a tool:b":               `character 8: expected "and", "or" or the end, found "tool:b"`,
		"tool:a adn tool:b":           `character 8: expected "and", "or" or the end, found "adn"`,
		"tool:a and":                  `character 11: expected a term such as chain:…, "not" or "(", found the end`,
		"tool:a or or tool:b":         `unknown term "or"`,
		"not":                         `character 4: expected a term`,
		"(tool:a":                     `character 8: expected "and", "or" or ")", found the end`,
		"tool:a)":                     `character 7: expected "and", "or" or the end, found ")"`,
		"()":                          `character 2: expected a term`,
		"tool":                        `character 5: expected ":" and a value after "tool", found the end`,
		"tool psql":                   `character 5: expected ":" and a value after "tool", found " "`,
		"tool:":                       `character 6: expected a value right after the colon, found the end`,
		"tool: a":                     `character 6: expected a value right after the colon, found " "`,
		"tool:A":                      `character 6: a tool name is`,
		"chian:x":                     `unknown term "chian"; did you mean chain?`,
		"Tool:a":                      `did you mean tool?`,
		"spifee:x":                    `did you mean spiffe?`,
		"labels.env:prod":             `did you mean label.NAME?`,
		"zebra:x":                     `unknown term "zebra"; expected one of chain, subtree`,
		"tool:a AND tool:b":           `found "AND"`,
		`task:"é" and hash:sha256:00`: `character 14: there is no term hash: for a leaked value write leaked:sha256:…`,
		"leaked:s3cret":               `character 8: expected sha256: and 64 lower-case hexadecimal digits`,
		"leaked:sha256:00":            `expected sha256: and 64`,
		"leaked:sha256:" + strings.Repeat("A", 64): `expected sha256: and 64`,
		"leaked:sha256:" + strings.Repeat("0", 66): `expected sha256: and 64`,
		"leaked:sha1:" + strings.Repeat("0", 64):   `expected sha256: and 64`,
		"chain:ch1":                                `character 7: chain id must be`,
		"subtree:" + anID("ch", ""):                `delegation id must be`,
		"grant:x":                                  `grant id must be`,
		"arg:users":                                `character 1: expected a name in arg.NAME`,
		"arg.:users":                               `expected a name in arg.NAME`,
		"arg.Table:users":                          `character 1: argument names are`,
		"label:x":                                  `expected a name in label.NAME`,
		"tool.x:a":                                 `expected tool without a name`,
		`task:""`:                                  `expected a value that is not empty`,
		`task:"a`:                                  `character 6: expected a value quoted as in Go`,
		`task:"\xff"`:                              `valid UTF-8`,
		`task:"a"b`:                                `character 9: expected a space after the value`,
		"task:é":                                   `character 6: expected a value right after the colon, found "é"`,
		"task:aé":                                  `character 7: expected a space after the value; quote`,
		"since:yesterday":                          `character 7: expected a time such as`,
		"until:2026-01-02":                         `expected a time such as`,
		"until:9999-12-31T23:59:59-01:00":          `expected a time such as`,
		"spiffe:example.org/a":                     `character 8: expected a SPIFFE ID such as`,
		"spiffe:spiffe://example.org":              `a whole trust domain is spiffe://example.org/*`,
		"spiffe:spiffe://example.org/a*":           `expected a SPIFFE ID`,
		"spiffe:spiffe://*":                        `expected a SPIFFE ID`,
		"spiffe:spiffe:///*":                       `expected a SPIFFE ID`,
		"spiffe:spiffe://EXAMPLE.org/a":            `expected a SPIFFE ID`,
		"spiffe:spiffe://example.org/a/../b":       `expected a SPIFFE ID`,
		"spiffe:spiffe://example.org/" + strings.Repeat("a", 2048): `at most 2048 bytes`,
		"vault:*":       `character 7: expected a Vault mount and role, or a mount and /*: segment 1 of`,
		"vault:/*":      `character 7: expected a Vault mount and role, or a mount and /*: a vault path is empty`,
		"vault:a//b":    `expected a Vault mount and role, or a mount and /*: segment 2 of a vault path: "" is empty`,
		"vault:a/../b":  `expected a Vault mount and role`,
		"vault:a*":      `expected a Vault mount and role`,
		"vault:a/*/b":   `expected a Vault mount and role`,
		"vault:a/*/*":   `expected a Vault mount and role`,
		`vault:"a b/c"`: `expected a Vault mount and role`,
		"vault:a/b%2fc": `expected a Vault mount and role`,
		"vault:a/-b":    `expected a Vault mount and role`,
		`vault:""`:      `expected a Vault mount and role`,
		"\xff":          `not valid UTF-8`,
	} {
		s, err := selector.Parse(text)
		if err == nil || !strings.Contains(err.Error(), want) || s != (selector.Selector{}) {
			t.Errorf("Parse(%.60q) = %q, %v, want an error with %q", text, s, err, want)
		}
	}
}

// TestParseRecorded checks that a rule of an earlier build still parses: with a vault term that names no path, and
// otherwise by the same rules.
func TestParseRecorded(t *testing.T) {
	for _, text := range []string{
		`vault:"a b/c"`, "vault:a/_b/*", "not vault:a%2fb and tool:psql", "vault:-a", "vault:database/*", "tool:psql",
	} {
		s, err := selector.ParseRecorded(text)
		if err != nil || s.String() != text {
			t.Errorf("ParseRecorded(%q) = %q, %v, want it as it is", text, s, err)
		}
	}
	s, err := selector.ParseRecorded("vault:a/_b/*")
	if err != nil {
		t.Fatal(err)
	}
	for name, subject := range subjects(t) {
		if s.Matches(subject) {
			t.Errorf("%s matches %s, want nothing", s, name)
		}
	}
	for _, text := range []string{
		"", "vault:", "vault", "tool:A", "tool:a)", "chain:x", "hash:x",
		"vault:*", "vault:/*", "vault:a*", "vault:a/*/*",
	} {
		if s, err := selector.ParseRecorded(text); err == nil {
			t.Errorf("ParseRecorded(%q) = %q, want an error", text, s)
		}
	}
}

func TestSelectorLimits(t *testing.T) {
	for name, text := range map[string]func(over int) string{
		"bytes": func(n int) string { return "task:" + strings.Repeat("a", selector.MaxBytes-5+n) },
		"parentheses": func(n int) string {
			n += selector.MaxDepth
			return strings.Repeat("(", n) + "tool:a" + strings.Repeat(")", n)
		},
		"nots":  func(n int) string { return strings.Repeat("not ", selector.MaxDepth+n) + "tool:a" },
		"terms": func(n int) string { return strings.Repeat("tool:a or ", selector.MaxTerms-1+n) + "tool:a" },
		"canonical": func(n int) string {
			const before, after = "tool:a and(tool:b or task:", ")and tool:c" // two spaces short of canonical
			return before + strings.Repeat("a", selector.MaxBytes-len(before+after)-2+n) + after
		},
	} {
		if _, err := selector.Parse(text(0)); err != nil {
			t.Errorf("%s at the limit: %v", name, err)
		}
		if _, err := selector.Parse(text(1)); err == nil {
			t.Errorf("%s over the limit: no error", name)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{
		"chain:" + anID("ch", "1"),
		"not (tool:psql or subtree:" + anID("dl", "b") + ") and spiffe:spiffe://example.org/team/*",
		`task:"rotate the keys" and label.env:prod or arg.text:"a \"b\" ü"`,
		"since:2026-01-02T12:00:00+01:00 and not until:2026-01-02T12:00:00Z",
		"vault:database/* or bundle:sha256:abc or grant:" + anID("gr", "1"), "not " + leakedAnother + " and tool:psql",
		`not not(label.a.b:"\n\t" and tool:a)`, "hash:sha256:00", "(tool:a",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := selector.Parse(text)
		if err != nil {
			return
		}
		again, err := selector.Parse(s.String())
		if err != nil || again.String() != s.String() {
			t.Fatalf("%q prints as %q, which reads as %q, %v", text, s, again, err)
		}
		for name, subject := range subjects(t) {
			if s.Matches(subject) != again.Matches(subject) {
				t.Fatalf("%q and %q differ on %s", text, s, name)
			}
		}
	})
}
