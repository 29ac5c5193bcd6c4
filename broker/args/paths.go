package args

import (
	"errors"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"
)

// lookalikes become a slash, a backslash or a dot, or disappear, in callees that normalize Unicode.
const lookalikes = "\u2024\u2025\u2044\u2215\u2216\ufe52\ufe68\uff0e\uff0f\uff3c\u200b\u200c\u200d\u2060\ufeff"

// subpath allows an absolute path and the paths below it. The callee must guard against links on the disk.
type subpath string

func newSubpath(s string) (bound, error) {
	if len(s) > MaxConstraintText || !plainPath(s) {
		return nil, errors.New("must be an absolute path in canonical spelling: no empty, . or .. segment, " +
			"no slash at the end, no %, backslash or control character")
	}
	return subpath(s), nil
}

// plainPath accepts one spelling of each absolute path. It refuses every percent sign, because callees differ in how
// often they decode.
func plainPath(s string) bool {
	if s == "/" {
		return true
	}
	return strings.HasPrefix(s, "/") && plainSegments(s[1:]) && !strings.ContainsAny(s, `\%`+lookalikes) &&
		utf8.ValidString(s) && !strings.ContainsFunc(s, isControl)
}

// plainSegments refuses empty segments, "." and "..".
func plainSegments(s string) bool {
	for segment := range strings.SplitSeq(s, "/") {
		if segment == "" || segment == "." || segment == ".." {
			return false
		}
	}
	return true
}

func isControl(r rune) bool { return r < 0x20 || r >= 0x7f && r < 0xa0 }

// below reports whether path is root or is below it, by whole segments.
func below(root, path string) bool {
	return path == root || root == "/" && strings.HasPrefix(path, "/") || strings.HasPrefix(path, root+"/")
}

func (r subpath) name() string     { return "subpath" }
func (r subpath) takes() valueKind { return stringValue }
func (r subpath) lead() string     { return string(r) }
func (r subpath) allows(v Value) bool {
	return v.kind == stringValue && below(string(r), v.s) && plainPath(v.s)
}
func (r subpath) covers(d bound) bool {
	in, ok := d.(subpath)
	return ok && below(string(r), string(in))
}
func (r subpath) appendBody(b []byte) []byte { return appendString(b, string(r)) }
func (r subpath) String() string             { return "path at or below " + strconv.Quote(string(r)) }

// location allows URLs of one scheme, host and port, with a path at or below its own. The query is free. A URL has one
// spelling: lower-case scheme and host, no user info, no fragment, no default port, and a path that webPath accepts.
type location struct {
	scheme string // http, https, ws or wss, which have a known default port
	host   string // a name, an address, or "*." and the name above the allowed names
	port   uint16 // never zero
	path   string // "/", or a path without a slash at the end
}

func newLocation(l location) (bound, error) {
	standard := defaultPort(l.scheme)
	if standard == 0 {
		return nil, errors.New("scheme must be http, https, ws or wss")
	}
	if l.port == 0 {
		l.port = standard
	}
	if l.path == "" {
		l.path = "/"
	}
	name := strings.TrimPrefix(l.host, "*.")
	if len(l.host) > MaxConstraintText || !isHostName(name) && (name != l.host || !isHostAddress(name)) {
		return nil, errors.New(`host must be a lower-case name, an address, or "*." and a name`)
	}
	if len(l.path) > MaxConstraintText || !webPath(l.path) || l.path != "/" && strings.HasSuffix(l.path, "/") {
		return nil, errors.New("path must begin with a slash, not end with one, and be canonical")
	}
	return l, nil
}

func defaultPort(scheme string) uint16 {
	switch scheme {
	case "https", "wss":
		return 443
	case "http", "ws":
		return 80
	}
	return 0
}

// isHostName accepts lower-case DNS names that no resolver reads as an address.
func isHostName(s string) bool {
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return false
		}
		for i := range len(l) {
			if c := l[i]; !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-') {
				return false
			}
		}
	}
	last := labels[len(labels)-1]
	return len(s) <= 253 && (last[0] < '0' || last[0] > '9')
}

func isHostAddress(s string) bool {
	inner, v6 := strings.CutPrefix(s, "[")
	if v6 {
		inner, v6 = strings.CutSuffix(inner, "]")
	}
	a, err := netip.ParseAddr(inner)
	return err == nil && a.String() == inner && a.Is6() == v6 && !a.Is4In6() && a.Zone() == ""
}

func (r location) name() string     { return "url" }
func (r location) takes() valueKind { return stringValue }

func (r location) allows(v Value) bool {
	rest, ok := strings.CutPrefix(v.s, r.scheme+"://")
	if !ok || v.kind != stringValue {
		return false
	}
	end := len(rest)
	if i := strings.IndexAny(rest, "/?"); i >= 0 {
		end = i
	}
	path, query, _ := strings.Cut(rest[end:], "?")
	if path == "" {
		path = "/"
	}
	host, ok := strings.CutSuffix(rest[:end], r.portText())
	_, plain := webText(query, "/?;", "")
	return ok && plain && host != r.wild() && r.admits(host) && below(r.path, path) && webPath(path)
}

// portText is the one spelling of the port. It is empty for the scheme's default port.
func (r location) portText() string {
	if r.port == defaultPort(r.scheme) {
		return ""
	}
	return ":" + strconv.Itoa(int(r.port))
}

// wild is the host if it is a wildcard, and otherwise empty.
func (r location) wild() string {
	if strings.HasPrefix(r.host, "*") {
		return r.host
	}
	return ""
}

// admits reports whether the host of a value or of a narrower bound is allowed.
func (r location) admits(host string) bool {
	if r.wild() == "" || host == r.host {
		return host == r.host
	}
	return strings.HasSuffix(host, r.host[1:]) && isHostName(strings.TrimPrefix(host, "*."))
}

func (r location) covers(d bound) bool {
	in, ok := d.(location)
	return ok && in.scheme == r.scheme && in.port == r.port && r.admits(in.host) && below(r.path, in.path)
}

// lead omits the path "/", because a URL may omit it.
func (r location) lead() string {
	if r.wild() != "" {
		return r.scheme + "://"
	}
	return r.scheme + "://" + r.host + r.portText() + strings.TrimSuffix(r.path, "/")
}

// webPath accepts a path that begins with a slash, in one spelling. Only its last segment may be empty, and none is
// "." or "..". It refuses semicolons, because some servers cut a segment there. It also refuses an escape of a
// semicolon, slash, backslash or percent sign, or of a lookalike of one.
func webPath(s string) bool {
	decoded, ok := webText(s, "/", `/\%;`)
	if !ok || !strings.HasPrefix(s, "/") || strings.ContainsAny(decoded, lookalikes) {
		return false
	}
	return s == "/" || plainSegments(strings.TrimSuffix(s[1:], "/"))
}

// webText decodes the characters of RFC 3986 section 3.3 except the semicolon, the characters in also, and upper-case
// escapes. It refuses escapes of unreserved characters, which have another spelling, of the characters in hidden, of
// control characters, and of bytes that are not UTF-8.
func webText(s, also, hidden string) (string, bool) {
	decoded := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c != '%' {
			if !unreserved(c) && strings.IndexByte("!$&'()*+,=:@"+also, c) < 0 {
				return "", false
			}
			decoded = append(decoded, c)
			continue
		}
		if i+2 >= len(s) {
			return "", false
		}
		high, low := strings.IndexByte(upperHex, s[i+1]), strings.IndexByte(upperHex, s[i+2])
		if high < 0 || low < 0 {
			return "", false
		}
		if c = byte(high<<4 | low); unreserved(c) || strings.IndexByte(hidden, c) >= 0 {
			return "", false
		}
		decoded = append(decoded, c)
		i += 2
	}
	text := string(decoded)
	return text, utf8.ValidString(text) && !strings.ContainsFunc(text, isControl)
}

const upperHex = "0123456789ABCDEF"

// unreserved reports whether a character is never escaped (RFC 3986 section 6.2.2.2).
func unreserved(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~", c) >= 0
}

func (r location) appendBody(b []byte) []byte {
	b = appendString(append(b, `{"scheme":`...), r.scheme)
	b = appendString(append(b, `,"host":`...), r.host)
	if r.portText() != "" {
		b = strconv.AppendInt(append(b, `,"port":`...), int64(r.port), 10)
	}
	if r.path != "/" {
		b = appendString(append(b, `,"path":`...), r.path)
	}
	return append(b, '}')
}

func (r location) String() string {
	return "URL at or below " + r.scheme + "://" + r.host + r.portText() + r.path
}
