package broker

import (
	"encoding/json"
	"log/slog"
)

const redacted = "[redacted]"

// Secret holds the bytes handed to an agent: one JSON object whose members the tool's
// documentation lists ({"username":…,"password":…}). It prints, logs and marshals as
// "[redacted]"; it lives in memory between mint and delivery and nowhere else.
// The zero value is empty.
type Secret struct{ b []byte }

// NewSecret takes ownership of b.
func NewSecret(b []byte) Secret { return Secret{b} }

// Reveal opens the secret. Two places may call it: the API encoder and the minter.
func (s Secret) Reveal() []byte { return s.b }

// Empty reports whether there is nothing inside.
func (s Secret) Empty() bool { return len(s.b) == 0 }

// Wipe overwrites the bytes. Copies that an encoder made are out of its reach.
func (s Secret) Wipe() { clear(s.b) }

func (s Secret) String() string               { return redacted }
func (s Secret) GoString() string             { return redacted }
func (s Secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (s Secret) MarshalJSON() ([]byte, error) { return json.Marshal(redacted) }
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
