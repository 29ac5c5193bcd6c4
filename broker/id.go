package broker

import (
	"encoding/base32"
	"encoding/binary"
	"fmt"
	"io"
	"time"
)

// An id is two letters and 24 characters of base32. Ids are opaque, have one length, and use an alphabet that needs no
// quoting in a path, a role name or a token's display name. An id begins with the time in milliseconds, and 72 random
// bits follow. So new keys are neighbours, and a ledger that writes pages writes a third as much. An id gives no
// authority: it is useless to a caller that is not the holder.
type (
	// ChainID names a chain, "ch…".
	ChainID string
	// DelegationID names a node of a chain, "dl…".
	DelegationID string
	// GrantID names a grant, "gr…". It is part of the credential's name at the backend.
	GrantID string
	// RevocationID names a revocation, "rv…".
	RevocationID string
)

// IDLength is the length of every id, in characters.
const IDLength = 26

var idEncoding = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

// NewID makes an id with the given two-letter prefix, for an object created at now.
func NewID(prefix string, now time.Time, random io.Reader) (string, error) {
	var raw [15]byte
	if _, err := io.ReadFull(random, raw[6:]); err != nil {
		return "", fmt.Errorf("drawing an id: %w", err)
	}
	var ms [8]byte
	binary.BigEndian.PutUint64(ms[:], uint64(now.UnixMilli()))
	copy(raw[:6], ms[2:])
	return prefix + idEncoding.EncodeToString(raw[:]), nil
}

// IDTime returns the characters that the ids of t have after the prefix. Ids of up to 8 ms before t have the same ones.
// Ids made before that sort before them.
func IDTime(t time.Time) string {
	var ms [8]byte
	binary.BigEndian.PutUint64(ms[:], uint64(max(0, t.UnixMilli())))
	return idEncoding.EncodeToString(ms[2:])[:9] // 45 of the 48 bits: whole characters
}

func parseID(s, prefix, what string) error {
	if len(s) != IDLength || s[:2] != prefix {
		return fmt.Errorf("%s id must be %q and 24 characters", what, prefix)
	}
	for i := 2; i < len(s); i++ {
		c := s[i]
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'z' && c != 'i' && c != 'l' && c != 'o' && c != 'u') {
			return fmt.Errorf("%s id has a character outside its alphabet", what)
		}
	}
	return nil
}

// ParseChainID accepts only the form that [NewID] makes.
func ParseChainID(s string) (ChainID, error) { return ChainID(s), parseID(s, "ch", "chain") }

// ParseDelegationID accepts only the form that [NewID] makes.
func ParseDelegationID(s string) (DelegationID, error) {
	return DelegationID(s), parseID(s, "dl", "delegation")
}

// ParseGrantID accepts only the form that [NewID] makes.
func ParseGrantID(s string) (GrantID, error) { return GrantID(s), parseID(s, "gr", "grant") }

// ParseRevocationID accepts only the form that [NewID] makes.
func ParseRevocationID(s string) (RevocationID, error) {
	return RevocationID(s), parseID(s, "rv", "revocation")
}
