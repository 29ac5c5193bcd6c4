package broker

import "time"

// CanaryID names a planted value, "cn…".
type CanaryID string

// ParseCanaryID accepts only the form that [NewID] makes.
func ParseCanaryID(s string) (CanaryID, error) { return CanaryID(s), parseID(s, "cn", "canary") }

// Canary is a value that opens nothing and was planted where only a thief would find it. A caller that presents it has
// read something that it had no reason to read. The value itself is kept nowhere: the ledger has its [ValueDigest], as
// for values that were handed out.
type Canary struct {
	ID      CanaryID  `json:"id"`
	Chain   ChainID   `json:"chain,omitempty"` // the chain that could read it; empty: none
	Note    string    `json:"note,omitempty"`  // where it was planted, for people
	By      string    `json:"by"`              // the operator
	Planted time.Time `json:"planted"`
	Touched time.Time `json:"touched,omitzero"` // when it was last presented; zero: never
	Touches int       `json:"touches,omitempty"`
}

// CanaryKind is the kind of token that a canary imitates. The zero value is CanaryVaultToken.
type CanaryKind string

// The kinds of canaries: tokens that thieves try and that scanners know.
const (
	CanaryVaultToken  CanaryKind = "vault"  // a Vault service token, like those of the token plugin
	CanaryGitHubToken CanaryKind = "github" // a GitHub personal access token with a correct checksum
)

// PlantRequest asks for a canary.
type PlantRequest struct {
	Chain ChainID // empty: of no chain
	Note  string  // at most MaxTask bytes
	Like  CanaryKind
}
