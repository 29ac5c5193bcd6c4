package broker

import "github.com/spiffe/go-spiffe/v2/spiffeid"

// ChainSummary is a chain in one line.
type ChainSummary struct {
	Chain       Chain
	Delegations int
	Live        int    // grants that are not closed
	Fence       *Fence // on the root
	Steps       int    // that were started, in all
}

// ChainView is the whole record of one chain in the ledger.
type ChainView struct {
	Chain       Chain
	Delegations []Delegation // ancestors before descendants
	Grants      []Grant      // by time of creation, closed ones included
}

// Event is an entry of the audit log for subscribers, with the state that it belongs to.
type Event struct {
	Entry      Entry
	Revocation Revocation  // in its current state, which may be later than the entry
	Opener     spiffeid.ID // of the revocation's chain; zero for a rule
	Tally      Tally       // of a closure: as of the entry
}
