package broker_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/args/argstest"
)

func TestParseToolName(t *testing.T) {
	long := strings.Repeat("a", broker.MaxToolName)
	for _, s := range []string{"a", "psql", "github.read", "web-1", "a.b-c.d", "a1", long} {
		if got, err := broker.ParseToolName(s); err != nil || string(got) != s {
			t.Errorf("ParseToolName(%q) = %q, %v, want it as it is", s, got, err)
		}
	}
	for _, s := range []string{
		"", "A", "psqL", "1a", "-a", ".a", "a.", "a-", "a..b", "a--b", "a.-b", "a_b", "a b", "a/b", "a*",
		"é", "aé", "а", "a\x00", "a\n", "a:b", long + "a",
	} {
		if got, err := broker.ParseToolName(s); err == nil || got != "" {
			t.Errorf("ParseToolName(%q) = %q, %v, want an error", s, got, err)
		}
	}
}

func TestNarrowing(t *testing.T) {
	if !(broker.NarrowNone < broker.NarrowProxy && broker.NarrowProxy < broker.NarrowNative) {
		t.Error("the labels are not in the order of their strength")
	}
	for text, want := range map[string]broker.Narrowing{
		"none": broker.NarrowNone, "proxy": broker.NarrowProxy, "native": broker.NarrowNative,
	} {
		var got struct{ N broker.Narrowing }
		raw, err := json.Marshal(struct{ N broker.Narrowing }{want})
		if err != nil || string(raw) != `{"N":"`+text+`"}` || json.Unmarshal(raw, &got) != nil || got.N != want {
			t.Errorf("narrowing %s in JSON = %s, read as %v, %v", text, raw, got.N, err)
		}
		if want.String() != text {
			t.Errorf("String() = %q, want %q", want, text)
		}
	}
	for _, text := range []string{"", "Native", "native ", "full", "3"} {
		n := broker.NarrowNative
		if err := n.UnmarshalText([]byte(text)); err == nil || n != broker.NarrowNone {
			t.Errorf("UnmarshalText(%q) left %v, %v, want none and an error", text, n, err)
		}
	}
	var n broker.Narrowing
	if err := json.Unmarshal([]byte(`2`), &n); err == nil {
		t.Errorf("Unmarshal(2) = %v, want an error", n)
	}
}

func TestToolCheck(t *testing.T) {
	small := argstest.Parse(`{"range":{"min":0,"max":9}}`)
	tool := broker.Tool{Name: "psql", Arguments: map[string]broker.Parameter{
		"table": {Kind: "string", Required: true},
		"limit": {Kind: "integer", Constraint: &small},
		"verbs": {Kind: "list"},
	}}
	for raw, want := range map[string]string{
		`{"table":"a"}`:                         "",
		`{"table":"a","limit":9,"verbs":["x"]}`: "",
		`{"table":"a","limit":10}`:              "limit",
		`{"table":"a","limit":"9"}`:             "limit",
		`{"table":1}`:                           "table",
		`{}`:                                    "table",
		`{"table":"a","where":"1=1"}`:           "where",
		`{"limit":-1,"other":true,"verbs":"x"}`: "limit other table verbs",
	} {
		args, err := args.Parse([]byte(raw))
		if err != nil {
			t.Fatal(err)
		}
		got := tool.Check(args)
		slices.Sort(got)
		if strings.Join(got, " ") != want {
			t.Errorf("Check(%s) = %q, want %q", raw, got, want)
		}
	}
}
