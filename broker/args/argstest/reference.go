package argstest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/pawlsec/pawl/broker/args"
)

// The reference evaluator decides from the wire form whether a value is inside a constraint. It shares no code with the
// product and uses other means if there are any: regular expressions, net, net/url, path. Speed is no goal.

// FromJSON reads JSON with exact numbers.
func FromJSON(raw []byte) (v any) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		panic(fmt.Sprintf("%s: %v", raw, err))
	}
	return v
}

// ToJSON writes JSON without escapes for HTML.
func ToJSON(v any) []byte {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return raw
}

// Allows evaluates a constraint's wire form.
func Allows(wire []byte, v args.Value) bool {
	return evaluate(FromJSON(wire), FromJSON(ToJSON(v)))
}

func evaluate(constraint, v any) bool {
	for kind, body := range constraint.(map[string]any) {
		return evaluateKind(kind, body, v)
	}
	return false
}

func evaluateKind(kind string, body, v any) bool {
	same := func(w any) bool { return bytes.Equal(ToJSON(v), ToJSON(w)) }
	switch kind {
	case "exact":
		return same(body)
	case "one_of":
		return slices.ContainsFunc(body.([]any), same)
	case "not_one_of":
		set := body.([]any)
		return fmt.Sprintf("%T", set[0]) == fmt.Sprintf("%T", v) && !slices.ContainsFunc(set, same)
	case "all":
		return !slices.ContainsFunc(body.([]any), func(c any) bool { return !evaluate(c, v) })
	case "range":
		n, ok := v.(json.Number)
		return ok && withinEnds(n, body.(map[string]any))
	case "subset":
		list, ok := v.([]any)
		foreign := func(e any) bool { return !slices.Contains(body.([]any), e) }
		return ok && len(list) > 0 && !slices.ContainsFunc(list, foreign)
	}
	s, ok := v.(string)
	return ok && evaluateText(kind, body, s)
}

func withinEnds(n json.Number, ends map[string]any) bool {
	number := func(n any) *big.Int { i, _ := new(big.Int).SetString(string(n.(json.Number)), 10); return i }
	low, high := ends["min"], ends["max"]
	return (low == nil || number(n).Cmp(number(low)) >= 0) && (high == nil || number(n).Cmp(number(high)) <= 0)
}

func evaluateText(kind string, body any, s string) bool {
	switch kind {
	case "prefix":
		return len(s) >= len(body.(string)) && s[:len(body.(string))] == body.(string)
	case "glob":
		return GlobExpr(body.(string)).MatchString(s)
	case "cidr":
		return evaluateNetwork(body.(string), s)
	case "subpath":
		clean := path.IsAbs(s) && path.Clean(s) == s
		return !strange.MatchString(s) && !strings.ContainsAny(s, `\%`) && clean && underRoot(body.(string), s)
	case "url":
		return evaluateURL(body.(map[string]any), s)
	case "shell":
		return evaluateShell(body.(map[string]any), s)
	}
	panic("no such kind: " + kind)
}

var globExprs = map[string]*regexp.Regexp{}

// GlobExpr returns a glob as a regular expression.
func GlobExpr(glob string) *regexp.Regexp {
	if len(globExprs) > 1000 { // a fuzzer has a glob for each input
		clear(globExprs)
	}
	if globExprs[glob] == nil {
		expr := strings.NewReplacer(`\*`, `[^/]*`, `\?`, `[^/]`).Replace(regexp.QuoteMeta(glob))
		globExprs[glob] = regexp.MustCompile(`(?s)\A` + expr + `\z`)
	}
	return globExprs[glob]
}

func underRoot(root, s string) bool {
	return strings.HasPrefix(strings.TrimSuffix(s, "/")+"/", strings.TrimSuffix(root, "/")+"/")
}

// strange matches the characters that no path may contain: control and invisible ones, and lookalikes of / \ and dots.
var strange = regexp.MustCompile("[\\pC\u2024\u2025\u2044\u2215\u2216\uFE52\uFE68\uFF0E\uFF0F\uFF3C]")

func evaluateNetwork(outer, s string) bool {
	_, n, err := net.ParseCIDR(outer)
	if err != nil {
		return false
	}
	if ip, inner, err := net.ParseCIDR(s); err == nil {
		size, _ := n.Mask.Size()
		innerSize, _ := inner.Mask.Size()
		return inner.String() == s && ip.Equal(inner.IP) && n.Contains(ip) && size <= innerSize
	}
	ip := net.ParseIP(s)
	return ip != nil && ip.String() == s && n.Contains(ip)
}

var (
	urlText = regexp.MustCompile(`^[a-z]+://[^/?]+(/([A-Za-z0-9._~!$&'()*+,=:@/-]|%[0-9A-F]{2})*)?` +
		`(\?([A-Za-z0-9._~!$&'()*+,=:@/?;-]|%[0-9A-F]{2})*)?$`)
	needless   = regexp.MustCompile(`%(4[1-9A-F]|5[0-9A]|6[1-9A-F]|7[0-9A]|3[0-9]|2D|2E|5F|7E)`)
	unreadable = regexp.MustCompile(`%([01][0-9A-F]|7F)`)
	hiding     = regexp.MustCompile(`%(2F|5C|25|3B)`)
	dnsName    = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z]([a-z0-9-]{0,61}[a-z0-9])?$`)
)

func evaluateURL(rule map[string]any, s string) bool {
	u, err := url.Parse(s)
	if err != nil || !urlText.MatchString(s) || needless.MatchString(s) || unreadable.MatchString(s) || u.User != nil {
		return false
	}
	ports := map[string]string{"http": "80", "ws": "80", "https": "443", "wss": "443"}
	standard := ports[rule["scheme"].(string)]
	want, given := standard, u.Port()
	if p, ok := rule["port"].(json.Number); ok {
		want = p.String()
	}
	if given == "" && !strings.HasSuffix(u.Host, ":") {
		given = standard
	} else if given == standard || given == "" || strings.HasPrefix(given, "0") {
		return false
	}
	host := strings.TrimSuffix(u.Host, ":"+u.Port())
	if suffix, wild := strings.CutPrefix(rule["host"].(string), "*."); wild {
		if !strings.HasSuffix(host, "."+suffix) || !dnsName.MatchString(host) {
			return false
		}
	} else if host != rule["host"] {
		return false
	}
	query, err := url.QueryUnescape(strings.ReplaceAll(u.RawQuery, "+", "%2B"))
	if err != nil || !utf8.ValidString(query) || regexp.MustCompile(`\p{Cc}`).MatchString(query) {
		return false
	}
	return u.Scheme == rule["scheme"] && given == want && evaluateWebPath(rule["path"], u)
}

func evaluateWebPath(root any, u *url.URL) bool {
	p, raw := u.Path, u.EscapedPath()
	if p == "" {
		p, raw = "/", "/"
	}
	if root == nil {
		root = "/"
	}
	clean := path.Clean(raw)
	return !hiding.MatchString(raw) && !strange.MatchString(p) && utf8.ValidString(p) &&
		(clean == raw || clean != "/" && clean+"/" == raw) && underRoot(root.(string), raw)
}

var shellWord = regexp.MustCompile(`^[A-Za-z0-9_./:=,@+-]+$`)

func evaluateShell(rule map[string]any, s string) bool {
	words := strings.Split(s, " ")
	command := rule["command"].([]any)
	patterns, _ := rule["words"].([]any)
	if len(words) < len(command) || len(s) > 2048 {
		return false
	}
	for i, w := range words {
		fits := func(p any) bool {
			option := strings.HasPrefix(p.(string), "-") == strings.HasPrefix(w, "-")
			return option && GlobExpr(p.(string)).MatchString(w)
		}
		choices, several := any(nil), false
		if i < len(command) {
			_, several = command[i].([]any)
			choices = command[i]
		}
		switch {
		case !shellWord.MatchString(w):
			return false
		case several && !slices.Contains(choices.([]any), any(w)):
			return false
		case choices != nil && !several && choices != w:
			return false
		case choices == nil && !slices.ContainsFunc(patterns, fits):
			return false
		}
	}
	return true
}
