package records

import (
	"fmt"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// The keys of the ledger, by family. All ids have the same length and alphabet, so no key is a prefix of another key of
// its family.
//
//	a/CHAIN          the chain is open or has live grants (no content)
//	b/policy         the policy bundle in force
//	c/CHAIN          a chain
//	d/DELEGATION     a delegation
//	e/CHAIN/REV      an entry of the audit log about the chain (no content)
//	f/REVOCATION     a rule: a fence over everything that a selector matches
//	g/GRANT          a grant
//	h/REV/DELEG      the acknowledgement of a revocation by a delegation's holder
//	i/TERM END/CHAIN a term of selectors that the chain has, and when the chain ends (no content)
//	j/CHAIN/GRANT    a token that was made ahead, for the step that may take it
//	k/DELEG/HASH     an idempotency key, with the grant it was used for
//	l/CHAIN/GRANT    the grant is not closed, and when it must end
//	m/CHAIN/DELEG    the delegation belongs to the chain (no content)
//	n/DIGEST         a canary value
//	o/OPENER END/CHAIN the caller opened the chain, which ends then (no content)
//	p/CHAIN/GRANT    the grant is closed (no content)
//	q/h/SUBJECT/TOOL the steps of a subject with a tool, in all chains, over time; both parts are digests
//	q/l/HASH         the steps of a subject under a limit, in all chains, over time
//	r/REVOCATION     a revocation
//	s/NUMBER         a segment of the archive, which store/archive writes
//	t/SUBSCRIBER     a subscriber's delivery cursor
//	u/DELEGATION     the usage of a delegation
//	v/CHAIN/GRANT    the grant is closed and Vault has still to remove its lease (no content)
//	w/CHAIN/GRANT    the grant is closed and its static secret still works (no content)
//	x/DELEG/GRANT    the grant was fenced by itself or by a rule (no content)
//	y/DELEGATION     the delegation has a heartbeat (no content)
//	z/END/CHAIN      the chain ends then, and the index lists it (no content)
//	D/DIGEST/GRANT   in the archive alone: the closed grant handed out this value (no content)
//
// END is the time in the form of [broker.IDTime].
const (
	prefixChain      = "c/"
	prefixEnded      = "z/"
	prefixGrant      = "g/"
	prefixLive       = "l/"
	prefixMember     = "m/"
	prefixCanary     = "n/"
	prefixPast       = "p/"
	prefixTally      = "q/"
	prefixRevocation = "r/"
	prefixRule       = "f/"
	prefixStatic     = "w/"
	prefixHeartbeat  = "y/"
	prefixLeftover   = "v/"
	prefixAhead      = "j/"

	keyBundle = "b/policy"
)

func keyChain(id broker.ChainID) string           { return prefixChain + string(id) }
func keyDelegation(id broker.DelegationID) string { return "d/" + string(id) }
func keyMember(c broker.ChainID, d broker.DelegationID) string {
	return inChain(prefixMember, c) + string(d)
}
func keyUsage(id broker.DelegationID) string            { return "u/" + string(id) }
func keyGrant(id broker.GrantID) string                 { return prefixGrant + string(id) }
func keyLive(c broker.ChainID, g broker.GrantID) string { return inChain(prefixLive, c) + string(g) }
func keyPast(c broker.ChainID, g broker.GrantID) string { return inChain(prefixPast, c) + string(g) }
func keyStatic(c broker.ChainID, g broker.GrantID) string {
	return inChain(prefixStatic, c) + string(g)
}
func keyLeftover(c broker.ChainID, g broker.GrantID) string {
	return inChain(prefixLeftover, c) + string(g)
}
func keyAhead(c broker.ChainID, g broker.GrantID) string { return inChain(prefixAhead, c) + string(g) }
func keyRevocation(id broker.RevocationID) string        { return prefixRevocation + string(id) }
func keyRule(id broker.RevocationID) string              { return prefixRule + string(id) }
func keyFenced(d broker.DelegationID, g broker.GrantID) string {
	return "x/" + string(d) + "/" + string(g)
}
func keyHeartbeat(d broker.DelegationID) string { return prefixHeartbeat + string(d) }
func keyEvent(c broker.ChainID, r broker.Revision) string {
	return fmt.Sprintf("e/%s/%016x", c, uint64(r))
}
func keyCanary(d broker.ValueDigest) string { return prefixCanary + string(d) }
func keyCursor(subscriber string) string    { return "t/" + subscriber }
func keyAcknowledged(rv broker.RevocationID, d broker.DelegationID) string {
	return "h/" + string(rv) + "/" + string(d)
}
func keyIdempotency(d broker.DelegationID, digest [32]byte) string {
	return fmt.Sprintf("k/%s/%x", d, digest[:16])
}

// inChain is the prefix of a family's keys in one chain, or in all chains when c is empty.
func inChain(prefix string, c broker.ChainID) string {
	if c == "" {
		return prefix
	}
	return prefix + string(c) + "/"
}

func keyOpen(c broker.ChainID) string { return "a/" + string(c) }
func keyOpener(opener string, end time.Time, c broker.ChainID) string {
	return "o/" + opener + " " + broker.IDTime(end) + "/" + string(c)
}
func keyTerms(term string) string { return "i/" + term }
func keyTerm(term string, end time.Time, c broker.ChainID) string {
	return keyTerms(term) + " " + broker.IDTime(end) + "/" + string(c)
}
func keyEnded(end time.Time, c broker.ChainID) string {
	return prefixEnded + broker.IDTime(end) + "/" + string(c)
}

// endAndChain returns the last two parts of a key of the index.
func endAndChain(key string) (end string, c broker.ChainID) {
	at := len(key) - broker.IDLength
	return key[at-1-len(noTime) : at-1], broker.ChainID(key[at:])
}

var noTime = broker.IDTime(time.Time{})
