package selector

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"

	"github.com/pawlsec/pawl/broker"
)

// ForLeaked returns the selector of the grants that handed out a value. The selector does not contain the value.
func ForLeaked(value string) Selector {
	sum := sha256.Sum256([]byte(broker.TrimValue(value)))
	text := leakedPrefix + hex.EncodeToString(sum[:])
	return Selector{&node{term: term{key: "leaked", value: text, digest: broker.DigestOfSum(sum)}}}
}

const leakedPrefix = "sha256:"

// checkLeaked returns the digest by which the ledger knows a term's value.
func checkLeaked(value string) (broker.ValueDigest, error) {
	text, ok := strings.CutPrefix(value, leakedPrefix)
	sum, err := hex.DecodeString(text)
	if !ok || err != nil || len(sum) != sha256.Size || strings.ToLower(text) != text {
		return "", errors.New("expected sha256: and 64 lower-case hexadecimal digits, as pawl leaked prints them; " +
			"never the value itself")
	}
	return broker.DigestOfSum([sha256.Size]byte(sum)), nil
}
