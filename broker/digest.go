package broker

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"strings"
)

// ValueDigest stands for a value of a secret in the ledger, so that whoever finds the value somewhere
// can find its grant: the first 128 bits of its SHA-256. It is kept only of values that a machine drew
// with about as many bits or more: from the digest of one that a person chose, it could be guessed.
type ValueDigest string

// DigestValue gives the digest of a value; a line break at its end does not count, since files have one.
func DigestValue(value string) ValueDigest {
	sum := sha256.Sum256([]byte(TrimValue(value)))
	return shortDigest(sum[:])
}

// TrimValue takes one line break off the end of a value.
func TrimValue(value string) string {
	return strings.TrimSuffix(strings.TrimSuffix(value, "\n"), "\r")
}

// LeakedSelector is the selector of the grants that handed out a value. It does not hold the value.
func LeakedSelector(value string) Selector {
	sum := sha256.Sum256([]byte(TrimValue(value)))
	return Selector{&selectorNode{term: selectorTerm{key: "leaked", value: leakedPrefix + hex.EncodeToString(sum[:]), digest: shortDigest(sum[:])}}}
}

const leakedPrefix = "sha256:"

func shortDigest(sum []byte) ValueDigest {
	return ValueDigest(base64.RawURLEncoding.EncodeToString(sum[:16]))
}

// checkLeaked gives what a term's value stands for in the ledger.
func checkLeaked(value string) (ValueDigest, error) {
	text, ok := strings.CutPrefix(value, leakedPrefix)
	sum, err := hex.DecodeString(text)
	if !ok || err != nil || len(sum) != sha256.Size || strings.ToLower(text) != text {
		return "", errors.New("expected sha256: and 64 lower-case hexadecimal digits, as pawl leaked prints them; never the value itself")
	}
	return shortDigest(sum), nil
}
