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
type Secret struct{ box *box }

// box keeps the bytes behind a pointer, so that printing a Secret by reflection shows none.
type box struct {
	mu  sync.Mutex // guards raw
	raw []byte
}

// newSecret takes ownership of raw.
func newSecret(raw []byte) *Secret { return &Secret{&box{raw: raw}} }

// Field gives a member: the text of a string, and any other value as JSON. It is empty when
// there is no such member, or the secret was wiped. The copy that it returns is out of Wipe's reach.
func (s Secret) Field(name string) string {
	if s.box == nil {
		return ""
	}
	s.box.mu.Lock()
	defer s.box.mu.Unlock()
	var members map[string]jsontext.Value
	if json.Unmarshal(s.box.raw, &members) != nil {
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
	s.box.mu.Lock()
	defer s.box.mu.Unlock()
	return append([]byte(nil), s.box.raw...)
}

// Wipe overwrites and empties the secret. Closing the step does it, too.
func (s Secret) Wipe() {
	if s.box == nil {
		return
	}
	s.box.mu.Lock()
	defer s.box.mu.Unlock()
	clear(s.box.raw)
	s.box.raw = nil
}

// Format prints "[redacted]" for every verb.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

func (s Secret) String() string               { return redacted }
func (s Secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (s Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
