package server_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/args"
)

// parse reads a constraint of the SDK as the broker does.
func parse(t *testing.T, c agent.Constraint) args.Constraint {
	t.Helper()
	raw, err := c.MarshalJSON()
	if err != nil {
		t.Fatalf("%v has no wire form: %v", c, err)
	}
	parsed, err := args.ParseConstraint(raw)
	if err != nil {
		t.Fatalf("ParseConstraint(%s) = %v, want it read", raw, err)
	}
	return parsed
}

type table string

// MarshalText must not be used: it would change the value.
func (table) MarshalText() ([]byte, error) { return []byte("wrong"), nil }

// TestConstraintForms: for each constructor of the SDK, the broker parses the wire form that
// [args.Constraint] documents.
func TestConstraintForms(t *testing.T) {
	for _, row := range []struct {
		made agent.Constraint
		want string // canonical wire form
	}{
		{agent.Exact("x"), `{"exact":"x"}`},
		{agent.Exact(`"\` + "\n<é"), `{"exact":"\"\\\n<é"}`},
		{agent.Exact(-7), `{"exact":-7}`},
		{agent.Exact(true), `{"exact":true}`},
		{agent.Exact([]string{"b", "a", "b"}), `{"exact":["b","a","b"]}`},
		{agent.Exact([]string(nil)), `{"exact":[]}`},
		{agent.Exact(table("orders")), `{"exact":"orders"}`},
		{agent.OneOf("b", "a", "b"), `{"one_of":["a","b"]}`},
		{agent.OneOf(uint16(443), 80), `{"one_of":[80,443]}`},
		{agent.OneOf(int64(math.MinInt64), math.MaxInt64), `{"one_of":[-9223372036854775808,9223372036854775807]}`},
		{agent.OneOf(true), `{"one_of":[true]}`},
		{agent.OneOf(table("orders")), `{"one_of":["orders"]}`},
		{agent.OneOf[string](), `{"one_of":[]}`},
		{agent.NotOneOf("root"), `{"not_one_of":["root"]}`},
		{agent.NotOneOf(22, 23), `{"not_one_of":[22,23]}`},
		{agent.Range(1, 9), `{"range":{"min":1,"max":9}}`},
		{agent.Range(math.MinInt64, 9), `{"range":{"max":9}}`},
		{agent.Range(1, math.MaxInt64), `{"range":{"min":1}}`},
		{agent.Prefix("a/"), `{"prefix":"a/"}`},
		{agent.Glob("web-*"), `{"glob":"web-*"}`},
		{agent.CIDR("10.0.0.0/8"), `{"cidr":"10.0.0.0/8"}`},
		{agent.CIDR("2001:db8::/32"), `{"cidr":"2001:db8::/32"}`},
		{agent.Subset("b", "a"), `{"subset":["a","b"]}`},
		{agent.Subpath("/srv/data"), `{"subpath":"/srv/data"}`},
		{agent.Subpath("/"), `{"subpath":"/"}`},
		{agent.URL("https://*.example.org:8443/v1"),
			`{"url":{"scheme":"https","host":"*.example.org","port":8443,"path":"/v1"}}`},
		{agent.URL("https://example.org"), `{"url":{"scheme":"https","host":"example.org"}}`},
		{agent.URL("https://example.org:443/"), `{"url":{"scheme":"https","host":"example.org"}}`},
		{agent.URL("ws://[2001:db8::1]:80/a"), `{"url":{"scheme":"ws","host":"[2001:db8::1]","path":"/a"}}`},
		{agent.URL("wss://[2001:db8::1]"), `{"url":{"scheme":"wss","host":"[2001:db8::1]"}}`},
		{agent.URL("http://192.0.2.1:8080"), `{"url":{"scheme":"http","host":"192.0.2.1","port":8080}}`},
		{agent.Shell([][]string{{"systemctl"}, {"restart", "status"}}, "web-*"),
			`{"shell":{"command":["systemctl",["restart","status"]],"words":["web-*"]}}`},
		{agent.Shell([][]string{{"uptime"}}), `{"shell":{"command":["uptime"]}}`},
		{agent.All(agent.Prefix("a"), agent.NotOneOf("ab")), `{"all":[{"prefix":"a"},{"not_one_of":["ab"]}]}`},
	} {
		got, err := parse(t, row.made).MarshalJSON()
		if err != nil || string(got) != row.want {
			t.Errorf("the broker reads %v as %s, %v, want %s", row.made, got, err, row.want)
		}
		var again agent.Constraint
		if err := json.Unmarshal(got, &again); err != nil || again.String() != row.want {
			t.Errorf("the SDK reads %s as %v, %v, want the same", got, again, err)
		}
	}
}

// TestConstraintRefused: the call that sends an invalid constraint fails, in the SDK or at the broker. The
// kind is the same, and the error has the tool, the argument and the accepted form.
func TestConstraintRefused(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	c := w.agent(t, "root")
	open := func(rights ...agent.Right) (*agent.Delegation, error) {
		return c.Open(ctx, agent.Chain{Task: "t", Depth: 1, Rights: rights})
	}
	d, err := open(agent.Right{Tool: "db", Use: true, Delegate: true})
	if err != nil {
		t.Fatal(err)
	}
	many := make([]string, 257)
	long := strings.Repeat("x", 8<<10+1)
	for _, row := range []struct {
		made   agent.Constraint
		accept string // part of the error
	}{
		{agent.Constraint{}, "the zero Constraint: make one with OneOf"},
		{agent.Exact(long), "exact: a string has at most 8192 bytes"},
		{agent.Exact([]string{"\xff"}), "exact: a string has at most 8192 bytes of valid UTF-8"},
		{agent.Exact(many), "exact: a list has at most 256 elements"},
		{agent.OneOf("\ufffd"), "one_of: a string has at most 8192 bytes of valid UTF-8, without U+FFFD"},
		{agent.OneOf(many...), "one_of: 0 to 256 members"},
		{agent.NotOneOf[int](), "not_one_of: 1 to 256 members"},
		{agent.Range(2, 1), "range: the least integer must not exceed the greatest: 2 is above 1"},
		{agent.Prefix(""), "prefix: a prefix has at least one character"},
		{agent.Prefix("\xff"), "prefix: a string has at most"},
		{agent.Glob("a**"), "glob: a pattern has 1 to 256 bytes"},
		{agent.Glob("[ab]"), "glob: a pattern has 1 to 256 bytes"},
		{agent.CIDR("10.0.0.1/8"), "cidr: a network is in canonical spelling and has no host bits"},
		{agent.CIDR("10.0.0.1"), "such as 10.0.0.0/8"},
		{agent.Subset(), "subset: 1 to 256 members"},
		{agent.Subpath("srv"), "subpath: a path is absolute"},
		{agent.Subpath("/srv/../etc"), "subpath: a path is absolute"},
		{agent.Subpath("/srv/%2e"), "subpath: must be an absolute path in canonical spelling"}, // by the broker
		{agent.URL("example.org"), "url: a URL has the scheme http, https, ws or wss"},
		{agent.URL("ftp://example.org"), "url: a URL has the scheme http, https, ws or wss"},
		{agent.URL("https://example.org:0"), "such as https://*.example.org:8443/v1"},
		{agent.URL("https://example.org:65536"), "such as https://*.example.org:8443/v1"},
		{agent.URL("https://Example.org"), "url: host must be a lower-case name"},
		{agent.URL("https://user@example.org"), "url: host must be a lower-case name"},
		{agent.URL("https://example.org/v1/"), "url: path must begin with a slash, not end with one"},
		{agent.URL("https://example.org/v1?q"), "url: path must begin with a slash, not end with one"},
		{agent.Shell(nil), "shell: a command has 1 to 32 words"},
		{agent.Shell([][]string{{"ls"}, {}}), "shell: a word of a command has 1 to 256 choices"},
		{agent.Shell([][]string{{"ls;"}}), "shell: the words of a command are letters, digits"},
		{agent.Shell([][]string{{"\xff"}}), "shell: a string is valid UTF-8"},
		{agent.All(), "all: 1 to 8 parts are needed"},
		{agent.All(agent.All(agent.Prefix("a"))), "all: a part must not be an All"},
		{agent.All(agent.Prefix("a"), agent.CIDR("x")), "all: cidr: a network is in canonical spelling"},
		{agent.All(agent.Constraint{}), "all: the zero Constraint"},
		{agent.OneOf(long[:6000], "a"+long[:6000], "b"+long[:6000]), "constraint has more than 16384 bytes"},
	} {
		right := agent.Right{Tool: "db", Use: true, Args: map[string]agent.Constraint{"table": row.made}}
		_, opening := open(right)
		_, passing := d.Delegate(ctx, "spiffe://example.org/sub", agent.Share{Rights: []agent.Right{right}})
		for call, err := range map[string]error{"Open": opening, "Delegate": passing} {
			const where = `argument "table" of tool "db": `
			text := fmt.Sprint(err)
			named := strings.Contains(text, where) && strings.Contains(text, row.accept)
			if !errors.Is(err, agent.ErrMalformed) || !named {
				t.Errorf("%s with %.100v = %v, want malformed with the argument and %q", call, row.made, err, row.accept)
			}
		}
	}
}

// same reports whether two constraints allow the same values.
func same(c, d args.Constraint) bool { return c.Covers(d) && d.Covers(c) }

// TestConstraintsPass: an agent passes on the constraints of its delegation unchanged.
func TestConstraintsPass(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	limits := map[string]agent.Constraint{
		"table": agent.All(agent.Glob("or*"), agent.NotOneOf("orders_old")),
		"rows":  agent.Range(1, 9),
	}
	rights := []agent.Right{{Tool: "db", Use: true, Delegate: true, Args: limits}}
	root, err := w.agent(t, "root").Open(ctx, agent.Chain{Task: "t", Depth: 1, Rights: rights})
	if err != nil {
		t.Fatal(err)
	}
	id, err := root.Delegate(ctx, "spiffe://example.org/sub", agent.Share{Rights: root.Info().Rights})
	if err != nil {
		t.Fatal(err)
	}
	sub, err := w.agent(t, "sub").Join(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range limits {
		got := sub.Info().Rights[0].Args[name]
		if !same(parse(t, got), parse(t, want)) {
			t.Errorf("the constraint of %q is %v after it was passed on, want %v", name, got, want)
		}
	}
}

// TestConstraintProperty: the SDK refuses no constraint that the broker accepts, and sends each with its
// meaning unchanged.
func TestConstraintProperty(t *testing.T) {
	text := rapid.OneOf(rapid.String(), rapid.StringMatching(`[a-z*?/.:%\[\] 0-9=-]{0,12}`),
		rapid.SampledFrom([]string{"10.0.0.0/8", "/srv/data", "::1/128", "*.example.org"}))
	texts, number := rapid.SliceOfN(text, 0, 4), rapid.Int64()
	type object = map[string]any
	rapid.Check(t, func(t *rapid.T) {
		s, list, n, m := text.Draw(t, "s"), texts.Draw(t, "list"), number.Draw(t, "n"), number.Draw(t, "m")
		command := rapid.SliceOfN(texts, 0, 3).Draw(t, "command")
		members, words := append([]string{}, list...), append([][]string{}, command...) // never null
		part, between := agent.Prefix(s), object{"range": object{"min": n, "max": m}}
		for _, c := range []struct {
			made agent.Constraint
			wire any
		}{
			{agent.Exact(s), object{"exact": s}},
			{agent.Exact(n), object{"exact": n}},
			{agent.Exact(list), object{"exact": members}},
			{agent.OneOf(list...), object{"one_of": members}},
			{agent.OneOf(n, m), object{"one_of": []int64{n, m}}},
			{agent.NotOneOf(list...), object{"not_one_of": members}},
			{agent.Range(n, m), between},
			{part, object{"prefix": s}},
			{agent.Glob(s), object{"glob": s}},
			{agent.CIDR(s), object{"cidr": s}},
			{agent.Subset(list...), object{"subset": members}},
			{agent.Subpath(s), object{"subpath": s}},
			{agent.Shell(command, list...), object{"shell": object{"command": words, "words": members}}},
			{agent.All(part, agent.Range(n, m)), object{"all": []any{object{"prefix": s}, between}}},
		} {
			raw, err := json.Marshal(c.wire)
			if err != nil {
				t.Fatal(err)
			}
			want, refused := args.ParseConstraint(raw)
			sent, err := c.made.MarshalJSON()
			if err != nil {
				if refused == nil {
					t.Fatalf("the SDK refuses %s: %v", raw, err)
				}
				continue
			}
			got, err := args.ParseConstraint(sent)
			if (err == nil) != (refused == nil) || err == nil && !same(got, want) {
				t.Fatalf("%s was sent as %s: the broker reads %v, %v, want %v, %v", raw, sent, got, err, want, refused)
			}
		}
	})
}
