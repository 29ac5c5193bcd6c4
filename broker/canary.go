package broker

import "time"

// CanaryID names a planted value, "cn…".
type CanaryID string

// ParseCanaryID accepts exactly what this package makes.
func ParseCanaryID(s string) (CanaryID, error) { return CanaryID(s), parseID(s, "cn", "canary") }

// Canary is a value that opens nothing and was put where only a thief would find it. Whoever presents it has
// read what he had no business with. The value itself is kept nowhere: the ledger has its [ValueDigest], as
// for values that were handed out.
type Canary struct {
	ID      CanaryID  `json:"id"`
	Chain   ChainID   `json:"chain,omitempty"` // in whose reach it was planted; empty: of no chain
	Note    string    `json:"note,omitempty"`  // where it was put, for people
	By      string    `json:"by"`              // the operator
	Planted time.Time `json:"planted"`
	Touched time.Time `json:"touched,omitzero"` // when it was last presented; zero: never
	Touches int       `json:"touches,omitempty"`
}

// CanaryKind is what kind of token a canary's value looks like. The zero value is CanaryVaultToken.
type CanaryKind string

// The guises: tokens that thieves try and scanners know.
const (
	CanaryVaultToken  CanaryKind = "vault"  // a Vault service token, as steps of the token plugin are given
	CanaryGitHubToken CanaryKind = "github" // a personal access token, whose checksum is right
)

// PlantRequest asks for a canary.
type PlantRequest struct {
	Chain ChainID // empty: of no chain
	Note  string  // at most MaxTask bytes
	Like  CanaryKind
}
