package args_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/args/argstest"
)

type valueList []any

var allowsRows = []struct {
	wire     string
	yes, non valueList
}{
	{`{"exact":"x"}`, valueList{"x"}, valueList{"", "X", "xx", 0, true, []string{"x"}}},
	{`{"exact":7}`, valueList{7}, valueList{"7", 8, true, []string{"7"}}},
	{`{"exact":false}`, valueList{false}, valueList{true, 0, "false", ""}},
	{`{"exact":["a","b"]}`, valueList{[]string{"a", "b"}}, valueList{[]string{"b", "a"}, []string{"a"}, "a",
		[]string{}}},
	{`{"exact":[]}`, valueList{[]string{}}, valueList{"", []string{""}}},
	{`{"one_of":["a","b"]}`, valueList{"a", "b"}, valueList{"c", "", "A", []string{"a"}, 0}},
	{`{"one_of":[1,2]}`, valueList{1, 2}, valueList{"1", 3, true}},
	{`{"one_of":[]}`, nil, valueList{"", 0, false, []string{}, "a"}},
	{`{"not_one_of":["prod"]}`, valueList{"dev", "", "Prod"}, valueList{"prod", 1, true, []string{"dev"}, []string{}}},
	{`{"not_one_of":[0]}`, valueList{1, -1}, valueList{0, "1", false}},
	{`{"range":{"min":1,"max":9}}`, valueList{1, 9}, valueList{0, 10, "5", true, []string{"5"}}},
	{`{"range":{"min":1}}`, valueList{1, math.MaxInt}, valueList{0, math.MinInt}},
	{`{"range":{"max":1}}`, valueList{1, math.MinInt}, valueList{2, math.MaxInt}},
	{`{"range":{}}`, valueList{math.MinInt, math.MaxInt}, valueList{"0", false}},
	{`{"prefix":"a/"}`, valueList{"a/", "a/b"}, valueList{"a", "b/", "", []string{"a/b"}, 1}},
	{`{"glob":"web-*"}`, valueList{"web-", "web-1", "web-é"}, valueList{"web", "web-1/2", "xweb-1", "WEB-1",
		[]string{"web-1"}}},
	{`{"glob":"?"}`, valueList{"a", "é", "*"}, valueList{"", "ab", "/"}},
	{`{"glob":"a?*b"}`, valueList{"axb", "axyb", "abb"}, valueList{"ab", "axb/", "a/b"}},
	{`{"glob":"*/*"}`, valueList{"a/b", "/"}, valueList{"a", "a/b/c"}},
	{`{"glob":"literal"}`, valueList{"literal"}, valueList{"literal ", "Literal"}},
	{`{"cidr":"10.0.0.0/8"}`, valueList{"10.0.0.0", "10.255.255.255", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32"},
		valueList{"11.0.0.0", "0.0.0.0/0", "10.0.0.0/7", "10.1.2.3/16", "010.0.0.1", "10.1", "167772161",
			"::ffff:10.0.0.1", "10.0.0.1 ", "", "10.0.0.1/032", []string{"10.0.0.1"}}},
	{`{"cidr":"2001:db8::/32"}`, valueList{"2001:db8::", "2001:db8::1", "2001:db8:1::/48"},
		valueList{"2001:DB8::1", "2001:db8:0::1", "2001:db8::1%eth0", "2001:db9::", "::/0", "10.0.0.1"}},
	{`{"cidr":"::/0"}`, valueList{"::1", "::"}, valueList{"::ffff:10.0.0.1", "::ffff:0:0/96", "0.0.0.0"}},
	{`{"subset":["a","b"]}`, valueList{[]string{"a"}, []string{"b", "a"}, []string{"a", "a"}}, valueList{[]string{},
		[]string{"a", "c"}, "a", []string{""}}},
	{`{"subpath":"/srv/data"}`, valueList{"/srv/data", "/srv/data/x", "/srv/data/x.y/..z", "/srv/data/ü"},
		valueList{"/srv", "/srv/database", "/srv/data/", "/srv/data/../x", "/srv/data/..", "/srv/data/./x",
			"/srv/data//x", "/srv/data/%2e%2e/x",
			"/srv/data/%2f", "/srv/data/a%b", `/srv/data/..\x`, "/srv/data/a\x00b", "/srv/data/a\nb", "srv/data/x", "",
			"//srv/data", "/srv/../srv/data",
			"/srv/data/\uff0e\uff0e/x", "/srv/data/..\uff0fx", "/srv/data/.\u200b./x", "/srv/data/\x7f",
			[]string{"/srv/data"}}},
	{`{"subpath":"/"}`, valueList{"/", "/a", "/a/b"}, valueList{"", "a", "//", "/..", "/a/"}},
	{`{"url":{"scheme":"https","host":"api.example.org","path":"/v1"}}`,
		valueList{"https://api.example.org/v1", "https://api.example.org/v1/",
			"https://api.example.org/v1/a%20b?q=1&r=%2F", "https://api.example.org/v1?x"},
		valueList{"http://api.example.org/v1", "https://api.example.org/v10", "https://api.example.org/",
			"https://api.example.org",
			"https://api.example.org:443/v1", "https://api.example.org:8443/v1", "https://API.example.org/v1",
			"HTTPS://api.example.org/v1",
			"https://u@api.example.org/v1", "https://u:p@api.example.org/v1", "https://api.example.org@evil.example/v1",
			"https://evil.example/https://api.example.org/v1",
			`https://api.example.org\@evil.example/v1`, `https://api.example.org/v1\..\admin`,
			"https://api.example.org./v1", "https://api.example.org:/v1",
			"https://api.example.org/v1/../admin", "https://api.example.org/v1/%2e%2e/admin",
			"https://api.example.org/v1/%2E%2E/admin", "https://api.example.org/v1/..%2Fadmin",
			"https://api.example.org/v1/..%5Cadmin", "https://api.example.org/v1/%252e%252e/admin",
			"https://api.example.org/v1/..;/admin", "https://api.example.org/v1/..%3Bx/admin",
			"https://api.example.org//v1", "https://api.example.org/v1//x", "https://api.example.org/v1/%2f",
			"https://api.example.org/v1/%61", "https://api.example.org/v1/%c3%a9",
			"https://api.example.org/v1/é", "https://api.example.org/v1/%C0%AF", "https://api.example.org/v1/%EF%BC%8F",
			"https://api.example.org/v1/%00", "https://api.example.org/v1/%",
			"https://api.example.org/v1/%4", "https://api.example.org/v1#f", "https://api.example.org/v1 ",
			" https://api.example.org/v1", "https://api.example.org/v1\n",
			"https://api.example.org/v1?a b", "https://api.example.org/v1?%0A", "https:api.example.org/v1",
			"https:///v1", "//api.example.org/v1", "", []string{"https://api.example.org/v1"}}},
	{`{"url":{"scheme":"https","host":"*.example.org"}}`,
		valueList{"https://a.example.org", "https://a.b.example.org/x?y", "https://a.example.org/",
			"https://xn--a.example.org"},
		valueList{"https://example.org", "https://.example.org", "https://aexample.org",
			"https://a.example.org.evil.example", "https://*.example.org", "https://a.example.org:8443",
			"https://-a.example.org", "https://a..example.org", "https://A.example.org",
			"https://evil.example/.example.org", "https://evil.example?.example.org",
			"https://evil.example#.example.org",
			`https://evil.example\.example.org`, "https://a@b.example.org", "https://a.example.org//",
			"https://a_b.example.org"}},
	{`{"url":{"scheme":"http","host":"[::1]","port":8080}}`, valueList{"http://[::1]:8080/", "http://[::1]:8080"},
		valueList{"http://[::1]/", "http://::1:8080/", "http://[::1]:08080/", "http://[0::1]:8080/"}},
	{`{"url":{"scheme":"http","host":"10.0.0.1"}}`, valueList{"http://10.0.0.1/"}, valueList{"http://167772161/",
		"http://10.0.0.01/", "http://10.0.0.1:80/"}},
	{`{"shell":{"command":["systemctl",["restart","status"]],"words":["web-*"]}}`,
		valueList{"systemctl restart web-1", "systemctl status web-1 web-2", "systemctl restart"},
		valueList{"systemctl", "systemctl stop web-1", "systemctl restart db-1", "systemctl restart web-1; id",
			"systemctl restart web-$(id)", "systemctl restart web-`id`",
			"systemctl restart web-1 && id", "systemctl restart 'web-1'", "systemctl restart web-*",
			"systemctl restart  web-1", " systemctl restart web-1", "systemctl restart web-1 ",
			"systemctl\trestart web-1", "systemctl restart web-1\n", "systemctl restart web-1\nid",
			"systemctl restart web-{1,2}", "systemctl restart web-~", "systemctl restart web-#",
			"systemctl restart web-1>x", "systemctl restart web-1|id", "systemctl restart web-é",
			`systemctl restart web-\x`, "systemctl restart -f", "", []string{"systemctl", "restart"}}},
	{`{"shell":{"command":["ls"],"words":["*","-l"]}}`, valueList{"ls a", "ls -l a"}, valueList{"ls -a", "ls --color",
		"ls a/b"}},
	{`{"shell":{"command":["uptime"]}}`, valueList{"uptime"}, valueList{"uptime x", "Uptime"}},
	{`{"all":[{"prefix":"web-"},{"not_one_of":["web-1"]}]}`, valueList{"web-2"}, valueList{"web-1", "db"}},
}

func TestConstraintAllows(t *testing.T) {
	for _, row := range allowsRows {
		c := argstest.Parse(row.wire)
		for i, v := range append(row.yes, row.non...) {
			want := i < len(row.yes)
			if got := c.Allows(argstest.ValueOf(v)); got != want {
				t.Errorf("%s.Allows(%q) = %v, want %v", row.wire, v, got, want)
			}
			if s, text := v.(string); text && strings.ContainsAny(s, "\x00\x7f") {
				continue // net/url and others reject these
			}
			if got := argstest.Allows([]byte(row.wire), argstest.ValueOf(v)); got != want {
				t.Errorf("reference: Allows(%s, %q) = %v, want %v", row.wire, v, got, want)
			}
		}
	}
}

func TestZeroConstraintAllowsNothing(t *testing.T) {
	var zero args.Constraint
	for _, v := range []any{"", "x", 0, false, []string{}} {
		if zero.Allows(argstest.ValueOf(v)) {
			t.Errorf("Constraint{}.Allows(%q) = true, want false", v)
		}
	}
	if one := argstest.Parse(`{"one_of":["a"]}`); zero.Covers(one) || !zero.Covers(zero) || !one.Covers(zero) {
		t.Error("the zero Constraint covers another, or is not covered by one")
	}
	if got := zero.String(); got != "nothing" {
		t.Errorf("Constraint{}.String() = %q, want nothing", got)
	}
}

func TestConstraintCovers(t *testing.T) {
	url := func(host, rest string) string { return `{"url":{"scheme":"https","host":"` + host + `"` + rest + `}}` }
	rows := []struct {
		outer, inner string
		want         bool
	}{
		{`{"exact":"a"}`, `{"one_of":["a"]}`, true},
		{`{"one_of":["a","b"]}`, `{"exact":"a"}`, true},
		{`{"one_of":["a"]}`, `{"one_of":["a","b"]}`, false},
		{`{"one_of":[1,2,3]}`, `{"range":{"min":1,"max":3}}`, true},
		{`{"one_of":[1,3]}`, `{"range":{"min":1,"max":3}}`, false},
		{`{"one_of":["a"]}`, `{"glob":"a"}`, true},
		{`{"one_of":["a"]}`, `{"glob":"a*"}`, false},
		{`{"one_of":["ls a","ls b"]}`, `{"shell":{"command":["ls",["a","b"]]}}`, true},
		{`{"exact":["a"]}`, `{"subset":["a"]}`, false},
		{`{"not_one_of":["a"]}`, `{"not_one_of":["a","b"]}`, true},
		{`{"not_one_of":["a","b"]}`, `{"not_one_of":["a"]}`, false},
		{`{"not_one_of":["a"]}`, `{"not_one_of":[1]}`, false},
		{`{"not_one_of":["a"]}`, `{"one_of":["b","c"]}`, true},
		{`{"not_one_of":["a"]}`, `{"prefix":"b"}`, true},
		{`{"not_one_of":["ab"]}`, `{"prefix":"a"}`, false},
		{`{"not_one_of":[5]}`, `{"range":{"min":6}}`, true},
		{`{"not_one_of":[5]}`, `{"range":{"min":5}}`, false},
		{`{"not_one_of":["a"]}`, `{"subset":["b"]}`, false},
		{`{"not_one_of":["/etc"]}`, `{"subpath":"/srv"}`, true},
		{`{"range":{"min":1,"max":9}}`, `{"range":{"min":1,"max":9}}`, true},
		{`{"range":{"min":1}}`, `{"range":{"min":0}}`, false},
		{`{"range":{"max":9}}`, `{"range":{"min":1}}`, false},
		{`{"range":{"min":1}}`, `{"one_of":[1,5]}`, true},
		{`{"range":{"min":1}}`, `{"one_of":["1"]}`, false},
		{`{"range":{}}`, `{"not_one_of":[1]}`, true},
		{`{"range":{}}`, `{"not_one_of":["1"]}`, false},
		{`{"prefix":"a"}`, `{"prefix":"ab"}`, true},
		{`{"prefix":"ab"}`, `{"prefix":"a"}`, false},
		{`{"prefix":"ab"}`, `{"glob":"ab*"}`, true},
		{`{"prefix":"ab"}`, `{"glob":"a*b"}`, false},
		{`{"prefix":"/srv/"}`, `{"subpath":"/srv/data"}`, true},
		{`{"prefix":"/srv/"}`, `{"subpath":"/srv"}`, false},
		{`{"prefix":"https://h.example"}`, url("h.example", ""), true},
		{`{"prefix":"https://h.example/"}`, url("h.example", ""), false},
		{`{"prefix":"https://h.example/"}`, url("h.example", `,"path":"/v1"`), true},
		{`{"prefix":"https://h.example:"}`, url("h.example", `,"port":8443`), true},
		{`{"prefix":"https://"}`, url("*.example", ""), true},
		{`{"prefix":"https://a"}`, url("*.example", ""), false},
		{`{"prefix":"systemctl r"}`, `{"shell":{"command":["systemctl","restart"],"words":["*"]}}`, true},
		{`{"prefix":"systemctl r"}`, `{"shell":{"command":["systemctl",["restart","stop"]],"words":["*"]}}`, false},
		{`{"glob":"*"}`, `{"glob":"a?b*"}`, true},
		{`{"glob":"*"}`, `{"glob":"a/*"}`, false},
		{`{"glob":"*"}`, `{"prefix":"a"}`, false},
		{`{"glob":"?*"}`, `{"glob":"*?"}`, true},
		{`{"glob":"?*"}`, `{"glob":"*a"}`, true},
		{`{"glob":"?*"}`, `{"glob":"*"}`, false},
		{`{"glob":"?"}`, `{"glob":"*"}`, false},
		{`{"glob":"*"}`, `{"glob":"?"}`, true},
		{`{"glob":"a*b*"}`, `{"glob":"ab*b"}`, true},
		{`{"glob":"*ab"}`, `{"glob":"*b"}`, false},
		{`{"glob":"a??"}`, `{"glob":"a?b"}`, true},
		{`{"glob":"a?b"}`, `{"glob":"a??"}`, false},
		{`{"cidr":"10.0.0.0/8"}`, `{"cidr":"10.1.0.0/16"}`, true},
		{`{"cidr":"10.1.0.0/16"}`, `{"cidr":"10.0.0.0/8"}`, false},
		{`{"cidr":"::/0"}`, `{"cidr":"10.0.0.0/8"}`, false},
		{`{"cidr":"10.0.0.0/8"}`, `{"one_of":["10.0.0.1","10.9.0.0/16"]}`, true},
		{`{"subset":["a","b"]}`, `{"subset":["b"]}`, true},
		{`{"subset":["b"]}`, `{"subset":["a","b"]}`, false},
		{`{"subset":["a","b"]}`, `{"exact":["b","a"]}`, true},
		{`{"subset":["a","b"]}`, `{"one_of":["a"]}`, false},
		{`{"subpath":"/srv"}`, `{"subpath":"/srv/data"}`, true},
		{`{"subpath":"/srv"}`, `{"subpath":"/srvdata"}`, false},
		{`{"subpath":"/"}`, `{"subpath":"/srv"}`, true},
		{`{"subpath":"/srv"}`, `{"prefix":"/srv/"}`, false},
		{url("*.example.org", ""), url("a.example.org", `,"path":"/x"`), true},
		{url("*.example.org", ""), url("*.a.example.org", ""), true},
		{url("*.example.org", ""), url("*.example.org", ""), true},
		{url("*.a.example.org", ""), url("*.example.org", ""), false},
		{url("*.example.org", ""), url("example.org", ""), false},
		{url("a.example.org", ""), url("*.example.org", ""), false},
		{url("h.example", `,"path":"/v1"`), url("h.example", `,"path":"/v1/x"`), true},
		{url("h.example", `,"path":"/v1"`), url("h.example", `,"path":"/v10"`), false},
		{url("h.example", `,"path":"/v1"`), url("h.example", ""), false},
		{url("h.example", ""), url("h.example", `,"port":8443`), false},
		{url("h.example", ""), url("h.example", `,"port":443`), true},
		{`{"url":{"scheme":"http","host":"h.example"}}`, url("h.example", ""), false},
		{`{"shell":{"command":["a"],"words":["b","c*"]}}`, `{"shell":{"command":["a","b"],"words":["cd*"]}}`, true},
		{`{"shell":{"command":["a","b"],"words":["*"]}}`, `{"shell":{"command":["a"],"words":["b"]}}`, false},
		{`{"shell":{"command":[["a","b"]],"words":["*"]}}`, `{"shell":{"command":["b"],"words":["x"]}}`, true},
		{`{"shell":{"command":["a"],"words":["*"]}}`, `{"shell":{"command":["a"],"words":["-x"]}}`, false},
		{`{"shell":{"command":["a"],"words":["-*"]}}`, `{"shell":{"command":["a"],"words":["-x*"]}}`, true},
		{`{"shell":{"command":["a"],"words":["?x"]}}`, `{"shell":{"command":["a","-x"],"words":["yx"]}}`, false},
		{`{"all":[{"prefix":"a"},{"glob":"*b"}]}`, `{"glob":"ac*b"}`, true},
		{`{"all":[{"prefix":"a"},{"glob":"*b"}]}`, `{"glob":"ac*"}`, false},
		{`{"prefix":"a"}`, `{"all":[{"prefix":"ab"},{"not_one_of":["abc"]}]}`, true},
		{`{"not_one_of":["x"]}`, `{"all":[{"prefix":"x"},{"not_one_of":["x"]}]}`, true},
		{`{"one_of":["ab"]}`, `{"all":[{"one_of":["ab","c"]},{"prefix":"a"}]}`, true},
		{`{"all":[{"prefix":"a"}]}`, `{"all":[{"prefix":"ab"},{"prefix":"abc"}]}`, true},
	}
	for _, row := range rows {
		if got := argstest.Parse(row.outer).Covers(argstest.Parse(row.inner)); got != row.want {
			t.Errorf("%s.Covers(%s) = %v, want %v", row.outer, row.inner, got, row.want)
		}
	}
	for _, row := range allowsRows {
		if c := argstest.Parse(row.wire); !c.Covers(c) {
			t.Errorf("%s.Covers(itself) = false, want true", row.wire)
		}
	}
}

func TestParseConstraintRefuses(t *testing.T) {
	text := func(n int) string { return strings.Repeat("a", n) }
	for _, wire := range []string{
		``, ` `, `null`, `1`, `"x"`, `[]`, `{}`, `{"exact":"x"} ` + `x`, `{"exact":"x"}{}`, `{"exact":"x",}`,
		`{"exact" "x"}`,
		`{"exact":"x","prefix":"x"}`, `{"exact":"x","exact":"x"}`, `{"Exact":"x"}`, `{"regex":"x"}`, `{"":1}`,
		`{"exact":null}`, `{"exact":1.5}`, `{"exact":1e3}`, `{"exact":9223372036854775808}`, `{"exact":{}}`,
		`{"exact":[1]}`, `{"exact":[["a"]]}`,
		"{\"exact\":\"\xff\"}", `{"exact":"\ud800"}`, `{"exact":"` + text(args.MaxString+1) + `"}`,
		`{"one_of":"a"}`, `{"one_of":null}`, `{"one_of":["a",1]}`, `{"one_of":[["a"]]}`, `{"one_of":[null]}`,
		`{"one_of":{"a":1}}`,
		`{"not_one_of":[]}`, `{"not_one_of":["a",true]}`, `{"subset":[]}`, `{"subset":[1]}`, `{"subset":"a"}`,
		`{"range":{"min":2,"max":1}}`, `{"range":{"min":"1"}}`, `{"range":{"min":null}}`, `{"range":{"low":1}}`,
		`{"range":{"min":1,"min":1}}`, `{"range":[1,2]}`, `{"range":{"min":0.5}}`,
		`{"prefix":""}`, `{"prefix":1}`, `{"prefix":["a"]}`,
		`{"glob":""}`, `{"glob":"a**"}`, `{"glob":"[ab]"}`, `{"glob":"{a,b}"}`, `{"glob":"\\*"}`,
		`{"glob":"` + text(257) + `"}`,
		`{"cidr":"10.0.0.1"}`, `{"cidr":"10.0.0.1/8"}`, `{"cidr":"10.0.0.0/33"}`, `{"cidr":"::ffff:10.0.0.0/104"}`,
		`{"cidr":"2001:DB8::/32"}`, `{"cidr":""}`, `{"cidr":"10.0.0.0/08"}`,
		`{"subpath":""}`, `{"subpath":"a"}`, `{"subpath":"/a/"}`, `{"subpath":"/a/.."}`, `{"subpath":"/a//b"}`,
		`{"subpath":"/%41"}`, `{"subpath":"/` + text(256) + `"}`,
		`{"url":{"scheme":"https"}}`, `{"url":{"host":"h"}}`, `{"url":{"scheme":"ftp","host":"h"}}`,
		`{"url":{"scheme":"HTTPS","host":"h"}}`, `{"url":{"scheme":"https","host":"*"}}`,
		`{"url":{"scheme":"https","host":"*."}}`, `{"url":{"scheme":"https","host":"*.10.0.0.1"}}`,
		`{"url":{"scheme":"https","host":"a.*.b"}}`, `{"url":{"scheme":"https","host":"H"}}`,
		`{"url":{"scheme":"https","host":"0x7f.1"}}`, `{"url":{"scheme":"https","host":"127.1"}}`,
		`{"url":{"scheme":"https","host":"::1"}}`, `{"url":{"scheme":"https","host":"[10.0.0.1]"}}`,
		`{"url":{"scheme":"https","host":"h","port":0}}`, `{"url":{"scheme":"https","host":"h","port":65536}}`,
		`{"url":{"scheme":"https","host":"h","port":"443"}}`,
		`{"url":{"scheme":"https","host":"h","path":"v1"}}`, `{"url":{"scheme":"https","host":"h","path":"/v1/"}}`,
		`{"url":{"scheme":"https","host":"h","path":"/a/../b"}}`,
		`{"url":{"scheme":"https","host":"h","path":"/a?b"}}`,
		`{"url":{"scheme":"https","host":"h","user":"u"}}`, `{"url":{"scheme":"https","host":"h","host":"h"}}`,
		`{"shell":{}}`, `{"shell":{"command":[]}}`, `{"shell":{"command":"ls"}}`, `{"shell":{"command":[""]}}`,
		`{"shell":{"command":["a b"]}}`, `{"shell":{"command":["A=b"]}}`, `{"shell":{"command":[[]]}}`,
		`{"shell":{"command":["ls"],"words":["a b"]}}`, `{"shell":{"command":["ls"],"words":["$x"]}}`,
		`{"shell":{"command":["ls"],"words":[["a"]]}}`, `{"shell":{"command":["l*"]}}`,
		`{"shell":{"command":["ls"],"x":1}}`,
		`{"all":[]}`, `{"all":[{}]}`, `{"all":[null]}`, `{"all":[{"all":[{"prefix":"a"}]}]}`, `{"all":{"prefix":"a"}}`,
		strings.Repeat(`{"all":[`, 100) + strings.Repeat(`]}`, 100),
	} {
		if c, err := args.ParseConstraint([]byte(wire)); err == nil || c.String() != "nothing" {
			t.Errorf("ParseConstraint(%.80s) = %.80v, %v, want nothing and an error", wire, c, err)
		}
	}
}

func TestConstraintWireIsCanonical(t *testing.T) {
	for _, row := range [][2]string{
		{` { "one_of" : [ "b", "a", "b" ] } `, `{"one_of":["a","b"]}`},
		{`{"one_of":[10,9]}`, `{"one_of":[9,10]}`},
		{`{"one_of":[]}`, `{"one_of":[]}`},
		{`{"all":[{"prefix":"a"},{"one_of":[]}]}`, `{"one_of":[]}`},
		{`{"exact":"\u003c\u2028"}`, "{\"exact\":\"<\u2028\"}"},
		{`{"range":{"max":9,"min":1}}`, `{"range":{"min":1,"max":9}}`},
		{`{"range":{"min":-9223372036854775808}}`, `{"range":{}}`},
		{`{"subset":["b","a","a"]}`, `{"subset":["a","b"]}`},
		{`{"url":{"path":"/","port":443,"host":"h","scheme":"https"}}`, `{"url":{"scheme":"https","host":"h"}}`},
		{`{"url":{"path":"/v1","port":80,"host":"h","scheme":"https"}}`,
			`{"url":{"scheme":"https","host":"h","port":80,"path":"/v1"}}`},
		{`{"shell":{"words":["b","a"],"command":[["ls"],["y","x"],"z"]}}`,
			`{"shell":{"command":["ls",["x","y"],"z"],"words":["a","b"]}}`},
		{`{"shell":{"words":[],"command":["ls"]}}`, `{"shell":{"command":["ls"]}}`},
		{`{"all":[{"prefix":"a"},{"not_one_of":["b","a"]},{"glob":"a?*"}]}`,
			`{"all":[{"prefix":"a"},{"not_one_of":["a","b"]},{"glob":"a?*"}]}`},
	} {
		wire, want := row[0], row[1]
		got, err := argstest.Parse(wire).MarshalJSON()
		if err != nil || string(got) != want {
			t.Errorf("constraint %s marshals as %s, %v, want %s", wire, got, err, want)
		}
	}
}

// TestConstraintSurvivesEncodingJSON checks a constraint in a larger value: encoding/json escapes more.
func TestConstraintSurvivesEncodingJSON(t *testing.T) {
	long := strings.Repeat("<", args.MaxString)
	right := broker.Right{Tool: "x", Use: true,
		Args: map[string]args.Constraint{"a": argstest.Parse(fmt.Sprintf(`{"exact":%q}`, long)), "b": {}}}
	raw, err := json.Marshal(right)
	if err != nil {
		t.Fatal(err)
	}
	var got broker.Right
	if err := json.Unmarshal(raw, &got); err != nil {
		t.Fatalf("Unmarshal(Marshal(right)): %v", err)
	}
	if !got.Args["a"].Allows(args.String(long)) || got.Args["b"].Allows(args.String("")) {
		t.Errorf("Unmarshal(Marshal(right)) = %.80v, want the same constraints", got)
	}
}

func TestConstraintLimits(t *testing.T) {
	set := func(n int) string {
		s := make([]string, n)
		for i := range s {
			s[i] = fmt.Sprint(i)
		}
		return string(argstest.ToJSON(s))
	}
	a := func(n int) string { return strings.Repeat("a", n) }
	parts := func(n int) string { return strings.Repeat(`{"prefix":"a"},`, n-1) + `{"prefix":"a"}` }
	for name, wire := range map[string]func(over int) string{
		"members":  func(n int) string { return `{"one_of":` + set(args.MaxConstraintSet+n) + `}` },
		"excluded": func(n int) string { return `{"not_one_of":` + set(args.MaxConstraintSet+n) + `}` },
		"subset":   func(n int) string { return `{"subset":` + set(args.MaxConstraintSet+n) + `}` },
		"command":  func(n int) string { return `{"shell":{"command":` + set(args.MaxConstraintWords+n) + `}}` },
		"words": func(n int) string {
			return `{"shell":{"command":["a"],"words":` + set(args.MaxConstraintWords+n) + `}}`
		},
		"choices": func(n int) string { return `{"shell":{"command":[` + set(args.MaxConstraintSet+n) + `]}}` },
		"word":    func(n int) string { return `{"shell":{"command":["` + a(args.MaxConstraintText+n) + `"]}}` },
		"host": func(n int) string {
			return `{"url":{"scheme":"https","host":"` + strings.Repeat("a.", 126) + a(1+n) + `"}}`
		},
		"pattern": func(n int) string { return `{"glob":"` + a(args.MaxConstraintText+n) + `"}` },
		"path":    func(n int) string { return `{"subpath":"/` + a(args.MaxConstraintText-1+n) + `"}` },
		"url path": func(n int) string {
			return `{"url":{"scheme":"https","host":"h","path":"/` + a(args.MaxConstraintText-1+n) + `"}}`
		},
		"string": func(n int) string { return `{"prefix":"` + a(args.MaxString+n) + `"}` },
		"parts":  func(n int) string { return `{"all":[` + parts(args.MaxConstraintParts+n) + `]}` },
		"canonical": func(n int) string {
			return `{"one_of":["` + a(8191) + `","` + a(args.MaxConstraint-8191-18+n) + `"]}`
		},
	} {
		if _, err := args.ParseConstraint([]byte(wire(0))); err != nil {
			t.Errorf("%s at the limit: %v", name, err)
		}
		if _, err := args.ParseConstraint([]byte(wire(1))); err == nil {
			t.Errorf("%s over the limit: no error", name)
		}
	}
}

func TestShellLineLimit(t *testing.T) {
	c := argstest.Parse(`{"shell":{"command":["ls"],"words":["*"]}}`)
	for over, want := range []bool{true, false} {
		line := "ls " + strings.Repeat("a", args.MaxConstraintLine-3+over)
		if got := c.Allows(args.String(line)); got != want {
			t.Errorf("Allows(a line of %d bytes) = %v, want %v", len(line), got, want)
		}
	}
}

func TestConstraintReadsWell(t *testing.T) {
	for wire, want := range map[string]string{
		`{"exact":"x"}`:               `exactly "x"`,
		`{"one_of":["a","b"]}`:        `one of "a", "b"`,
		`{"not_one_of":[1,2]}`:        `none of 1, 2`,
		`{"range":{"min":1,"max":9}}`: `from 1 to 9`,
		`{"range":{"min":1}}`:         `at least 1`,
		`{"range":{"max":1}}`:         `at most 1`,
		`{"range":{}}`:                `any integer`,
		`{"prefix":"a/"}`:             `begins with "a/"`,
		`{"glob":"web-*"}`:            `matches "web-*"`,
		`{"cidr":"10.0.0.0/8"}`:       `inside 10.0.0.0/8`,
		`{"subset":["a"]}`:            `a list of any of "a"`,
		`{"subpath":"/srv"}`:          `path at or below "/srv"`,
		`{"url":{"scheme":"https","host":"h","port":8443}}`:        `URL at or below https://h:8443/`,
		`{"shell":{"command":["a",["b","c"]],"words":["x*","y"]}}`: `command line a b|c, then words like x* y`,
		`{"all":[{"prefix":"a"},{"not_one_of":["ab"]}]}`:           `begins with "a", and none of "ab"`,
	} {
		if got := argstest.Parse(wire).String(); got != want {
			t.Errorf("%s.String() = %q, want %q", wire, got, want)
		}
	}
}

// FuzzParseConstraint checks that an accepted constraint has the same meaning in its canonical form and for the
// reference evaluator. It makes values of the input to compare them.
func FuzzParseConstraint(f *testing.F) {
	for _, row := range allowsRows {
		f.Add([]byte(row.wire), "x")
		for _, v := range append(slices.Clone(row.yes), row.non...) {
			f.Add([]byte(row.wire), string(argstest.ToJSON(v)))
			if s, ok := v.(string); ok {
				f.Add([]byte(row.wire), s)
			}
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte, text string) {
		c, err := args.ParseConstraint(raw)
		if err != nil {
			return
		}
		wire, err := c.MarshalJSON()
		if err != nil {
			t.Fatalf("%q.MarshalJSON: %v", raw, err)
		}
		again, err := args.ParseConstraint(wire)
		if err != nil {
			t.Fatalf("ParseConstraint(%s), canonical: %v", wire, err)
		}
		if twice, _ := again.MarshalJSON(); string(twice) != string(wire) {
			t.Fatalf("%q marshals as %s and then as %s", raw, wire, twice)
		}
		if !c.Covers(again) || !again.Covers(c) {
			t.Fatalf("%s does not cover itself", wire)
		}
		if !json.Valid(raw) || c.String() != again.String() {
			t.Fatalf("%q and its canonical form %s differ", raw, wire)
		}
		for _, v := range valuesNear(argstest.FromJSON(raw), text) {
			want := argstest.Allows(raw, v)
			if got, same := c.Allows(v), again.Allows(v); got != want || same != want {
				t.Fatalf("%q allows %s = %v, and its canonical form = %v; the reference says %v", raw,
					argstest.ToJSON(v), got, same, want)
			}
		}
	})
}

// valuesNear returns the arguments that can be read from a text, and others made of parts of a constraint. Random
// values would hardly ever be allowed.
func valuesNear(constraint any, text string) (near []args.Value) {
	add := func(values ...any) {
		for _, v := range values {
			args, err := args.Parse([]byte(`{"v":` + string(argstest.ToJSON(v)) + `}`))
			if got, ok := args.Get("v"); err == nil && ok { // else no step can have it
				near = append(near, got)
			}
		}
	}
	add(text, strings.Split(text, ","), "")
	if json.Valid([]byte(text)) {
		add(json.RawMessage(text))
	}
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			for _, name := range slices.Sorted(maps.Keys(v)) {
				walk(v[name])
			}
		case []any:
			add(v)
			for _, e := range v {
				walk(e)
			}
		case string:
			add(v, v+text, text+v, []string{v}, []string{v, text})
		case json.Number:
			if n, err := v.Int64(); err == nil {
				add(n-1, n, n+1)
			}
		default:
			add(v)
		}
	}
	walk(constraint)
	return near
}
