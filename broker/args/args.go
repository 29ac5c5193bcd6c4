// Package args reads a step's arguments into their canonical form, and decides constraints over them.
package args

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"sync"
	"unicode/utf8"
)

// escaped is how many times an encoder may lengthen the canonical form: encoding/json writes < as six bytes.
const escaped = 6

// Value is one argument: a string, an integer, a boolean or a list of strings. The zero Value is the empty string.
// [Value.Equal] compares Values.
type Value struct {
	kind valueKind
	s    string
	n    int64
	list []string
}

type valueKind uint8

const (
	stringValue valueKind = iota
	intValue
	boolValue
	listValue
)

// String makes a string Value.
func String(s string) Value { return Value{kind: stringValue, s: s} }

// Int makes an integer Value.
func Int(n int64) Value { return Value{kind: intValue, n: n} }

// List makes a list Value of a copy of s.
func List(s ...string) Value { return Value{kind: listValue, list: slices.Clone(s)} }

// Bool makes a boolean Value.
func Bool(b bool) (v Value) {
	v.kind = boolValue
	if b {
		v.n = 1
	}
	return v
}

// Text returns the string of a string value.
func (v Value) Text() (string, bool) { return v.s, v.kind == stringValue }

// Int64 returns the integer of an integer value.
func (v Value) Int64() (int64, bool) { return v.n, v.kind == intValue }

// Truth returns the boolean of a boolean value.
func (v Value) Truth() (value, ok bool) { return v.n != 0, v.kind == boolValue }

// Strings returns the elements of a list value. The caller must not change them.
func (v Value) Strings() ([]string, bool) { return v.list, v.kind == listValue }

// Equal reports whether v and w are the same value of the same kind.
func (v Value) Equal(w Value) bool {
	return v.kind == w.kind && v.s == w.s && v.n == w.n && slices.Equal(v.list, w.list)
}

// ReadsAs reports whether text is the value as text: a string itself, an integer in decimal, a boolean as true or
// false. A list reads as each of its elements.
func (v Value) ReadsAs(text string) bool {
	switch v.kind {
	case intValue:
		return strconv.FormatInt(v.n, 10) == text
	case boolValue:
		return strconv.FormatBool(v.n != 0) == text
	case listValue:
		return slices.Contains(v.list, text)
	}
	return v.s == text
}

// Kind is "string", "integer", "boolean" or "list".
func (v Value) Kind() string {
	return [...]string{"string", "integer", "boolean", "list"}[v.kind]
}

// MarshalJSON writes the canonical form.
func (v Value) MarshalJSON() ([]byte, error) { return v.append(nil), nil }

func (v Value) append(b []byte) []byte {
	switch v.kind {
	case intValue:
		return strconv.AppendInt(b, v.n, 10)
	case boolValue:
		return strconv.AppendBool(b, v.n != 0)
	case listValue:
		b = append(b, '[')
		for i, s := range v.list {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendString(b, s)
		}
		return append(b, ']')
	default:
		return appendString(b, v.s)
	}
}

// appendString escapes only the characters that JSON requires (RFC 8785 section 3.2.2.2).
func appendString(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c >= 0x20:
			b = append(b, c)
		case bytes.IndexByte([]byte("\b\t\n\f\r"), c) >= 0:
			b = append(b, '\\', "btn.fr"[c-8])
		default:
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		}
	}
	return append(b, '"')
}

// Args are a step's arguments in their canonical form. The zero Args have no argument.
type Args struct {
	canon []byte // canonical JSON; nil: no argument
	read  *read  // nil: no argument
}

// read has the arguments as values.
type read struct {
	names  []string // sorted
	values map[string]Value

	once sync.Once // guards the fields above if late is set: they are read at their first use
	late []byte    // canonical JSON that is not read yet
}

// Trusted makes Args of the result of [Args.Canonical], from storage that does not change it. The text is read at the
// first use of an argument. If it is not canonical, it reads as no arguments.
func Trusted(canon []byte) Args { return Args{canon: canon, read: &read{late: canon}} }

func (a Args) parsed() *read {
	if a.read == nil {
		return &read{}
	}
	if a.read.late != nil {
		a.read.once.Do(func() {
			if p, err := Parse(a.read.late); err == nil && p.read != nil && bytes.Equal(p.canon, a.read.late) {
				a.read.names, a.read.values = p.read.names, p.read.values
			}
		})
	}
	return a.read
}

// New makes Args of values.
func New(values map[string]Value) (Args, error) {
	if len(values) > MaxCount {
		return Args{}, fmt.Errorf("more than %d arguments", MaxCount)
	}
	if len(values) == 0 {
		return Args{}, nil
	}
	a := Args{read: &read{names: slices.Sorted(maps.Keys(values)), values: maps.Clone(values)}}
	b := []byte{'{'}
	for i, name := range a.read.names {
		if err := CheckName(name); err != nil {
			return Args{}, err
		}
		if err := values[name].check(); err != nil {
			return Args{}, fmt.Errorf("argument %q: %w", name, err)
		}
		if i > 0 {
			b = append(b, ',')
		}
		b = values[name].append(append(appendString(b, name), ':'))
	}
	if a.canon = append(b, '}'); len(a.canon) > MaxBytes {
		return Args{}, fmt.Errorf("arguments have more than %d bytes", MaxBytes)
	}
	return a, nil
}

func (v Value) check() error {
	if len(v.list) > MaxElements {
		return fmt.Errorf("more than %d elements", MaxElements)
	}
	for _, s := range append(slices.Clone(v.list), v.s) {
		if len(s) > MaxString {
			return fmt.Errorf("longer than %d bytes", MaxString)
		}
		if !utf8.ValidString(s) {
			return errors.New("not valid UTF-8")
		}
	}
	return nil
}

// CheckName accepts the name of an argument: lower-case letters, digits and underscores, beginning with a letter, at
// most [MaxName] bytes. Names reach policy contexts and configuration, never SQL or a path.
func CheckName(s string) error {
	ok := s != "" && len(s) <= MaxName && s[0] >= 'a' && s[0] <= 'z'
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		ok = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '_'
	}
	if !ok {
		return fmt.Errorf("argument names are at most %d lower-case letters, digits and underscores, "+
			"and begin with a letter", MaxName)
	}
	return nil
}

// Parse reads one JSON object of strings, integers, booleans and lists of strings. It refuses duplicate names, null,
// fractions, nesting, text after the object, and anything beyond a limit of this package.
func Parse(raw []byte) (Args, error) {
	if len(raw) > escaped*MaxBytes {
		return Args{}, fmt.Errorf("arguments have more than %d bytes", MaxBytes)
	}
	if !utf8.Valid(raw) {
		return Args{}, errors.New("arguments are not valid UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return Args{}, errors.New("arguments must be a JSON object")
	}
	values := map[string]Value{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return Args{}, errors.New("arguments are not valid JSON")
		}
		name := t.(string) // a member's name: the decoder returns nothing else here
		if _, twice := values[name]; twice {
			return Args{}, fmt.Errorf("argument %.70q is given twice", name)
		}
		if values[name], err = parseValue(dec); err != nil {
			return Args{}, fmt.Errorf("argument %.70q: %w", name, err)
		}
		if len(values) > MaxCount {
			return Args{}, fmt.Errorf("more than %d arguments", MaxCount)
		}
	}
	if _, err := dec.Token(); err != nil {
		return Args{}, errors.New("arguments are not valid JSON")
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Args{}, errors.New("there is text after the arguments")
	}
	return New(values)
}

func parseValue(dec *json.Decoder) (Value, error) {
	t, err := dec.Token()
	if err != nil {
		return Value{}, errors.New("not valid JSON")
	}
	switch t := t.(type) {
	case string:
		return plainString(t)
	case bool:
		return Bool(t), nil
	case json.Number:
		n, err := strconv.ParseInt(t.String(), 10, 64)
		if err != nil || strconv.FormatInt(n, 10) != t.String() {
			return Value{}, errors.New("numbers must be 64-bit integers without fraction or exponent")
		}
		return Int(n), nil
	case json.Delim:
		if t == '[' {
			return parseList(dec)
		}
	}
	return Value{}, errors.New("must be a string, an integer, a boolean or a list of strings")
}

func parseList(dec *json.Decoder) (Value, error) {
	list := []string{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return Value{}, errors.New("not valid JSON")
		}
		s, ok := t.(string)
		if !ok {
			return Value{}, errors.New("lists contain strings only")
		}
		v, err := plainString(s)
		if err != nil {
			return Value{}, err
		}
		if list = append(list, v.s); len(list) > MaxElements {
			return Value{}, fmt.Errorf("more than %d elements", MaxElements)
		}
	}
	if _, err := dec.Token(); err != nil {
		return Value{}, errors.New("not valid JSON")
	}
	return Value{kind: listValue, list: list}, nil
}

// plainString refuses U+FFFD. encoding/json replaces a lone surrogate by it, so that two different inputs would
// become one argument.
func plainString(s string) (Value, error) {
	if bytes.ContainsRune([]byte(s), utf8.RuneError) {
		return Value{}, errors.New("contains a lone surrogate or U+FFFD")
	}
	return String(s), nil
}

// Names returns the argument names in order. The caller must not change them.
func (a Args) Names() []string { return a.parsed().names }

// Get returns the named argument.
func (a Args) Get(name string) (Value, bool) { v, ok := a.parsed().values[name]; return v, ok }

// Canonical returns the canonical JSON, "{}" without an argument. The caller must not change it.
func (a Args) Canonical() []byte {
	if a.canon == nil {
		return []byte("{}")
	}
	return a.canon
}

// Digest is the SHA-256 of the canonical form; a grant is bound to it.
func (a Args) Digest() [32]byte { return sha256.Sum256(a.Canonical()) }

// MarshalJSON writes the canonical form.
func (a Args) MarshalJSON() ([]byte, error) { return a.Canonical(), nil }

// UnmarshalJSON is [Parse].
func (a *Args) UnmarshalJSON(raw []byte) (err error) { *a, err = Parse(raw); return err }
