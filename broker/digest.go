package broker

import (
	"crypto/sha256"
	"encoding/base64"
	"strings"
)

// ValueDigest identifies a value of a secret in the ledger. It is the first 128 bits of the value's SHA-256. With it
// the grant of a leaked value can be found. The ledger keeps digests only of values that a machine generated, with
// about 128 random bits or more. A value that a person chose could be guessed from its digest.
type ValueDigest string

// DigestValue returns the digest of a value. A line break at its end does not count, because files have one.
func DigestValue(value string) ValueDigest {
	sum := sha256.Sum256([]byte(TrimValue(value)))
	return DigestOfSum(sum)
}

// TrimValue removes one line break from the end of a value.
func TrimValue(value string) string {
	return strings.TrimSuffix(strings.TrimSuffix(value, "\n"), "\r")
}

// DigestOfSum returns the digest of the value that has this SHA-256.
func DigestOfSum(sum [sha256.Size]byte) ValueDigest {
	return ValueDigest(base64.RawURLEncoding.EncodeToString(sum[:16]))
}
