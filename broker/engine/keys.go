package engine

import (
	"encoding/json"
	"fmt"

	"github.com/pawlsec/pawl/broker"
)

// The keys of the ledger. Ids have one length and alphabet, so no key is a prefix of another
// of its family.
func keyChain(id broker.ChainID) string           { return "c/" + string(id) }
func keyDelegation(id broker.DelegationID) string { return "d/" + string(id) }
func keyMember(c broker.ChainID, d broker.DelegationID) string {
	return "m/" + string(c) + "/" + string(d)
}
func keyUsage(id broker.DelegationID) string            { return "u/" + string(id) }
func keyGrant(id broker.GrantID) string                 { return "g/" + string(id) }
func keyLive(c broker.ChainID, g broker.GrantID) string { return "l/" + string(c) + "/" + string(g) }
func keyPast(c broker.ChainID, g broker.GrantID) string { return "p/" + string(c) + "/" + string(g) }
func keyRevocation(id broker.RevocationID) string       { return "r/" + string(id) }
func keyCut(d broker.DelegationID, g broker.GrantID) string {
	return "x/" + string(d) + "/" + string(g)
}
func keyStatic(c broker.ChainID, g broker.GrantID) string { return "w/" + string(c) + "/" + string(g) }
func keyRule(id broker.RevocationID) string               { return "f/" + string(id) }
func keyBeat(d broker.DelegationID) string                { return "y/" + string(d) }
func keyEvent(c broker.ChainID, r broker.Revision) string {
	return fmt.Sprintf("e/%s/%016x", c, uint64(r))
}
func keyCanary(d broker.ValueDigest) string { return "n/" + string(d) }
func keyOnce(d broker.DelegationID, digest [32]byte) string {
	return fmt.Sprintf("k/%s/%x", d, digest[:16])
}

// load reads a record; ok is false when there is none.
func load[T any](tx broker.Tx, key string) (rec T, ok bool, err error) {
	raw, err := tx.Get(key)
	if err != nil || raw == nil {
		return rec, false, err
	}
	if err := json.Unmarshal(raw, &rec); err != nil {
		return rec, false, fmt.Errorf("reading record %q: %w", key, err)
	}
	return rec, true, nil
}

// save writes a record.
func save(tx broker.Tx, key string, rec any) error {
	raw, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encoding record %q: %w", key, err)
	}
	return tx.Put(key, raw)
}

// enter appends an entry and lists its revision under its chain, where reports look: all but the
// inner steps of an issue, whose end says more.
func enter(tx broker.Tx, e broker.Entry) (broker.Revision, error) {
	rev, err := tx.Append(e)
	if err != nil || e.Chain == "" || e.Op == broker.OpIntent || e.Op == broker.OpHandle {
		return rev, err
	}
	return rev, tx.Put(keyEvent(e.Chain, rev), []byte{})
}
