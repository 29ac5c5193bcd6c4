package records

import (
	"fmt"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// Lineage is a delegation and its ancestors, root first, with their chain. The zero Lineage has no nodes. It is
// that of a chain that is not opened yet.
type Lineage struct {
	Chain broker.Chain
	Nodes []broker.Delegation
}

// Leaf is the delegation itself.
func (l Lineage) Leaf() broker.Delegation { return l.Nodes[len(l.Nodes)-1] }

// Root is the root of its chain.
func (l Lineage) Root() broker.Delegation { return l.Nodes[0] }

// Depth counts the delegations above the leaf.
func (l Lineage) Depth() int { return max(len(l.Nodes)-1, 0) }

// Holds reports whether the caller holds the delegation or one above it.
func (l Lineage) Holds(c broker.Caller) bool {
	return slices.ContainsFunc(l.Nodes, func(d broker.Delegation) bool { return d.Holder == c.ID })
}

// Subject returns the subject of a grant under the leaf, for selectors.
func (l Lineage) Subject(g broker.Grant) selector.Subject {
	return selector.OfGrant(l.Chain, l.Nodes, g)
}

// place puts a subject under the leaf. Without a grant it is the delegation itself.
func (l Lineage) place(s selector.Subject) selector.Subject {
	s.Chain, s.Path = l.Chain, l.Nodes
	return s
}

// expired returns the end of the first expired node.
func (l Lineage) expired(now time.Time) (end time.Time, ok bool) {
	for _, d := range l.Nodes {
		if !now.Before(d.Expires) {
			return d.Expires, true
		}
	}
	return time.Time{}, false
}

// Expired reports whether a node had expired at a time.
func (l Lineage) Expired(at time.Time) bool {
	_, expired := l.expired(at)
	return expired
}

// Lineage reads the lineage of a delegation.
//
// Errors: NotFound.
func (t *Tx) Lineage(op string, id broker.DelegationID) (Lineage, error) {
	if l, ok := t.lineages[id]; ok {
		return l, nil
	}
	var l Lineage
	for next := id; next != ""; {
		d, ok, err := t.Delegation(next)
		if err != nil {
			return Lineage{}, err
		}
		if !ok {
			return Lineage{}, UnknownDelegation(op)
		}
		if len(l.Nodes) > broker.MaxDepth {
			return Lineage{}, fmt.Errorf("delegation %s is deeper than %d", id, broker.MaxDepth)
		}
		l.Nodes = append(l.Nodes, d)
		next = d.Parent
	}
	slices.Reverse(l.Nodes)
	c, ok, err := t.Chain(l.Leaf().Chain)
	if err == nil && !ok {
		err = fmt.Errorf("delegation %s has no chain", id)
	}
	if err != nil {
		return Lineage{}, err
	}
	l.Chain = c
	if t.lineages == nil {
		t.lineages = map[broker.DelegationID]Lineage{}
	}
	t.lineages[id] = l
	return l, nil
}
