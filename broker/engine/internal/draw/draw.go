// Package draw draws canary values that have the form of real tokens.
package draw

import (
	"encoding/base64"
	"fmt"
	"hash/crc32"
	"io"
)

// VaultToken draws a value with the form of a Vault service token: "hvs." and 92 characters.
func VaultToken(random io.Reader) (string, error) {
	var raw [66]byte
	if _, err := io.ReadFull(random, raw[:]); err != nil {
		return "", fmt.Errorf("drawing a canary: %w", err)
	}
	return "hvs.CAES" + base64.RawURLEncoding.EncodeToString(raw[:]), nil
}

const base62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

// GitHubToken draws a value with the form of a GitHub personal access token: "ghp_", 30 characters, and six that encode
// their CRC-32. Scanners recognize such a token by the checksum.
func GitHubToken(random io.Reader) (string, error) {
	drawn := make([]byte, 0, 30)
	var one [1]byte
	for len(drawn) < cap(drawn) {
		if _, err := io.ReadFull(random, one[:]); err != nil {
			return "", fmt.Errorf("drawing a canary: %w", err)
		}
		if n := int(one[0]); n < 4*len(base62) { // a larger byte would make some characters more likely
			drawn = append(drawn, base62[n%len(base62)])
		}
	}
	var check [6]byte
	sum := crc32.ChecksumIEEE(drawn)
	for i := len(check) - 1; i >= 0; i-- {
		check[i] = base62[sum%62]
		sum /= 62
	}
	return "ghp_" + string(drawn) + string(check[:]), nil
}
