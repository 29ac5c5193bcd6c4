package broker

import (
	"fmt"
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

// Limits of a chain. A request beyond them is malformed or denied with the limit's name.
const (
	MaxDepth    = 8              // delegations below the root
	MaxChainTTL = 24 * time.Hour // a delegation's life
	MaxTask     = 256            // bytes of a task's or purpose's text
	MaxLabels   = 16             // labels of a chain, each name and value at most 64 bytes
)

// DefaultChainTTL is a chain's life where the opener does not ask for less or more.
const DefaultChainTTL = time.Hour

// MinHeartbeat is the shortest interval at which a holder may be asked to be heard.
const MinHeartbeat = time.Second

// Budget limits what may happen under a delegation, its descendants included. Zero in a field
// means no limit of its own; an ancestor's still counts.
type Budget struct {
	Steps     int              `json:"steps,omitempty"`      // steps in all
	Live      int              `json:"live,omitempty"`       // secrets alive at once, those being minted included
	PerMinute int              `json:"per_minute,omitempty"` // steps begun in any one minute of the clock
	Tools     map[ToolName]int `json:"tools,omitempty"`      // steps in all with one tool
}

// wider names the limits in which child is not within b.
func (b Budget) Wider(child Budget) (wider []string) {
	over := func(name string, parent, child int) {
		if parent > 0 && (child == 0 || child > parent) {
			wider = append(wider, "budget:"+name)
		}
	}
	over("steps", b.Steps, child.Steps)
	over("live", b.Live, child.Live)
	over("per_minute", b.PerMinute, child.PerMinute)
	for tool, n := range b.Tools {
		over("tools:"+string(tool), n, child.Tools[tool])
	}
	return wider
}

// limits reports whether there is any limit.
func (b Budget) Limited() bool {
	return b.Steps > 0 || b.Live > 0 || b.PerMinute > 0 || len(b.Tools) > 0
}

func (b Budget) Check() error {
	bad := b.Steps < 0 || b.Live < 0 || b.PerMinute < 0 || len(b.Tools) > MaxRights
	for tool, n := range b.Tools {
		if _, err := ParseToolName(string(tool)); err != nil {
			return err
		}
		bad = bad || n < 0
	}
	if bad {
		return fmt.Errorf("a budget's limits are not negative and name at most %d tools", MaxRights)
	}
	return nil
}

// Past is what a chain has done with one tool.
type Past struct {
	Count int       `json:"count"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
}

// Fence is the mark after which no secret is handed out under what carries it.
type Fence struct {
	Generation Revision     `json:"generation"` // the revision at which it was set: it only goes up
	At         time.Time    `json:"at"`
	Revocation RevocationID `json:"revocation"`
	Frozen     bool         `json:"frozen,omitempty"` // may be lifted; a later revocation makes it final
}
