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

	"github.com/pawlsec/pawl/broker"
)

// Checkpoint says what the first entries of a log are, by the root of their tree.
type Checkpoint struct {
	Origin string // the signer's name: whose log it is
	Size   int64  // how many entries
	Root   tlog.Hash
}

// MaxCheckpoint is the largest signed checkpoint in bytes.
const MaxCheckpoint = 4 << 10

// Checkpoint signs what the tree holds.
func (s *Signer) Checkpoint(t *Tree) ([]byte, error) {
	verifier, err := noteVerifier(s.name, s.public())
	if err != nil {
		return nil, err
	}
	text := fmt.Sprintf("%s\n%d\n%s\n", s.name, t.Size(), t.Root())
	return note.Sign(&note.Note{Text: text}, noteSigner{verifier, s.key})
}

// noteSigner is the key as package note wants it.
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

// OpenCheckpoint verifies a signed checkpoint with the public key alone. Whose it is says Origin:
// a key that several brokers share does not tell them apart. Errors wrap [ErrForeign].
func OpenCheckpoint(signed []byte, key jose.JSONWebKey) (Checkpoint, error) {
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
		return Checkpoint{}, fmt.Errorf("%w: it is no checkpoint", ErrForeign)
	}
	opened, err := note.Open(signed, note.VerifierList(verifier))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("%w: %w", ErrForeign, err)
	}
	// A note may have signatures of witnesses beside ours; ours has one spelling.
	if _, err := base64.StdEncoding.Strict().DecodeString(opened.Sigs[0].Base64); err != nil {
		return Checkpoint{}, fmt.Errorf("%w: its signature is misspelt", ErrForeign)
	}
	return parseCheckpoint(opened.Text)
}

func parseCheckpoint(text string) (c Checkpoint, err error) {
	lines := strings.Split(text, "\n")
	if len(lines) != 4 || lines[3] != "" {
		return c, fmt.Errorf("%w: no checkpoint of a version that is known here", ErrForeign)
	}
	c.Origin = lines[0]
	if c.Size, err = strconv.ParseInt(lines[1], 10, 64); err != nil || c.Size < 0 || strconv.FormatInt(c.Size, 10) != lines[1] {
		return c, fmt.Errorf("%w: its size is no number", ErrForeign)
	}
	if c.Root, err = tlog.ParseHash(lines[2]); err != nil {
		return c, fmt.Errorf("%w: its root is no hash", ErrForeign)
	}
	return c, nil
}

// Verify reads the log from its first entry and says whether it begins with what the checkpoint
// stands for. What follows after that is not looked at. Errors wrap [ErrForeign] when the checkpoint is
// not the key's, and [ErrChanged] when the log is not what was signed: an entry was changed, put
// in or taken away.
func Verify(log Log, signed []byte, key jose.JSONWebKey) (Checkpoint, error) {
	c, err := OpenCheckpoint(signed, key)
	if err != nil {
		return c, err
	}
	var t Tree
	if c.Size > 0 {
		if err := t.Grow(log, c.Size); err != nil {
			return c, err
		}
	}
	switch {
	case t.Size() < c.Size:
		return c, fmt.Errorf("%w: the log ends after entry %d, and %d were signed", ErrChanged, t.Size(), c.Size)
	case t.Root() != c.Root:
		return c, fmt.Errorf("%w: the first %d entries are others than those that were signed", ErrChanged, c.Size)
	}
	return c, nil
}

// Holds reports whether the proof shows that e is in the log of the checkpoint.
func (c Checkpoint) Holds(e broker.Entry, proof tlog.RecordProof) bool {
	text, err := leaf(e)
	return err == nil && e.Revision >= 1 && tlog.CheckRecord(proof, c.Size, c.Root, int64(e.Revision)-1, tlog.RecordHash(text)) == nil
}
