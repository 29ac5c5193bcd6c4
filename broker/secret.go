package broker

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
)

const redacted = "[redacted]"

// Secret holds the bytes handed to an agent: one JSON object whose members the tool's
// documentation lists ({"username":…,"password":…}). It prints, logs and marshals as
// "[redacted]"; it lives in memory between mint and delivery and nowhere else.
// The zero value is empty.
//
// The bytes are behind a function because fmt calls no methods of what it finds in an unexported
// field, and follows pointers there: of a function it prints an address.
type Secret struct{ open func() []byte }

// NewSecret takes ownership of b.
func NewSecret(b []byte) Secret { return Secret{func() []byte { return b }} }

// Reveal opens the secret. Beside the methods here, two places may call it: the API's encoder and the sealing next to
// it, which hand it to whom it was made for. The suite of brokertest looks with it for what must not be told.
func (s Secret) Reveal() []byte {
	if s.open == nil {
		return nil
	}
	return s.open()
}

// Empty reports whether there is nothing inside.
func (s Secret) Empty() bool { return len(s.Reveal()) == 0 }

// Wipe overwrites the bytes. Copies that an encoder made are out of its reach.
func (s Secret) Wipe() { clear(s.Reveal()) }

// Format prints "[redacted]" for every verb.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) } // printing cannot be refused

func (s Secret) String() string               { return redacted }
func (s Secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (s Secret) MarshalJSON() ([]byte, error) { return json.Marshal(redacted) }
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
