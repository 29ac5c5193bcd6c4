package agent

import (
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

const redacted = "[redacted]"

// Secret is one JSON object. The tool's documentation lists its members. It prints, logs and marshals
// as "[redacted]", and is empty once its step is closed. It is safe for concurrent use.
type Secret struct{ box func() *box }

// box holds the bytes. It is behind a function because fmt follows the pointers of unexported fields
// and calls no methods there. Of a function it prints the address.
type box struct {
	mu  sync.Mutex // guards raw
	raw []byte
}

// newSecret takes ownership of raw.
func newSecret(raw []byte) *Secret {
	b := &box{raw: raw}
	return &Secret{func() *box { return b }}
}

// Field returns a member: the text of a string, and any other value as JSON. It is empty when there is
// no such member or the secret was wiped. Wipe does not reach the copy that Field returns.
func (s Secret) Field(name string) string {
	if s.box == nil {
		return ""
	}
	b := s.box()
	b.mu.Lock()
	defer b.mu.Unlock()
	var members map[string]jsontext.Value
	if json.Unmarshal(b.raw, &members) != nil {
		return ""
	}
	value := members[name]
	if value.Kind() != jsontext.KindString {
		return string(value)
	}
	var text string
	_ = json.Unmarshal(value, &text) // it is a string
	return text
}

// JSON returns a copy of the whole object. It is nil once the secret was wiped.
func (s Secret) JSON() []byte {
	if s.box == nil {
		return nil
	}
	b := s.box()
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]byte(nil), b.raw...)
}

// Wipe overwrites and empties the secret. Closing the step wipes it, too.
func (s Secret) Wipe() {
	if s.box == nil {
		return
	}
	b := s.box()
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.raw)
	b.raw = nil
}

// Format prints "[redacted]" for every verb.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) } // Format has no error to return

// String returns "[redacted]".
func (s Secret) String() string { return redacted }

// LogValue logs "[redacted]".
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON encodes "[redacted]".
func (s Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// MarshalText encodes "[redacted]".
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
