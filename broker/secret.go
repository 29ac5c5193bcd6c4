package broker

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
)

const redacted = "[redacted]"

// Secret holds the bytes for an agent: one JSON object with the members that the tool's documentation lists
// ({"username":…,"password":…}). It prints, logs and marshals as "[redacted]". It lives in memory between mint and
// delivery, and nowhere else. The zero value is empty.
//
// The bytes are behind a function because of fmt. In an unexported field fmt calls no methods and follows pointers, but
// of a function it prints only the address.
type Secret struct{ open func() []byte }

// NewSecret takes ownership of b.
func NewSecret(b []byte) Secret { return Secret{func() []byte { return b }} }

// Reveal returns the bytes. Outside this file three places may call it: the encoder of the API, the sealing next to it,
// and the broker's self-test. Each hands the secret to its recipient; the self-test is its own. The suite of brokertest
// also calls it, to find leaks.
func (s Secret) Reveal() []byte {
	if s.open == nil {
		return nil
	}
	return s.open()
}

// Empty reports whether there are no bytes.
func (s Secret) Empty() bool { return len(s.Reveal()) == 0 }

// Wipe overwrites the bytes. It cannot overwrite the copies that an encoder made.
func (s Secret) Wipe() { clear(s.Reveal()) }

// Format prints "[redacted]" for every verb.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) } // printing cannot be refused

// String is "[redacted]".
func (s Secret) String() string { return redacted }

// LogValue is "[redacted]".
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON writes "[redacted]".
func (s Secret) MarshalJSON() ([]byte, error) { return json.Marshal(redacted) }

// MarshalText writes "[redacted]".
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
