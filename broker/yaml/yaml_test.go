package yaml_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker/yaml"
)

// TestYAMLIsBounded feeds the reader input that takes its parser minutes or gigabytes. Each must be refused quickly,
// with the line and a fix.
func TestYAMLIsBounded(t *testing.T) {
	numbered := func(format string) string {
		var s strings.Builder
		for i := 0; s.Len() < yaml.MaxFile-100; i++ {
			fmt.Fprintf(&s, format, i)
		}
		return s.String()
	}
	full := func(unit string) string { return strings.Repeat(unit, (yaml.MaxFile-100)/len(unit)) }
	deep := ""
	for i := range 40 {
		deep += strings.Repeat("    ", i) + "a:\n"
	}
	for what, row := range map[string]struct{ raw, want string }{
		"a large file":                {strings.Repeat("#\n", yaml.MaxFile), "f: larger than 262144 bytes"},
		"blank lines in a text":       {"a: |\n  x" + full("\n"), "f:67: more than 64 blank lines in a row; remove some"},
		"lines of spaces":             {"a: |\n  x\n" + full(" \r\n"), "f:67: more than 64 blank lines in a row"},
		"reserved marks":              {full("@"), "f:1: longer than 4096 bytes; break it into several lines"},
		"a reserved mark a line":      {full("@\n"), "f:1: '@' is a reserved character"},
		"tabs in quotes":              {`a: "` + full("\t") + `"`, "f:1: longer than 4096 bytes"},
		"something like merge keys":   {"b: 1\na: " + full("<"), "f:2: longer than 4096 bytes"},
		"documents":                   {strings.Repeat("--- a\n", 10_000), "f: holds more than one document"},
		"ends of documents":           {"a: 1\n" + strings.Repeat("...\n", 10_000), "f: holds more than one document"},
		"keys of a map":               {strings.Repeat("a: 1\n", 1025), "f:1025: the map has more than 1024 keys"},
		"keys below lists in flow":    {strings.Repeat("  a: [\n]\n", 1025), "f:2049: the map has more than 1024 keys"},
		"keys with a question mark":   {strings.Repeat("? a\n: 1\n", 1025), "f:2049: the map has more than 1024 keys"},
		"keys without values":         {numbered("k%d:\n"), "f: holds more than 65536 keys, values and marks"},
		"values of a list":            {full("-\n"), "f: holds more than 65536 keys, values and marks"},
		"a long key":                  {strings.Repeat("k", 129) + ": 1\n", "f:1: a key is longer than 128 bytes"},
		"depth by indentation":        {deep, "f:34: nested more than 32 deep or indented more than 128 columns"},
		"depth by brackets":           {"a:\n" + strings.Repeat("[\n", 33), "f:34: nested more than 32 deep"},
		"bytes that are not text":     {"a: b\nb: \xff\n", "f:2: is not UTF-8"},
		"a key that is a number":      {"a: b\n1: c\n", "f:2: a key is no text; put it in quotes"},
		"a key that is true, deeper":  {"a: {b: c,\n true: d}\n", "f:2: a key is no text"},
		"a key that is null":          {"~: c\n", "f:1: a key is no text"},
		"a key with a mark":           {"? a\n: c\n", "f:1: a key is no text"},
		"a key that is an alias":      {"a: b\n*x : c\n", "f:2: "},
		"an anchor":                   {"a: &x b\n", "f:1: anchors, aliases, merge keys and tags are not allowed; write the value itself"},
		"an unfinished text":          {"a: b\nb: 'x\n", "f:2: could not find end character"},
		"nothing but a comment":       {"# x\n", "f: holds no document"},
		"a document that is only one": {"---\na: b\n", ""},
	} {
		err := soon(t, what, func() error { return yaml.Read("f", []byte(row.raw), new(any)) })
		if row.want == "" && err != nil || row.want != "" && (err == nil || !strings.HasPrefix(err.Error(), row.want)) {
			t.Errorf("%s: Read = %v, want an error that begins with %q", what, err, row.want)
		}
	}
	if err := yaml.Read("", []byte("a: [\n"), new(any)); err == nil || !strings.HasPrefix(err.Error(), "line 1: ") {
		t.Errorf("Read of no file = %v, want an error that begins with the line", err)
	}
	if err := yaml.Read("", nil, new(any)); !errors.Is(err, yaml.ErrNoDocument) {
		t.Errorf("Read of nothing = %v, want %v", err, yaml.ErrNoDocument)
	}
}

// maxTools is the most tools that a bundle may have.
const maxTools = 1024

// TestYAMLHasRoom checks that files of a realistic size are within the limits.
func TestYAMLHasRoom(t *testing.T) {
	var tools strings.Builder
	tools.WriteString("tools:\n")
	for i := range maxTools {
		fmt.Fprintf(&tools, "  - name: shop.team-%d.read\n    backend: shop\n    narrowing: native\n    ttl: 60s\n    vault: {policy: p-%d, path: database/creds/p-%d}\n"+
			"    arguments:\n      tables: {kind: list, required: true, constraint: {one_of: [a, b, c]}}\n", i, i, i)
	}
	if err := soon(t, "many tools", func() error { return yaml.Read("f", []byte(tools.String()), new(any)) }); err != nil {
		t.Errorf("Read of %d bytes with %d tools = %v", tools.Len(), maxTools, err)
	}
}

// soon fails the test when do does not return. A parser that hangs cannot be stopped.
func soon(t *testing.T, what string, do func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- do() }()
	select {
	case err := <-done:
		return err
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: not finished after 30 seconds", what)
		return nil
	}
}
