package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Chain is one task's tree of delegations and the unit of revocation.
type Chain struct {
	ID     ChainID           `json:"id"`
	Task   string            `json:"task"`
	Opener spiffeid.ID       `json:"opener"`
	Opened time.Time         `json:"opened"`
	Labels map[string]string `json:"labels,omitempty"`
	Root   DelegationID      `json:"root"`
}

// Delegation is a node of a chain: its holder may use, or may pass on, some tools until a time.
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
	Tokens  []Handle     `json:"tokens,omitempty"` // every Vault token it ever had; revoking kills all
	Fence   *Fence       `json:"fence,omitempty"`

	Heartbeat time.Duration `json:"heartbeat,omitempty"` // the holder promised to be heard this often; zero: it did not
}

// Fence is the mark after which no secret is handed out under what carries it.
type Fence struct {
	Generation Revision     `json:"generation"` // the revision at which it was set: it only goes up
	At         time.Time    `json:"at"`
	Revocation RevocationID `json:"revocation"`
	Frozen     bool         `json:"frozen,omitempty"` // may be lifted; a later revocation makes it final
}
