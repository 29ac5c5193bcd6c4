package records

import (
	"bytes"
	"cmp"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// A chain can be archived when nothing can happen to it any more and no later revocation can concern it: it ended
// before a time, and so did the latest end of each of its secrets. It has no live grant, no token that was made ahead,
// no lease that Vault has still to remove, and no static secret that works. The index has done with it. No revocation
// that may cover it is unsettled.
//
// A revocation follows when it has settled before that time, and the chains that it may cover are archived.
//
// A chain is removed in two parts. The first has its delegations: it is one transaction, which checks all of this
// again. After that no procedure finds the chain. The second part has its grants, in as many transactions as they need.

// prefixDigest is of keys that only the archive has: D/DIGEST/GRANT, for the values of closed grants.
const prefixDigest = "D/"

// Archivable lists chains that can be archived, the oldest first, after a chain. It looks at most at most of them, and
// returns the last that it looked at; empty: there are no more.
func (t *Tx) Archivable(old time.Time, after broker.ChainID, most int,
) (list []broker.ChainID, last broker.ChainID, err error) {
	var found []broker.ChainID
	end := prefixChain + "ch" + broker.IDTime(old)
	from := ""
	if after != "" {
		from = keyChain(after)
	}
	if err := t.tx.Scan(prefixChain, from, func(key string, _ []byte) bool {
		if key >= end {
			return false
		}
		found = append(found, broker.ChainID(key[len(prefixChain):]))
		return len(found) < most
	}); err != nil || len(found) == 0 {
		return nil, "", err
	}
	unsettled, err := t.unsettled()
	err = each(found, err, func(id broker.ChainID) error {
		c, ok, err := t.mayArchive(id, old, unsettled)
		if err == nil && ok {
			list = append(list, c.ID)
		}
		return err
	})
	if len(found) == most {
		last = found[most-1]
	}
	return list, last, err
}

// unsettled returns the final revocations with work left.
func (t *Tx) unsettled() (list []broker.Revocation, err error) {
	err = t.EachRevocation(func(rv broker.Revocation) error {
		if !rv.Freeze && (rv.Settled.IsZero() || rv.Leases > 0) {
			list = append(list, rv)
		}
		return nil
	})
	return list, err
}

// mayArchive reports whether a chain is done with, but for the ends of its grants.
func (t *Tx) mayArchive(id broker.ChainID, old time.Time, unsettled []broker.Revocation,
) (c broker.Chain, ok bool, err error) {
	c, ok, err = t.Chain(id)
	if err != nil || !ok {
		return c, false, err
	}
	root, ok, err := t.Delegation(c.Root)
	if err != nil || !ok || !root.Expires.Before(old) {
		return c, false, err
	}
	for _, key := range []string{keyOpen(id), keyEnded(root.Expires, id)} {
		if listed, err := t.has(key); err != nil || listed {
			return c, false, err
		}
	}
	if busy, err := t.hasGrants(id); err != nil || busy {
		return c, false, err
	}
	if ahead, err := t.first(inChain(prefixAhead, id), ""); err != nil || ahead != "" {
		return c, false, err
	}
	return c, !slices.ContainsFunc(unsettled, func(rv broker.Revocation) bool {
		return rv.Chain == id || rv.Chain == "" && !c.Opened.After(rv.Fenced) && !root.Expires.Before(rv.Fenced)
	}), nil
}

// KeysOf returns the keys of all records of a chain.
func (t *Tx) KeysOf(id broker.ChainID) (keys []string, err error) {
	list, _, err := t.recordsOf(id)
	for _, r := range list {
		keys = append(keys, r.Key)
	}
	return keys, err
}

// recordsOf returns all records of a chain, and its closed grants.
func (t *Tx) recordsOf(id broker.ChainID) (list []broker.Archived, grants []broker.GrantID, err error) {
	members, err := ids[broker.DelegationID](t, inChain(prefixMember, id), "")
	if err != nil {
		return nil, nil, err
	}
	if grants, err = ids[broker.GrantID](t, inChain(prefixPast, id), ""); err != nil {
		return nil, nil, err
	}
	prefixes := []string{keyChain(id), inChain(prefixMember, id), inChain(prefixPast, id), "e/" + string(id) + "/"}
	for _, d := range members {
		prefixes = append(prefixes, keyDelegation(d), keyUsage(d), keyHeartbeat(d), "k/"+string(d)+"/", keyFenced(d, ""))
	}
	for _, g := range grants {
		prefixes = append(prefixes, keyGrant(g))
	}
	return list, grants, each(prefixes, nil, func(prefix string) error {
		return t.tx.Scan(prefix, "", func(key string, value []byte) bool {
			list = append(list, broker.Archived{Key: key, Value: slices.Clone(value)})
			return true
		})
	})
}

// ArchiveChain returns all records of a chain for the archive, with the keys by which selectors and leaked values find
// it there; none: a secret of it may still work.
func (t *Tx) ArchiveChain(id broker.ChainID, old time.Time) (list []broker.Archived, err error) {
	c, ok, err := t.Chain(id)
	if err != nil || !ok {
		return nil, err
	}
	k, err := t.indexOf(c)
	if err != nil {
		return nil, err
	}
	list, grants, err := t.recordsOf(id)
	if err != nil {
		return nil, err
	}
	for _, key := range k.terms {
		list = append(list, broker.Archived{Key: key})
	}
	works := false
	err = each(grants, nil, func(id broker.GrantID) error {
		g, _, err := t.Grant(id)
		works = works || g.State != broker.StateClosed || !g.Ended.Before(old) || !g.LatestEnd().Before(old)
		for _, digest := range g.Lease.Digests {
			list = append(list, broker.Archived{Key: prefixDigest + string(digest) + "/" + string(id)})
		}
		return err
	})
	if works {
		return nil, err
	}
	return dedupe(list), err
}

// dedupe drops the second of two records with one key.
func dedupe(list []broker.Archived) []broker.Archived {
	slices.SortStableFunc(list, func(a, b broker.Archived) int { return cmp.Compare(a.Key, b.Key) })
	return slices.CompactFunc(list, func(a, b broker.Archived) bool { return a.Key == b.Key })
}

// ArchivableRevocations lists the revocations that can be archived, at most most.
func (t *Tx) ArchivableRevocations(old time.Time, most int) (list []broker.RevocationID, err error) {
	oldest, err := t.first(prefixChain, "")
	if err != nil {
		return nil, err
	}
	end := prefixRevocation + "rv" + broker.IDTime(old)
	var found []broker.RevocationID
	if err := t.tx.Scan(prefixRevocation, "", func(key string, _ []byte) bool {
		found = append(found, broker.RevocationID(key[len(prefixRevocation):]))
		return key < end && len(found) < 10*most
	}); err != nil {
		return nil, err
	}
	err = each(found, nil, func(id broker.RevocationID) error {
		ok, err := t.mayArchiveRevocation(id, old, oldest)
		if err == nil && ok && len(list) < most {
			list = append(list, id)
		}
		return err
	})
	return list, err
}

func (t *Tx) mayArchiveRevocation(id broker.RevocationID, old time.Time, oldest string) (bool, error) {
	rv, ok, err := t.Revocation(id)
	if err != nil || !ok || rv.Settled.IsZero() || !rv.Settled.Before(old) || rv.Leases > 0 || rv.Alive > 0 {
		return false, err
	}
	if rule, err := t.has(keyRule(id)); err != nil || rule {
		return false, err
	}
	if rv.Chain != "" {
		there, err := t.has(keyChain(rv.Chain))
		return !there, err
	}
	return oldest == "" || oldest > prefixChain+"ch"+broker.IDTime(rv.Fenced.Add(time.Second)), nil
}

// ArchiveRevocation returns the records of a revocation for the archive.
func (t *Tx) ArchiveRevocation(id broker.RevocationID) (list []broker.Archived, err error) {
	err = each([]string{keyRevocation(id), keyAcknowledged(id, "")}, nil, func(prefix string) error {
		return t.tx.Scan(prefix, "", func(key string, value []byte) bool {
			list = append(list, broker.Archived{Key: key, Value: slices.Clone(value)})
			return true
		})
	})
	return list, err
}

// Detach removes the first part of chains and revocations, of which a segment has the records with these keys, unless
// they cannot be archived any more.
func (t *Tx) Detach(heads []string, old time.Time) (n int, err error) {
	unsettled, err := t.unsettled()
	if err != nil {
		return 0, err
	}
	oldest, err := t.first(prefixChain, "")
	return n, each(heads, err, func(key string) error {
		var prefixes []string
		id := key[len(prefixChain):]
		if strings.HasPrefix(key, prefixRevocation) {
			ok, err := t.mayArchiveRevocation(broker.RevocationID(id), old, oldest)
			if err != nil || !ok {
				return err
			}
			prefixes = []string{key, keyAcknowledged(broker.RevocationID(id), "")}
		} else {
			chain := broker.ChainID(id)
			_, ok, err := t.mayArchive(chain, old, unsettled)
			if err != nil || !ok {
				return err
			}
			members, err := ids[broker.DelegationID](t, inChain(prefixMember, chain), "")
			if err != nil {
				return err
			}
			prefixes = []string{key, inChain(prefixMember, chain)}
			for _, d := range members {
				prefixes = append(prefixes, keyDelegation(d), keyUsage(d), keyHeartbeat(d))
			}
		}
		n++
		clear(t.lineages)
		return each(prefixes, nil, t.dropAll)
	})
}

// dropAll deletes all records with a prefix.
func (t *Tx) dropAll(prefix string) error {
	var keys []string
	err := t.tx.Scan(prefix, "", func(key string, _ []byte) bool { keys = append(keys, key); return true })
	return each(keys, err, t.drop)
}

// IsHead reports whether a key is the record of a chain or of a revocation: see [Tx.Detach].
func IsHead(key string) bool {
	return strings.HasPrefix(key, prefixChain) || strings.HasPrefix(key, prefixRevocation)
}

// Kept returns those of the chains with these heads that were not detached.
func (t *Tx) Kept(heads []string) (kept []broker.ChainID, err error) {
	err = each(heads, nil, func(key string) error {
		there, err := t.has(key)
		if there && strings.HasPrefix(key, prefixChain) {
			kept = append(kept, broker.ChainID(key[len(prefixChain):]))
		}
		return err
	})
	return kept, err
}

// DropArchived removes the second part of the records of a segment: those with these keys.
func (t *Tx) DropArchived(list []broker.Archived, kept map[string]bool) error {
	return each(list, nil, func(r broker.Archived) error {
		switch r.Key[:2] {
		case prefixGrant, prefixPast, "e/", "k/", "x/":
			// A record that was changed after step 1 stays, and comes before the archived one.
			if raw, err := t.tx.Get(r.Key); err != nil || raw == nil || kept[r.Key] || !bytes.Equal(raw, r.Value) {
				return err
			}
			return t.drop(r.Key)
		}
		return nil // of the first part, or only in the archive
	})
}

// Trim removes entries of the audit log that were archived.
func (t *Tx) Trim(through broker.Revision) error { return t.tx.Trim(through) }

// FinishSegment records that the records of a segment were removed.
func (t *Tx) FinishSegment(a broker.Archive, s broker.Segment) error { return a.Finish(t.tx, s) }

// ByDigest returns the archived grant that handed out a value, by the archive's index.
func (t *Tx) ByDigest(d broker.ValueDigest) (g broker.Grant, ok bool, err error) {
	key, err := t.first(prefixDigest+string(d)+"/", "")
	if err != nil {
		return g, false, err
	}
	if key == "" {
		return g, false, nil
	}
	return t.Grant(broker.GrantID(key[len(key)-broker.IDLength:]))
}

// ClosedWith returns the closed grant of the ledger that handed out a value. It reads all of them.
func (t *Tx) ClosedWith(d broker.ValueDigest) (g broker.Grant, ok bool, err error) {
	err = t.EachPast(Everywhere, func(one broker.Grant) error {
		if slices.Contains(one.Lease.Digests, d) {
			g, ok = one, true
			return errFound
		}
		return nil
	})
	if errors.Is(err, errFound) {
		err = nil
	}
	return g, ok, err
}
