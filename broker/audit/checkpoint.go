package audit

import (
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Checkpoint identifies the first entries of a log by the root of their tree.
type Checkpoint struct {
	Origin string // the signer's name, which identifies the log
	Size   int64  // the number of entries
	Root   tlog.Hash
}

// MaxCheckpoint is the largest signed checkpoint in bytes.
const MaxCheckpoint = 4 << 10

// Checkpoint signs the size and root of the tree.
func (s *Signer) Checkpoint(t *Tree) ([]byte, error) {
	verifier, err := noteVerifier(s.name, s.public())
	if err != nil {
		return nil, err
	}
	text := fmt.Sprintf("%s\n%d\n%s\n", s.name, t.Size(), t.Root())
	return note.Sign(&note.Note{Text: text}, noteSigner{verifier, s.key})
}

// noteSigner adapts the key to package note.
type noteSigner struct {
	note.Verifier
	key ed25519.PrivateKey
}

// Sign implements [note.Signer].
func (s noteSigner) Sign(msg []byte) ([]byte, error) { return ed25519.Sign(s.key, msg), nil }

func noteVerifier(name string, key ed25519.PublicKey) (note.Verifier, error) {
	text, err := note.NewEd25519VerifierKey(name, key)
	if err != nil {
		return nil, err
	}
	return note.NewVerifier(text)
}

// openCheckpoint verifies a signed checkpoint with the public key alone. Origin names the signer. A key that several
// brokers share does not distinguish them. Errors wrap [ErrForeign].
func openCheckpoint(signed []byte, key jose.JSONWebKey) (Checkpoint, error) {
	public, err := publicKey(key)
	if err != nil {
		return Checkpoint{}, err
	}
	if len(signed) > MaxCheckpoint {
		return Checkpoint{}, fmt.Errorf("%w: larger than %d bytes", ErrForeign, MaxCheckpoint)
	}
	origin, _, _ := strings.Cut(string(signed), "\n")
	verifier, err := noteVerifier(origin, public)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("%w: not a checkpoint", ErrForeign)
	}
	opened, err := note.Open(signed, note.VerifierList(verifier))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("%w: %w", ErrForeign, err)
	}
	// A note may have signatures of witnesses beside ours. Ours has one spelling.
	if _, err := base64.StdEncoding.Strict().DecodeString(opened.Sigs[0].Base64); err != nil {
		return Checkpoint{}, fmt.Errorf("%w: the signature is not canonical base64", ErrForeign)
	}
	return parseCheckpoint(opened.Text)
}

func parseCheckpoint(text string) (c Checkpoint, err error) {
	lines := strings.Split(text, "\n")
	if len(lines) != 4 || lines[3] != "" {
		return c, fmt.Errorf("%w: unknown checkpoint version", ErrForeign)
	}
	c.Origin = lines[0]
	if c.Size, err = strconv.ParseInt(lines[1], 10, 64); err != nil || c.Size < 0 || strconv.FormatInt(c.Size, 10) != lines[1] {
		return c, fmt.Errorf("%w: the size is not a number", ErrForeign)
	}
	if c.Root, err = tlog.ParseHash(lines[2]); err != nil {
		return c, fmt.Errorf("%w: the root is not a hash", ErrForeign)
	}
	return c, nil
}

// Verify reads the log once, from its first entry, and checks that it begins with the entries of each signed checkpoint.
// The oldest is the first. It returns the last, and does not check the entries after it. Errors wrap [ErrForeign] if the
// key did not sign a checkpoint. They wrap [ErrChanged] if the log differs from a signed one: an entry was changed,
// inserted or removed.
func Verify(log Log, key jose.JSONWebKey, signed ...[]byte) (last Checkpoint, err error) {
	roots := map[int64]tlog.Hash{} // by the number of entries
	for _, one := range signed {
		before := last.Size
		if last, err = openCheckpoint(one, key); err != nil {
			return last, err
		}
		if last.Size < before {
			return last, fmt.Errorf("%w: a checkpoint of %d entries follows one of %d", ErrChanged, last.Size, before)
		}
		if other, ok := roots[last.Size]; ok && other != last.Root {
			return last, fmt.Errorf("%w: two checkpoints of %d entries differ", ErrChanged, last.Size)
		}
		roots[last.Size] = last.Root
	}
	var t Tree
	matches := func() error {
		if root, ok := roots[t.Size()]; ok && root != t.Root() {
			return fmt.Errorf("%w: the first %d entries differ from the signed entries", ErrChanged, t.Size())
		}
		return nil
	}
	if err := matches(); err != nil || last.Size == 0 {
		return last, err
	}
	for e, err := range log {
		if err == nil {
			err = t.Add(e)
		}
		if err == nil {
			err = matches()
		}
		if err != nil || t.Size() == last.Size {
			return last, err
		}
	}
	return last, fmt.Errorf("%w: the log ends after entry %d, but %d entries were signed", ErrChanged, t.Size(), last.Size)
}
