package records

import (
	"cmp"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// A page ends with the id after which the next one begins; empty: it is the last. An id does not change and begins with
// its time, so a list stays in order while others write. An item that was added since the first page is not in the later ones of
// a list that begins with the newest.

// mostPassed is how many chains a page passes over at most. It then ends early, and the next one continues.
const mostPassed = 1000

// Chains lists chains, the newest first: all, or those that are open or have live grants.
func (t *Tx) Chains(all bool, now time.Time, p broker.Page) (list []broker.ChainSummary, next string, err error) {
	prefix := prefixChain
	if indexed, err := t.hasIndex(); err != nil {
		return nil, "", err
	} else if !all && indexed {
		prefix = keyOpen("")
	}
	for passed := 0; ; {
		found, err := t.back(prefix, p, p.Limit)
		if err != nil {
			return nil, "", err
		}
		for _, id := range found {
			s, open, err := t.summary(broker.ChainID(id), now)
			if err != nil {
				return nil, "", err
			}
			p.After = id
			if !all && !open {
				passed++
				continue
			}
			if list = append(list, s); len(list) == p.Limit {
				return list, p.After, nil
			}
		}
		if len(found) < p.Limit {
			return list, "", nil
		}
		if passed > mostPassed {
			return list, p.After, nil
		}
	}
}

// back lists the ids of a family before p.After, the newest first.
func (t *Tx) back(prefix string, p broker.Page, most int) (list []string, err error) {
	before := ""
	if p.After != "" {
		before = prefix + p.After
	}
	err = t.tx.ScanBack(prefix, before, func(key string, _ []byte) bool {
		list = append(list, key[len(prefix):])
		return len(list) < most
	})
	return list, err
}

// summary returns a chain in one line, and whether it is open or has live grants.
func (t *Tx) summary(id broker.ChainID, now time.Time) (s broker.ChainSummary, open bool, err error) {
	c, _, err := t.Chain(id)
	if err != nil {
		return s, false, err
	}
	root, _, err := t.Delegation(c.Root)
	if err != nil {
		return s, false, err
	}
	u, err := t.Usage(c.Root)
	if err != nil {
		return s, false, err
	}
	s = broker.ChainSummary{Chain: c, Live: u.Live, Steps: u.Steps, Fence: root.Fence}
	err = t.EachMember(id, func(broker.DelegationID) error { s.Delegations++; return nil })
	return s, s.Live > 0 || s.Fence == nil && now.Before(root.Expires), err
}

// ChainView reads a part of a chain: its delegations, and after them its grants, each the oldest first.
func (t *Tx) ChainView(id broker.ChainID, p broker.Page) (v broker.ChainView, err error) {
	var ok bool
	if v.Chain, ok, err = t.Chain(id); err != nil {
		return v, err
	}
	if !ok {
		return v, UnknownChain("chain", id)
	}
	nodes, err := page[broker.DelegationID](t, inChain(prefixMember, id), p.After, p.Limit+1)
	if err != nil {
		return v, err
	}
	room := p.Limit
	if len(nodes) > room {
		nodes, v.Next = nodes[:room], string(nodes[room-1])
	}
	if err := each(nodes, nil, func(id broker.DelegationID) error {
		d, _, err := t.Delegation(id)
		v.Delegations = append(v.Delegations, d)
		return err
	}); err != nil || v.Next != "" {
		return v, err
	}
	RootFirst(v.Delegations)
	room -= len(nodes)
	// A grant that ends between two pages has the same place in both families.
	var grants []broker.GrantID
	for _, prefix := range []string{prefixLive, prefixPast} {
		part, err := page[broker.GrantID](t, inChain(prefix, id), p.After, room+1)
		if err != nil {
			return v, err
		}
		grants = append(grants, part...)
	}
	slices.Sort(grants)
	if len(grants) > room {
		last := p.After
		if grants = grants[:room]; room > 0 {
			last = string(grants[room-1])
		} else if len(nodes) > 0 {
			last = string(nodes[len(nodes)-1])
		}
		v.Next = last
	}
	err = each(grants, nil, func(id broker.GrantID) error {
		g, _, err := t.Grant(id)
		v.Grants = append(v.Grants, g)
		return err
	})
	return v, err
}

// page lists at most most ids below a prefix, the oldest first, after an id of any kind: dl… is before gr….
func page[T ~string](t *Tx, prefix, after string, most int) (list []T, err error) {
	if after != "" {
		after = prefix + after
	}
	err = t.tx.Scan(prefix, after, func(key string, _ []byte) bool {
		list = append(list, T(key[len(prefix):]))
		return len(list) < most
	})
	return list, err
}

// Revocations lists revocations and freezes, the newest first.
func (t *Tx) Revocations(p broker.Page) (list []broker.Revocation, next string, err error) {
	found, err := t.back(prefixRevocation, p, p.Limit+1)
	if len(found) > p.Limit {
		found, next = found[:p.Limit], found[p.Limit-1]
	}
	err = each(found, err, func(id string) error {
		rv, _, err := t.Revocation(broker.RevocationID(id))
		rv.Grants = max(rv.Grants, 0)
		list = append(list, rv)
		return err
	})
	return list, next, err
}

// Canaries lists canaries, the newest first. Their keys have no order, so that each page reads all of them.
func (t *Tx) Canaries(p broker.Page) (list []broker.Canary, next string, err error) {
	err = t.EachCanary(func(_ broker.ValueDigest, c broker.Canary) {
		if p.After == "" || string(c.ID) < p.After {
			list = append(list, c)
		}
	})
	slices.SortFunc(list, func(a, b broker.Canary) int { return cmp.Compare(b.ID, a.ID) })
	if len(list) > p.Limit {
		list, next = list[:p.Limit], string(list[p.Limit-1].ID)
	}
	return list, next, err
}
