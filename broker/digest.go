package broker

import (
	"crypto/sha256"
	"encoding/base64"
	"strings"
)

// ValueDigest stands for a value of a secret in the ledger, so that whoever finds the value somewhere
// can find its grant: the first 128 bits of its SHA-256. It is kept only of values that a machine drew
// with about as many bits or more: from the digest of one that a person chose, it could be guessed.
type ValueDigest string

// DigestValue gives the digest of a value; a line break at its end does not count, since files have one.
func DigestValue(value string) ValueDigest {
	sum := sha256.Sum256([]byte(TrimValue(value)))
	return DigestOfSum(sum)
}

// TrimValue takes one line break off the end of a value.
func TrimValue(value string) string {
	return strings.TrimSuffix(strings.TrimSuffix(value, "\n"), "\r")
}

// DigestOfSum gives the digest of the value with this SHA-256.
func DigestOfSum(sum [sha256.Size]byte) ValueDigest {
	return ValueDigest(base64.RawURLEncoding.EncodeToString(sum[:16]))
}
