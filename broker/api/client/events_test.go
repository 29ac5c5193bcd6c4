package client_test

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/pawlsec/pawl/broker/api/client"
)

func all(r io.Reader) (list []string, err error) {
	next := client.NewEvents(r)
	for {
		ev, err := next()
		if err != nil {
			return list, err
		}
		list = append(list, ev.Name+"="+string(ev.Data))
	}
}

func TestEvents(t *testing.T) {
	for name, row := range map[string]struct {
		stream string
		want   []string
	}{
		"as the broker writes":   {"id: 1\nevent: standing\ndata: {}\n\n: \n\nid: 2\nevent: problem\ndata: {\"a\":1}\n\n", []string{"standing={}", "=", `problem={"a":1}`}},
		"carriage returns":       {"event: a\r\ndata: 1\r\n\r\n", []string{"a=1"}},
		"no space":               {"event:a\ndata:1\n\n", []string{"a=1"}},
		"one space only":         {"data:  1\n\n", []string{"= 1"}},
		"two lines of data":      {"data: 1\ndata: 2\n\n", []string{"=1\n2"}},
		"unknown fields":         {"retry: 7\nfoo: bar\ndata\ndata: 1\n\n", []string{"=\n1"}},
		"a name without data":    {"event: a\n\ndata: 1\n\n", []string{"=1"}},
		"a comment inside":       {"event: a\n: psst\ndata: 1\n\n", []string{"a=1"}},
		"cut inside an event":    {"data: 1\n\nevent: a\ndata: 2\n", []string{"=1"}},
		"cut inside a line":      {"data: 1\n\ndata: 2", []string{"=1"}},
		"blank lines":            {"\n\n\ndata: 1\n\n\n", []string{"=1"}},
		"longer than the buffer": {"data: " + strings.Repeat("x", 9000) + "\n\n", []string{"=" + strings.Repeat("x", 9000)}},
	} {
		for kind, r := range map[string]io.Reader{"whole": strings.NewReader(row.stream), "byte by byte": iotest.OneByteReader(strings.NewReader(row.stream))} {
			if got, err := all(r); !slices.Equal(got, row.want) || err != io.EOF {
				t.Errorf("%s, %s: %q = %q, %v, want %q, EOF", name, kind, row.stream, got, err, row.want)
			}
		}
	}
}

func TestBareCarriageReturn(t *testing.T) {
	if list, err := all(strings.NewReader("data: 1\rdata: 2\n\n")); err == io.EOF || list != nil {
		t.Errorf("a carriage return inside a line = %q, %v, want an error", list, err)
	}
}

func TestEventSize(t *testing.T) {
	const most = 1 << 20
	for size, ok := range map[int]bool{most - 9: true, most: false, 8 * most: false} {
		if _, err := all(strings.NewReader("data: " + strings.Repeat("x", size) + "\n\n")); (err == io.EOF) != ok {
			t.Errorf("an event of %d bytes = %v, want it accepted: %v", size, err, ok)
		}
	}
	if _, err := all(strings.NewReader(strings.Repeat("data: xxxxxxxx\n", most/10))); err == io.EOF {
		t.Error("an oversized event of many lines is accepted")
	}
}

// FuzzEvents checks that no input panics, and that an event is the same after writing and reading it again.
func FuzzEvents(f *testing.F) {
	for _, seed := range []string{"id: 1\nevent: a\ndata: {}\n\n", ": \n\n", "data\n\n", "event: a\r\n\r\ndata: 1\r\n\r\n", "\x00:\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		for next := client.NewEvents(bytes.NewReader(stream)); ; {
			ev, err := next()
			if err != nil {
				return
			}
			if ev.Name == "" && ev.Data == nil {
				continue
			}
			again := fmt.Sprintf("event: %s\ndata: %s\n\n", ev.Name, bytes.ReplaceAll(ev.Data, []byte("\n"), []byte("\ndata: ")))
			second, err := client.NewEvents(strings.NewReader(again))()
			if err != nil && len(again) <= 1<<20 || err == nil && (second.Name != ev.Name || !bytes.Equal(second.Data, ev.Data)) {
				t.Fatalf("%q was read as %q, and %q as %q, %v", stream, ev, again, second, err)
			}
		}
	})
}
