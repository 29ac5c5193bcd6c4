package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Constraint limits one argument. The functions below make constraints. The constraints in a
// delegation's [Info] may be passed on unchanged.
//
// Open and Delegate refuse an invalid constraint, and the zero one, with ErrMalformed. The error names
// the tool and the argument, and gives the accepted form. The functions check sizes and simple forms.
// The broker checks the rest: the spelling of paths, hosts and words, and the size of a whole
// constraint, at most 16 KiB.
//
// Only Exact and Subset allow lists. Strings compare byte by byte. A string in a constraint has at
// most 8 KiB of valid UTF-8, without U+FFFD.
type Constraint struct {
	wire string // the broker's form, such as {"one_of":["orders"]}; empty: the zero Constraint
	err  error
}

// Scalar is any argument except a list.
type Scalar interface {
	~string | ~bool | ~int | ~int8 | ~int16 | ~int32 | ~int64 | ~uint8 | ~uint16 | ~uint32
}

// The broker's limits on a constraint.
const (
	maxString  = 8 << 10 // bytes of a value
	maxPattern = 256     // bytes of a glob or a path
	maxSet     = 256     // members of a set, choices for a word
	maxWords   = 32      // words of a command, patterns for further words
	maxParts   = 8       // parts of All
)

// Exact allows v alone.
func Exact[T Scalar | []string](v T) Constraint {
	value, err := plain(v)
	return constraint("exact", value, err)
}

// OneOf allows these values, at most 256. Without values it allows nothing.
func OneOf[T Scalar](values ...T) Constraint { return set("one_of", values, 0) }

// NotOneOf allows all values of the same kind (string, integer or boolean) except these, 1 to 256. It
// is weak where the target accepts two spellings of one value, such as upper and lower case.
func NotOneOf[T Scalar](values ...T) Constraint { return set("not_one_of", values, 1) }

// Range allows the integers from least to most, both included. math.MinInt64 and math.MaxInt64 leave
// an end open.
func Range(least, most int64) Constraint {
	var err error
	if least > most {
		err = fmt.Errorf("the least integer must not exceed the greatest: %d is above %d", least, most)
	}
	return constraint("range", map[string]int64{"min": least, "max": most}, err)
}

// Prefix allows the strings that begin with s. It refuses an empty s. For paths use [Subpath].
func Prefix(s string) Constraint {
	err := checkString(s)
	if s == "" {
		err = errors.New("a prefix has at least one character; an empty one would allow everything")
	}
	return constraint("prefix", s, err)
}

// Glob allows the strings that match a pattern of 1 to 256 bytes. A * is any run of characters and a ?
// any one character, except slashes. The pattern has no \ [ ] { } and no **.
func Glob(pattern string) Constraint {
	err := checkString(pattern)
	plain := !strings.ContainsAny(pattern, `\[]{}`) && !strings.Contains(pattern, "**")
	if pattern == "" || len(pattern) > maxPattern || !plain {
		err = fmt.Errorf(`a pattern has 1 to %d bytes, * and ? as wildcards, and no \ [ ] { } or **`, maxPattern)
	}
	return constraint("glob", pattern, err)
}

// CIDR allows the addresses and networks inside a network such as "10.0.0.0/8". The network is in its
// canonical spelling and has no host bits.
func CIDR(network string) Constraint {
	p, err := netip.ParsePrefix(network)
	if err != nil || p.Masked().String() != network || p.Addr().Is4In6() {
		err = errors.New("a network is in canonical spelling and has no host bits, such as 10.0.0.0/8")
	}
	return constraint("cidr", network, err)
}

// Subset allows the lists of one or more elements that are all among these, 1 to 256.
func Subset(elements ...string) Constraint { return set("subset", elements, 1) }

// Subpath allows an absolute path and those below it, in canonical spelling. It has at most 256 bytes,
// no slash at the end and no empty, "." or ".." segment.
func Subpath(root string) Constraint {
	err := checkString(root)
	if !path.IsAbs(root) || path.Clean(root) != root || len(root) > maxPattern {
		err = fmt.Errorf(`a path is absolute, such as /srv/data, and has at most %d bytes, no slash at the end `+
			`and no empty, "." or ".." segment`, maxPattern)
	}
	return constraint("subpath", root, err)
}

// URL allows the URLs at base or below its path, such as "https://api.example.org/v1". Scheme, host and
// port are the same as in base. The query is free. The scheme is http, https, ws or wss. Without a port
// the scheme's default applies. A host such as "*.example.org" allows each name below example.org.
func URL(base string) Constraint {
	var body struct {
		Scheme string `json:"scheme"`
		Host   string `json:"host"`
		Port   uint64 `json:"port,omitzero"`
		Path   string `json:"path,omitzero"`
	}
	scheme, rest, _ := strings.Cut(base, "://")
	body.Scheme, body.Host = scheme, rest
	if slash := strings.IndexByte(rest, '/'); slash >= 0 {
		body.Host, body.Path = rest[:slash], rest[slash:]
	}
	valid := checkString(base) == nil && slices.Contains([]string{"http", "https", "ws", "wss"}, scheme)
	colon := strings.LastIndexByte(body.Host, ':')
	if colon > strings.LastIndexByte(body.Host, ']') { // outside of an address such as [::1]
		port, err := strconv.ParseUint(body.Host[colon+1:], 10, 16)
		valid = valid && err == nil && port > 0
		body.Host, body.Port = body.Host[:colon], port
	}
	var err error
	if !valid || body.Host == "" {
		err = errors.New("a URL has the scheme http, https, ws or wss, a host, and optionally a port and a path, " +
			"such as https://*.example.org:8443/v1")
	}
	return constraint("url", body, err)
}

// Shell allows command lines of plain words, with one space between two words. Each element of command
// lists the choices for one word, in order. Each further word of a line must match one of the patterns.
// Without patterns, no further words are allowed. This one allows "systemctl restart web-1 web-2":
//
//	agent.Shell([][]string{{"systemctl"}, {"restart", "status"}}, "web-*")
//
// A plain word consists of letters, digits and _ - . / : = , @ +. The first word has no =. A command has
// 1 to 32 words, 1 to 256 choices for each, and at most 2 KiB. There are at most 32 patterns, with the
// wildcards of [Glob]. A word that begins with a hyphen needs a pattern that begins with one.
func Shell(command [][]string, patterns ...string) Constraint {
	var body struct {
		Command []any    `json:"command"`
		Words   []string `json:"words,omitempty"`
	}
	body.Words = patterns
	var err error
	if len(command) == 0 || len(command) > maxWords || len(patterns) > maxWords {
		err = fmt.Errorf("a command has 1 to %d words, and at most as many patterns follow", maxWords)
	}
	for _, choices := range command {
		if len(choices) == 0 || len(choices) > maxSet {
			err = fmt.Errorf("a word of a command has 1 to %d choices", maxSet)
		}
		if len(choices) == 1 {
			body.Command = append(body.Command, choices[0])
		} else {
			body.Command = append(body.Command, choices)
		}
	}
	return constraint("shell", body, err)
}

// All allows the values that every part allows. It takes 1 to 8 parts, and no part may be an All.
func All(parts ...Constraint) Constraint {
	var err error
	if len(parts) == 0 || len(parts) > maxParts {
		err = fmt.Errorf("1 to %d parts are needed", maxParts)
	}
	body := make([]jsontext.Value, len(parts))
	for i, part := range parts {
		switch _, nested := strings.CutPrefix(part.wire, `{"all":`); {
		case nested:
			err = errors.New("a part must not be an All")
		case part.check() != nil:
			err = part.check()
		}
		body[i] = jsontext.Value(part.wire)
	}
	return constraint("all", body, err)
}

// constraint encodes a constraint of one kind, unless it is wrong.
func constraint(kind string, body any, wrong error) Constraint {
	if wrong != nil {
		return Constraint{err: fmt.Errorf("%s: %w", kind, wrong)}
	}
	raw, err := json.Marshal(map[string]any{kind: body}, json.Deterministic(true))
	if err != nil {
		return Constraint{err: fmt.Errorf("%s: a string is valid UTF-8", kind)}
	}
	return Constraint{wire: string(raw)}
}

// set makes a constraint of a list of scalars.
func set[T Scalar](kind string, values []T, atLeast int) Constraint {
	if len(values) < atLeast || len(values) > maxSet {
		return constraint(kind, nil, fmt.Errorf("%d to %d members are needed", atLeast, maxSet))
	}
	body := make([]any, len(values))
	for i, v := range values {
		var err error
		if body[i], err = plain(v); err != nil {
			return constraint(kind, nil, err)
		}
	}
	return constraint(kind, body, nil)
}

// plain gives a value of an unnamed type: a method of a named one could change its JSON.
func plain(v any) (any, error) {
	switch r := reflect.ValueOf(v); {
	case r.Kind() == reflect.String:
		return r.String(), checkString(r.String())
	case r.CanInt():
		return r.Int(), nil
	case r.CanUint():
		return r.Uint(), nil
	case r.Kind() == reflect.Bool:
		return r.Bool(), nil
	}
	list, _ := v.([]string) // the only other type that Exact accepts
	if len(list) > maxSet {
		return nil, fmt.Errorf("a list has at most %d elements", maxSet)
	}
	for _, s := range list {
		if err := checkString(s); err != nil {
			return nil, err
		}
	}
	return append([]string{}, list...), nil // never null
}

func checkString(s string) error {
	if len(s) > maxString || !utf8.ValidString(s) || strings.ContainsRune(s, utf8.RuneError) {
		return fmt.Errorf("a string has at most %d bytes of valid UTF-8, without U+FFFD", maxString)
	}
	return nil
}

// check is the reason for which the constraint cannot be sent.
func (c Constraint) check() error {
	if c.err == nil && c.wire == "" {
		return errors.New("the zero Constraint: make one with OneOf, Range or another constructor")
	}
	return c.err
}

// String is the wire form, or "invalid: " and the reason.
func (c Constraint) String() string {
	if err := c.check(); err != nil {
		return "invalid: " + err.Error()
	}
	return c.wire
}

// MarshalJSON encodes the wire form, such as {"one_of":["orders"]}. An invalid constraint is an error.
func (c Constraint) MarshalJSON() ([]byte, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	return []byte(c.wire), nil
}

// UnmarshalJSON accepts any JSON object as the wire form. The broker checks it at the call that sends it.
func (c *Constraint) UnmarshalJSON(raw []byte) error {
	v := jsontext.Value(raw).Clone()
	if err := v.Compact(); err != nil || v.Kind() != jsontext.KindBeginObject {
		return errors.New(`a constraint is a JSON object such as {"one_of":["orders"]}`)
	}
	*c = Constraint{wire: string(v)}
	return nil
}
