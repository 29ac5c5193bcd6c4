package broker

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// VaultPath is a path in Vault: a mount and the path below it. Every path has exactly one spelling, so neither Vault
// nor a proxy before it normalizes one path to another, as it does "a/../sys/mounts". [ParseVaultPath] and
// [VaultPathOf] make one. The zero VaultPath is no path: it has no segments, and every user of a path refuses it.
// VaultPaths compare with ==.
type VaultPath struct{ text string }

// ParseVaultPath reads a path of 1 to [MaxVaultSegments] segments joined by slashes. [CheckVaultName] gives the rule
// for a segment. The error names the first segment that breaks it, the fault, and the rule.
func ParseVaultPath(s string) (VaultPath, error) {
	if s == "" {
		return VaultPath{}, errNoSegments
	}
	if n := strings.Count(s, "/") + 1; n > MaxVaultSegments { // before the path is taken apart
		return VaultPath{}, tooManySegments(n)
	}
	return VaultPathOf(strings.Split(s, "/")...)
}

// VaultPathOf makes a path of its segments, by the rules of [ParseVaultPath].
func VaultPathOf(segments ...string) (VaultPath, error) {
	if len(segments) == 0 {
		return VaultPath{}, errNoSegments
	}
	if len(segments) > MaxVaultSegments {
		return VaultPath{}, tooManySegments(len(segments))
	}
	for i, s := range segments {
		if err := CheckVaultName(s); err != nil {
			return VaultPath{}, fmt.Errorf("segment %d of a vault path: %w", i+1, err)
		}
	}
	return VaultPath{strings.Join(segments, "/")}, nil
}

var errNoSegments = fmt.Errorf("a vault path is empty: it has 1 to %d segments joined by slashes", MaxVaultSegments)

func tooManySegments(n int) error {
	return fmt.Errorf("a vault path has %d segments: it has 1 to %d", n, MaxVaultSegments)
}

// CheckVaultName checks a name that is one segment of a path in Vault: of a mount, a role, a key or a policy. It has
// 1 to [MaxVaultName] bytes of A-Z, a-z, 0-9, ".", "-" and "_". It begins with a letter or digit and has no "..". The
// error names the fault and the rule.
func CheckVaultName(s string) error {
	if fault := vaultNameFault(s); fault != "" {
		return fmt.Errorf("%.40q %s: a name in Vault has 1 to %d letters, digits, '.', '-' and '_', "+
			"begins with a letter or digit, and has no '..'", s, fault, MaxVaultName)
	}
	return nil
}

func vaultNameFault(s string) string {
	if s == "" {
		return "is empty"
	}
	if len(s) > MaxVaultName {
		return fmt.Sprintf("has %d bytes", len(s))
	}
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9':
		case c != '.' && c != '-' && c != '_':
			r, _ := utf8.DecodeRuneInString(s[i:])
			return fmt.Sprintf("has %q at byte %d", r, i+1)
		case i == 0:
			return fmt.Sprintf("begins with %q", c)
		case c == '.' && s[i-1] == '.':
			return fmt.Sprintf("has '..' at byte %d", i)
		}
	}
	return ""
}

// Segments returns the path's segments, the mount's first. The caller owns the slice.
func (p VaultPath) Segments() []string {
	if p.IsZero() {
		return nil
	}
	return strings.Split(p.text, "/")
}

// Insert returns the path with one more segment at index i. A backend makes its mint path with it, which may so exceed
// [MaxVaultSegments]. If p has fewer than i segments the result is the zero VaultPath. The segment is a constant of the
// caller: Insert panics if it breaks the rule of [CheckVaultName].
func (p VaultPath) Insert(i int, segment string) VaultPath {
	if err := CheckVaultName(segment); err != nil {
		panic("broker: a backend inserts a segment into a vault path that is not valid: " + err.Error())
	}
	segments := p.Segments()
	if p.IsZero() || i > len(segments) {
		return VaultPath{}
	}
	return VaultPath{strings.Join(slices.Insert(segments, i, segment), "/")}
}

// IsZero reports whether p is no path.
func (p VaultPath) IsZero() bool { return p.text == "" }

// String is the segments joined by slashes, which [ParseVaultPath] reads. It is empty for the zero VaultPath.
func (p VaultPath) String() string { return p.text }

// MarshalText is [VaultPath.String].
func (p VaultPath) MarshalText() ([]byte, error) { return []byte(p.text), nil }

// UnmarshalText is [ParseVaultPath], but reads an empty text as the zero VaultPath.
func (p *VaultPath) UnmarshalText(text []byte) (err error) {
	*p = VaultPath{}
	if len(text) > 0 {
		*p, err = ParseVaultPath(string(text))
	}
	return err
}
