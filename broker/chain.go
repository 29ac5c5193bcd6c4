package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Chain is one task's tree of delegations, and the unit of revocation.
type Chain struct {
	ID     ChainID           `json:"id"`
	Task   string            `json:"task"`
	Opener spiffeid.ID       `json:"opener"`
	Opened time.Time         `json:"opened"`
	Labels map[string]string `json:"labels,omitempty"`
	Root   DelegationID      `json:"root"`
}

// Delegation is a node of a chain. Its holder may use some tools, or may pass them on, until a time.
type Delegation struct {
	ID      DelegationID `json:"id"`
	Chain   ChainID      `json:"chain"`
	Parent  DelegationID `json:"parent,omitempty"` // empty: the root
	Holder  spiffeid.ID  `json:"holder"`
	Scope   Scope        `json:"scope"`
	Budget  Budget       `json:"budget"`
	Depth   int          `json:"depth"` // how many more times it may be passed on
	Created time.Time    `json:"created"`
	Expires time.Time    `json:"expires"`
	Tokens  []Handle     `json:"tokens,omitempty"` // every Vault token it ever had; a revocation revokes them all
	Fence   *Fence       `json:"fence,omitempty"`

	// Heartbeat is the longest time between two heartbeats that the holder promised. Zero: no promise.
	Heartbeat time.Duration `json:"heartbeat,omitempty"`
}

// Fence is the mark on a node, a grant or a rule after which no secret is handed out under it.
type Fence struct {
	Generation Revision     `json:"generation"` // the revision at which it was set: it only goes up
	At         time.Time    `json:"at"`
	Revocation RevocationID `json:"revocation"`
	Frozen     bool         `json:"frozen,omitempty"` // may be lifted; a later revocation makes it final
}
