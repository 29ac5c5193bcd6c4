package broker

import (
	"strconv"
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

	// Envelope is the one that it was opened with, or nil. Task and Labels are the opener's own claims.
	Envelope *Envelope `json:"envelope,omitempty"`
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

// Principal returns the one for whom the chain acts: the subject on whose behalf its envelope was issued, or its opener.
// The form is a SPIFFE ID, or the issuer of the envelope, a space and the name of the subject.
func (c Chain) Principal() string {
	switch e := c.Envelope; {
	case e == nil || e.Behalf == "":
		return c.Opener.String()
	case IsSPIFFE(e.Behalf):
		return e.Behalf
	default:
		return e.Issuer + " " + e.Behalf
	}
}

// Purpose describes the chain in one line: the task as its opener claims it, and the statements of its envelope.
func (c Chain) Purpose() string {
	e := c.Envelope
	if e == nil {
		return c.Task
	}
	text := c.Task + "; envelope " + strconv.Quote(e.ID) + " of " + e.Issuer
	if e.Behalf != "" {
		text += ", on behalf of " + strconv.Quote(e.Behalf)
	}
	if e.Task != "" {
		text += ", task " + strconv.Quote(e.Task)
	}
	return text
}

// SignedLabels returns the labels of the chain's envelope; nil: it has none.
func (c Chain) SignedLabels() map[string]string {
	if c.Envelope == nil {
		return nil
	}
	return c.Envelope.Labels
}
