package brokertest

import (
	"hash/fnv"
	"strings"
)

// record is a node of a treap: a search tree by key that is also a heap by a hash of the key. The heap keeps it roughly
// balanced. Nodes are never changed, so every root is a snapshot.
type record struct {
	key         string
	value       []byte
	rank        uint64
	left, right *record
}

func (n *record) get(key string) []byte {
	for n != nil {
		switch {
		case key < n.key:
			n = n.left
		case key > n.key:
			n = n.right
		default:
			return n.value
		}
	}
	return nil
}

// with returns the tree in which key has the value.
func (n *record) with(key string, value []byte) *record {
	less, more := n.split(key)
	return join(join(less, &record{key: key, value: value, rank: rank(key)}), more)
}

// without returns the tree without key.
func (n *record) without(key string) *record {
	less, more := n.split(key)
	return join(less, more)
}

func rank(key string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(key)) // never fails
	return h.Sum64()
}

// split returns the trees of the keys before and after key.
func (n *record) split(key string) (less, more *record) {
	switch {
	case n == nil:
		return nil, nil
	case key < n.key:
		less, between := n.left.split(key)
		return less, n.under(between, n.right)
	case key > n.key:
		between, more := n.right.split(key)
		return n.under(n.left, between), more
	}
	return n.left, n.right
}

// join returns a tree of both. All keys of less must be before those of more.
func join(less, more *record) *record {
	switch {
	case less == nil:
		return more
	case more == nil:
		return less
	case less.rank > more.rank:
		return less.under(less.left, join(less.right, more))
	}
	return more.under(join(less, more.left), more.right)
}

// under returns a copy of n with other children.
func (n *record) under(left, right *record) *record {
	return &record{n.key, n.value, n.rank, left, right}
}

// scan calls f in order with the keys that begin with prefix and are after after. It returns false if f stopped it.
func (n *record) scan(prefix, after string, f func(string, []byte) bool) bool {
	if n == nil {
		return true
	}
	wanted := strings.HasPrefix(n.key, prefix)
	if n.key > after && n.key >= prefix && !n.left.scan(prefix, after, f) {
		return false
	}
	if wanted && n.key > after && !f(n.key, n.value) {
		return false
	}
	if wanted || n.key < prefix {
		return n.right.scan(prefix, after, f)
	}
	return true
}

// scanBack calls f in opposite order with the keys that begin with prefix and are before before; empty: all of them. It
// returns false if f stopped it.
func (n *record) scanBack(prefix, before string, f func(string, []byte) bool) bool {
	if n == nil {
		return true
	}
	wanted, early := strings.HasPrefix(n.key, prefix), before == "" || n.key < before
	if early && (wanted || n.key < prefix) && !n.right.scanBack(prefix, before, f) {
		return false
	}
	if wanted && early && !f(n.key, n.value) {
		return false
	}
	if n.key >= prefix {
		return n.left.scanBack(prefix, before, f)
	}
	return true
}
