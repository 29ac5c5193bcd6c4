package vault

import (
	"errors"
	"fmt"
	"strings"
)

// Limits of a path.
const (
	maxSegment  = 128 // bytes
	maxSegments = 16
)

// checkPath reports whether segments can be part of a Vault path. A segment has at most 128 bytes of letters, digits,
// dots, hyphens and underscores. It begins with a letter or digit and has no two dots in a row. Such a path has one
// spelling only: nothing on the way can normalize it to another path, as it does "a/../sys/mounts".
func checkPath(segments []string) error {
	if len(segments) == 0 || len(segments) > maxSegments {
		return fmt.Errorf("a vault path has between 1 and %d segments", maxSegments)
	}
	for i, s := range segments {
		if err := checkSegment(s); err != nil {
			return fmt.Errorf("segment %d of a vault path: %w", i+1, err)
		}
	}
	return nil
}

func checkSegment(s string) error {
	if s == "" || len(s) > maxSegment {
		return fmt.Errorf("must have between 1 and %d bytes", maxSegment)
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '.' && c != '-' && c != '_') || c == '.' && s[i-1] == '.' {
			return errors.New("must be letters and digits, and after the first also '.', '-' and '_', without '..'")
		}
	}
	return nil
}

// join checks the segments and joins them to a path.
func join(segments []string) (string, error) {
	if err := checkPath(segments); err != nil {
		return "", err
	}
	return strings.Join(segments, "/"), nil
}

// checkPolicy allows only names that Vault keeps unchanged. Vault lower-cases and trims other names, and a name that is
// normalized after its check was not checked (CVE-2025-5999 in Vault was that fault).
func checkPolicy(name string) error {
	if err := checkSegment(name); err != nil {
		return fmt.Errorf("vault policy %.40q: %w", name, err)
	}
	if strings.ToLower(name) != name || name == "root" || name == "default" {
		return fmt.Errorf("vault policy %q: must be lower-case and neither root nor default", name)
	}
	return nil
}

// checkLease refuses an id that is not a path of valid segments, since the client puts its prefix into a path.
func checkLease(id string) error {
	if err := checkPath(strings.Split(id, "/")); err != nil {
		return fmt.Errorf("lease id: %w", err)
	}
	return nil
}
