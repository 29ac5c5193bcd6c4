package api_test

import (
	"reflect"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker/api"
)

func nested(depth int) string {
	return `{"tool":"t","args":` + strings.Repeat("[", depth-1) + strings.Repeat("]", depth-1) + `}`
}

func sized(bytes int) string {
	const frame = `{"tool":"","purpose":""}`
	return `{"tool":"","purpose":"` + strings.Repeat("x", bytes-len(frame)) + `"}`
}

// TestDecode lists bodies with the error for each; an empty error means acceptance.
func TestDecode(t *testing.T) {
	for name, row := range map[string]struct{ body, want string }{
		"good":                 {`{"tool":"db","args":{"n":1},"ttl_seconds":30}`, ""},
		"white space around":   {" \n{\"tool\":\"db\"}\t\r\n", ""},
		"as large as allowed":  {sized(api.MaxBody), ""},
		"one byte too large":   {sized(api.MaxBody + 1), "the body is longer than 65536 bytes"},
		"as deep as allowed":   {nested(api.MaxDepth), ""},
		"one too deep":         {nested(api.MaxDepth + 1), "the body is nested more than 32 deep"},
		"very deep":            {nested(30_000), "the body is nested more than 32 deep"},
		"empty":                {``, "the body is empty; send a JSON object"},
		"white space":          {"  \n", "the body is empty; send a JSON object"},
		"an array":             {`[]`, "the body must be a JSON object"},
		"a string":             {`"tool"`, "the body must be a JSON object"},
		"null":                 {`null`, "the body must be a JSON object"},
		"null member":          {`{"tool":null}`, `member "/tool" is null; omit it instead`},
		"null deep inside":     {`{"tool":"t","args":{"a":[null]}}`, `member "/args/a/0" is null; omit it instead`},
		"duplicate":            {`{"tool":"a","tool":"b"}`, `member "/tool" is given twice`},
		"duplicate in args":    {`{"tool":"a","args":{"x":1,"x":2}}`, `member "/args/x" is given twice`},
		"duplicate by escape":  {`{"tool":"a","t\u006fol":"b"}`, `member "/tool" is given twice`},
		"wrong case":           {`{"Tool":"a"}`, `unknown member "/Tool"`},
		"all upper case":       {`{"TOOL":"a"}`, `unknown member "/TOOL"`},
		"unknown":              {`{"tool":"a","agent":"b"}`, `unknown member "/agent"`},
		"followed by object":   {`{"tool":"a"}{}`, "there is trailing data after the JSON object"},
		"followed by bracket":  {`{"tool":"a"}]`, "there is trailing data after the JSON object"},
		"followed by NUL":      {"{\"tool\":\"a\"}\x00", "there is trailing data after the JSON object"},
		"cut off":              {`{"tool":"a"`, "the body is not valid JSON in UTF-8, from byte 11 on"},
		"comment":              {`{"tool":"a"/**/}`, "the body is not valid JSON in UTF-8, from byte 11 on"},
		"trailing comma":       {`{"tool":"a",}`, "the body is not valid JSON in UTF-8, from byte 11 on"},
		"byte order mark":      {"\ufeff{}", "the body is not valid JSON in UTF-8, from byte 0 on"},
		"invalid UTF-8":        {"{\"tool\":\"\xff\"}", "the body is not valid JSON in UTF-8, from byte 9 on"},
		"lone surrogate":       {`{"tool":"\ud800"}`, "the body is not valid JSON in UTF-8, from byte 9 on"},
		"string for a number":  {`{"tool":"a","ttl_seconds":"30"}`, `member "/ttl_seconds" has the wrong type or is out of range`},
		"fraction":             {`{"tool":"a","ttl_seconds":1.5}`, `member "/ttl_seconds" has the wrong type or is out of range`},
		"exponent":             {`{"tool":"a","ttl_seconds":1e3}`, `member "/ttl_seconds" has the wrong type or is out of range`},
		"over 64 bits":         {`{"tool":"a","ttl_seconds":9223372036854775808}`, `member "/ttl_seconds" has the wrong type or is out of range`},
		"number for a string":  {`{"tool":7}`, `member "/tool" has the wrong type or is out of range`},
		"NaN":                  {`{"tool":"a","ttl_seconds":NaN}`, "the body is not valid JSON in UTF-8, from byte 26 on"},
		"single quotes":        {`{'tool':'a'}`, "the body is not valid JSON in UTF-8, from byte 1 on"},
		"control in a string":  {"{\"tool\":\"a\nb\"}", "the body is not valid JSON in UTF-8, from byte 10 on"},
		"a very long name":     {`{"` + strings.Repeat("n", 5000) + `":1}`, `unknown member "/` + strings.Repeat("n", 79) + `"`},
		"an object for a list": {`{"tool":{}}`, `member "/tool" has the wrong type or is out of range`},
	} {
		t.Run(name, func(t *testing.T) {
			var got string
			if err := api.Decode([]byte(row.body), new(api.StepRequest)); err != nil {
				got = err.Error()
			}
			if got != row.want {
				t.Errorf("Decode(%.60q) = %q, want %q", row.body, got, row.want)
			}
		})
	}
}

// FuzzDecode checks that no input panics, and that an accepted body means the same after encoding.
func FuzzDecode(f *testing.F) {
	for _, seed := range []string{`{"task":"t","rights":[{"tool":"a","use":true,"args":{"x":{"one_of":["y"]}}}],"budget":{"tools":{"a":1}},"labels":{"k":"v"}}`,
		`{}`, `{"task":"a","task":"b"}`, `{"Task":""}`, `{"rights":null}`, `{}{}`, nested(40)} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var first, second api.OpenRequest
		if api.Decode(body, &first) != nil {
			return
		}
		again, err := json.Marshal(first, json.Deterministic(true))
		if err != nil {
			t.Fatalf("Decode accepted %q, which does not encode: %v", body, err)
		}
		if err := api.Decode(again, &second); err != nil && len(again) <= api.MaxBody {
			t.Fatalf("Decode(%q) = %v, want the same as for %q", again, err, body)
		}
		if third, _ := json.Marshal(second, json.Deterministic(true)); len(again) <= api.MaxBody && !reflect.DeepEqual(again, third) {
			t.Fatalf("%q became %q and then %q", body, again, third)
		}
	})
}
