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

// ChainView is a part of the record of one chain in the ledger: its delegations, and after them its grants.
type ChainView struct {
	Chain       Chain
	Delegations []Delegation // ancestors before descendants
	Grants      []Grant      // by time of creation, closed ones included
	Next        string       // the id after which the next part begins; empty: this is the last
}

// Page asks for a part of a list.
type Page struct {
	After string // the id at which the former page ended; empty: from the start
	Limit int    // the most items, over 0

	Recent bool // leave out archived items
}

// EachPage calls f with each page of a list, until f returns no next one. It asks for pages of the largest size.
func EachPage(f func(Page) (next string, err error)) error { return eachPage(Page{Limit: MaxPage}, f) }

// EachRecentPage is EachPage without archived items.
func EachRecentPage(f func(Page) (next string, err error)) error {
	return eachPage(Page{Limit: MaxPage, Recent: true}, f)
}

func eachPage(p Page, f func(Page) (next string, err error)) error {
	for {
		next, err := f(p)
		if err != nil || next == "" {
			return err
		}
		p.After = next
	}
}

// Event is an entry of the audit log for subscribers, with the state that it belongs to.
type Event struct {
	Entry      Entry
	Revocation Revocation  // in its current state, which may be later than the entry; zero for a touched canary
	Opener     spiffeid.ID // of the revocation's chain; zero for a rule
	Tally      Tally       // of a closure: as of the entry
}

// Condition is something that is wrong with the running broker, as its health endpoints, metrics and `pawl doctor` name it.
type Condition struct {
	Part   string // "identity", "vault", or "tool " and a name
	Code   Code   // a fixed word
	Text   string // for operators
	Blocks bool   // nothing is issued
}
