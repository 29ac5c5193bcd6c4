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

// Secret is one JSON object whose members the tool's documentation lists. It prints, logs and
// marshals as "[redacted]", and is empty once its step is closed. It is safe for concurrent use.
type Secret struct{ box func() *box }

// box keeps the bytes. It is behind a function because fmt calls no methods of what it finds in
// an unexported field, and follows pointers there: of a function it prints an address.
type box struct {
	mu  sync.Mutex // guards raw
	raw []byte
}

// newSecret takes ownership of raw.
func newSecret(raw []byte) *Secret {
	b := &box{raw: raw}
	return &Secret{func() *box { return b }}
}

// Field gives a member: the text of a string, and any other value as JSON. It is empty when
// there is no such member, or the secret was wiped. The copy that it returns is out of Wipe's reach.
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

// JSON gives a copy of the whole object; it is nil once the secret was wiped.
func (s Secret) JSON() []byte {
	if s.box == nil {
		return nil
	}
	b := s.box()
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]byte(nil), b.raw...)
}

// Wipe overwrites and empties the secret. Closing the step does it, too.
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
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

func (s Secret) String() string               { return redacted }
func (s Secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (s Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
