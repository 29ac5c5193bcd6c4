package broker

import "github.com/spiffe/go-spiffe/v2/spiffeid"

// ChainSummary is one line about a chain.
type ChainSummary struct {
	Chain       Chain
	Delegations int
	Live        int    // grants that are not over
	Fence       *Fence // on the root
	Steps       int    // begun in all
}

// ChainView is all that the ledger holds of one chain.
type ChainView struct {
	Chain       Chain
	Delegations []Delegation // ancestors before descendants
	Grants      []Grant      // by time of creation; those that are over come too
}

// Event is what others may be told about an entry of the audit log.
type Event struct {
	Entry      Entry
	Revocation Revocation  // as it stands now, which may be later than the entry
	Opener     spiffeid.ID // of the revocation's chain; zero when it is a rule's
	Tally      Tally       // of a closure: as of the entry
}
