package broker

import "time"

// Subject is what a [Selector] looks at: a delegation, or a grant under it. For a delegation
// the fields from Grant on are zero.
type Subject struct {
	Chain  Chain
	Path   []Delegation // root first; the last holds the grant
	Grant  GrantID
	Tool   ToolName
	Args   Args
	Vault  string    // Vault mount and role, joined by slashes
	Bundle string    // digest of the policy bundle that decided
	At     time.Time // when the grant or delegation was made
}

// Selector says what a revocation is about.
type Selector struct{ text string }

// ParseSelector reads the selector language.
func ParseSelector(s string) (Selector, error) { return Selector{s}, nil }

// String is the selector as it was written.
func (s Selector) String() string { return s.text }

// Matches reports whether the subject is meant.
func (s Selector) Matches(Subject) bool { return false }
