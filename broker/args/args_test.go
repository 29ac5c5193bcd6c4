package args_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/args/argstest"
)

func TestParseIsCanonical(t *testing.T) {
	for raw, want := range map[string]string{
		`{}`:                                   `{}`,
		` { "b" : 1 , "a" : "x" } `:            `{"a":"x","b":1}`,
		`{"a":true,"b":false}`:                 `{"a":true,"b":false}`,
		`{"a":[]}`:                             `{"a":[]}`,
		`{"a":["y","x","y"]}`:                  `{"a":["y","x","y"]}`,
		`{"a":-9223372036854775808}`:           `{"a":-9223372036854775808}`,
		`{"a":9223372036854775807}`:            `{"a":9223372036854775807}`,
		`{"a":"\u00e9\ud83d\ude00\/"}`:         `{"a":"é😀/"}`,
		`{"a":"\u0000\b\t\n\f\r\u001f\u007f"}`: "{\"a\":\"\\u0000\\b\\t\\n\\f\\r\\u001f\x7f\"}",
		`{"a":"\"\\<>&\u2028"}`:                "{\"a\":\"\\\"\\\\<>&\u2028\"}",
		`{"\u0061":1}`:                         `{"a":1}`,
	} {
		a, err := args.Parse([]byte(raw))
		if err != nil || string(a.Canonical()) != want {
			t.Errorf("Parse(%s) = %s, %v, want %s", raw, a.Canonical(), err, want)
			continue
		}
		if a.Digest() != sha256.Sum256([]byte(want)) {
			t.Errorf("Digest of %s is not that of its canonical form", raw)
		}
	}
	var zero args.Args
	raw, err := json.Marshal(zero)
	if err != nil || string(raw) != "{}" || zero.Digest() != sha256.Sum256([]byte("{}")) {
		t.Errorf("Marshal(Args{}) = %s, %v, want {}", raw, err)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, raw := range []string{
		``, ` `, `null`, `[]`, `"a"`, `1`, `{`, `}`, `{}x`, `{}{}`, `{"a":1}]`, `{"a"}`, `{"a":}`, `{"a":1,}`, `{,}`,
		`{"a":1 "b":2}`, `{a:1}`, `{'a':1}`, `{"a" 1}`, `{"a":1,"a":1}`, `{"a":1,"\u0061":2}`,
		`{"a":null}`, `{"a":{}}`, `{"a":{"b":1}}`, `{"a":[1]}`, `{"a":[null]}`, `{"a":[["x"]]}`, `{"a":["x",]}`,
		`{"a":["x" "y"]}`, `{"a":["x"}`, `{"a":1.0}`, `{"a":1e3}`, `{"a":-0}`, `{"a":01}`, `{"a":+1}`,
		`{"a":9223372036854775808}`, `{"a":0x1}`, `{"a":NaN}`, `{"a":True}`,
		`{"A":1}`, `{"":1}`, `{"1a":1}`, `{"_a":1}`, `{"a-b":1}`, `{"a.b":1}`, `{"é":1}`, `{"a b":1}`,
		`{"a":"\ud800"}`, `{"a":"\udc00\ud800"}`, "{\"a\":\"\xff\"}", "{\"a\":\"\uFFFD\"}", `{"a":["\ud800"]}`,
		"{\"a\":\"\n\"}", `{"a":"\x"}`, `{"a":"`,
		"\ufeff{}",
	} {
		if a, err := args.Parse([]byte(raw)); err == nil {
			t.Errorf("Parse(%q) = %s, want an error", raw, a.Canonical())
		}
	}
}

func TestArgsLimits(t *testing.T) {
	repeat := func(n int, each func(i int) string) string {
		s := make([]string, n)
		for i := range s {
			s[i] = each(i)
		}
		return strings.Join(s, ",")
	}
	for name, raw := range map[string]func(over int) string{
		"arguments": func(n int) string {
			return "{" + repeat(args.MaxCount+n, func(i int) string { return fmt.Sprintf(`"a%d":1`, i) }) + "}"
		},
		"name":    func(n int) string { return `{"` + strings.Repeat("a", args.MaxName+n) + `":1}` },
		"string":  func(n int) string { return `{"a":"` + strings.Repeat("a", args.MaxString+n) + `"}` },
		"element": func(n int) string { return `{"a":["` + strings.Repeat("a", args.MaxString+n) + `"]}` },
		"elements": func(n int) string {
			return `{"a":[` + repeat(args.MaxElements+n, func(int) string { return `""` }) + `]}`
		},
		"bytes": func(n int) string {
			longest := func(i int) string { return fmt.Sprintf(`"a%d":"%s"`, i, strings.Repeat("a", args.MaxString)) }
			start := "{" + repeat(7, longest) + `,"b":"`
			return start + strings.Repeat("a", args.MaxBytes-len(start)-2+n) + `"}`
		},
	} {
		if _, err := args.Parse([]byte(raw(0))); err != nil {
			t.Errorf("%s at the limit: %v", name, err)
		}
		if _, err := args.Parse([]byte(raw(1))); err == nil {
			t.Errorf("%s over the limit: no error", name)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for name, values := range map[string]map[string]args.Value{
		"bad name":         {"A": args.Int(1)},
		"bad UTF-8":        {"a": args.String("\xff")},
		"bad UTF-8 inside": {"a": args.List("\xff")},
		"long":             {"a": args.String(strings.Repeat("a", args.MaxString+1))},
		"long list":        {"a": args.List(make([]string, args.MaxElements+1)...)},
	} {
		if a, err := args.New(values); err == nil {
			t.Errorf("New(%s) = %.80s, want an error", name, a.Canonical())
		}
	}
}

func TestArgsGet(t *testing.T) {
	a, err := args.New(map[string]args.Value{
		"n": args.Int(5), "b": args.Bool(true), "s": args.String("x"), "l": args.List("x", "y"),
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(a.Names()); got != "[b l n s]" {
		t.Errorf("Names() = %s, want them in order", got)
	}
	if _, ok := a.Get("none"); ok {
		t.Error("Get(none) = true, want false")
	}
	var again args.Args
	if err := json.Unmarshal(a.Canonical(), &again); err != nil || again.Digest() != a.Digest() {
		t.Errorf("Unmarshal(%s) = %s, %v", a.Canonical(), again.Canonical(), err)
	}
}

func TestValue(t *testing.T) {
	values := map[string]args.Value{
		"string": args.String("1"), "integer": args.Int(1), "boolean": args.Bool(true), "list": args.List("1"),
	}
	for kind, v := range values {
		if v.Kind() != kind {
			t.Errorf("Kind() = %s, want %s", v.Kind(), kind)
		}
		_, text := v.Text()
		_, number := v.Int64()
		_, truth := v.Truth()
		_, list := v.Strings()
		for is, got := range map[string]bool{"string": text, "integer": number, "boolean": truth, "list": list} {
			if got != (is == kind) {
				t.Errorf("a value of kind %s reads as %s: %v", kind, is, got)
			}
		}
		for other, w := range values {
			if v.Equal(w) != (kind == other) {
				t.Errorf("%s Equal %s = %v", kind, other, v.Equal(w))
			}
		}
	}
	for _, pair := range [][2]args.Value{
		{args.Bool(false), args.Int(0)}, {args.Bool(false), args.Bool(true)},
		{args.List("a", "b"), args.List("b", "a")}, {args.Int(math.MinInt64), args.Int(math.MaxInt64)},
	} {
		if pair[0].Equal(pair[1]) {
			t.Errorf("%v and %v are equal", pair[0], pair[1])
		}
	}
	if !(args.Value{}).Equal(args.String("")) || !args.List().Equal(args.List([]string{}...)) {
		t.Error("equal values differ")
	}
	elements := []string{"a"}
	v := args.List(elements...)
	elements[0] = "b"
	if !v.Equal(args.List("a")) {
		t.Error("List keeps the caller's slice")
	}
}

func FuzzParse(f *testing.F) {
	for _, raw := range []string{
		`{}`, `{"a":"x","b":[1]}`, `{"a":["x","\u00e9"],"n":-5,"t":true}`, `{"a":1,"a":2}`, `{"a":"\ud800"}`,
		` {"a" : "\u2028<"} `, `{"a":1e2}`, `{"a":null}x`,
	} {
		f.Add([]byte(raw))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		a, err := args.Parse(raw)
		if err != nil {
			return
		}
		canon := a.Canonical()
		again, err := args.Parse(canon)
		if err != nil || !bytes.Equal(again.Canonical(), canon) {
			t.Fatalf("Parse(%q) = %s, which reads as %s, %v", raw, canon, again.Canonical(), err)
		}
		if !json.Valid(raw) {
			t.Fatalf("Parse(%q) succeeded, and it is not JSON", raw)
		}
		if !reflect.DeepEqual(argstest.FromJSON(raw), argstest.FromJSON(canon)) {
			t.Fatalf("encoding/json reads %q and its canonical form %s differently", raw, canon)
		}
	})
}

// TestArgsReadBack checks that arguments read back after encoding/json has made them longer, as in the records of older
// builds.
func TestArgsReadBack(t *testing.T) {
	values := map[string]args.Value{}
	for _, name := range []string{"a", "b", "c", "d", "e", "f", "g"} {
		values[name] = args.String(strings.Repeat("<", args.MaxString))
	}
	args, err := args.New(values)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(broker.Grant{Args: args})
	if err != nil {
		t.Fatal(err)
	}
	var back broker.Grant
	if err := json.Unmarshal(raw, &back); err != nil || back.Args.Digest() != args.Digest() {
		t.Errorf("reading a grant back = %v, want the same arguments", err)
	}
}
