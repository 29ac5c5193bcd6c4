package records

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// The index finds chains without a scan of all chains. It is written in the transactions of the records that it lists.
// A chain is in it from its opening until it has ended and has no live grant. By its terms it is listed longer: for
// keepEnded after its end, and for as long as one of its static secrets works.
//
// The index may list too much, never too little. So each chain that it finds is read and tested like any other. It is
// not used before it was compared with the chains: an earlier build wrote none, and may have run in between. Nor does a
// transaction use it that began before: see hasIndex.

// keepEnded is how long the terms of a chain are listed after its end. A revocation of that time finds the delegations
// that were open at its fence.
const keepEnded = time.Hour

// keysOfIndex has the keys of one chain in the index.
type keysOfIndex struct {
	end   time.Time // of the root, and so of the chain
	open  []string  // until it has ended and has no live grant
	terms []string  // longer: see above
	ended string    // lists the chain by its end, as long as the index has it; empty: not listed
}

// indexOf returns the keys of a chain.
func (t *Tx) indexOf(c broker.Chain) (k keysOfIndex, err error) {
	root, _, err := t.Delegation(c.Root)
	if err != nil {
		return k, err
	}
	k = keysOfIndex{end: root.Expires, ended: keyEnded(root.Expires, c.ID),
		open: []string{keyOpen(c.ID), keyOpener(c.Opener.String(), root.Expires, c.ID)}}
	add := func(term string) { k.terms = append(k.terms, keyTerm(term, root.Expires, c.ID)) }
	add(indexTerm("task", "", c.Task))
	for name, value := range c.Labels {
		add(indexTerm("label", name, value))
	}
	if e := c.Envelope; e != nil { // selectors select by its words too
		add(indexTerm("task", "", e.Task))
		for name, value := range e.Labels {
			add(indexTerm("label", name, value))
		}
	}
	for _, right := range root.Scope { // a child has no tool that its root does not have
		add(indexTerm("tool", "", string(right.Tool)))
	}
	return k, t.EachMember(c.ID, func(id broker.DelegationID) error {
		d, _, err := t.Delegation(id)
		add(indexTerm("spiffe", "", d.Holder.String()))
		return err
	})
}

// indexTerm is a term's text in a key. It contains no space, so no text is the beginning of another one's key. The text
// of a task or of a label can have any characters, and is digested. A SPIFFE ID stays as it is, for prefixes.
func indexTerm(key, name, value string) string {
	if key == "task" || key == "label" {
		sum := sha256.Sum256([]byte(value))
		value = hex.EncodeToString(sum[:16])
	}
	return key + "." + name + ":" + value
}

// index lists a chain that is open or has live grants, unless it is listed.
func (t *Tx) index(c broker.Chain) error {
	if known, err := t.has(keyOpen(c.ID)); err != nil || known {
		return err
	}
	k, err := t.indexOf(c)
	if err != nil {
		return err
	}
	return t.markAll(append(append(k.open, k.terms...), k.ended))
}

// indexID is index for the id of a chain. It costs one read for a chain that is listed.
func (t *Tx) indexID(id broker.ChainID) error {
	if known, err := t.has(keyOpen(id)); err != nil || known {
		return err
	}
	c, ok, err := t.Chain(id)
	if err != nil || !ok {
		return err
	}
	return t.index(c)
}

// indexHolder lists the chain of a new delegation by its holder.
func (t *Tx) indexHolder(d broker.Delegation) error {
	c, ok, err := t.Chain(d.Chain)
	if err != nil || !ok {
		return err
	}
	root, _, err := t.Delegation(c.Root)
	if err != nil {
		return err
	}
	if err := t.mark(keyTerm(indexTerm("spiffe", "", d.Holder.String()), root.Expires, c.ID)); err != nil {
		return err
	}
	return t.index(c)
}

func (t *Tx) markAll(keys []string) error {
	return each(keys, nil, func(key string) error {
		if known, err := t.has(key); err != nil || known {
			return err
		}
		return t.mark(key)
	})
}

// OpenChains counts the chains that a caller opened and that have not ended, at most most. A revoked chain counts until
// its end. It reads one key for each chain that it counts.
func (t *Tx) OpenChains(opener string, now time.Time, most int) (n int, err error) {
	if most <= 0 {
		return 0, nil
	}
	prefix := keyOpener(opener, time.Time{}, "")
	prefix = prefix[:len(prefix)-len(broker.IDTime(now))-1]
	err = t.tx.Scan(prefix, prefix+broker.IDTime(now), func(string, []byte) bool { n++; return n < most })
	return n, err
}

// OverOpen refuses another chain of an opener that has as many open ones as it may. It says when the next one ends.
func (t *Tx) OverOpen(op string, opener string, now time.Time, most int) error {
	n, err := t.OpenChains(opener, now, most)
	if err != nil || most <= 0 || n < most {
		return err
	}
	prefix := strings.TrimSuffix(keyOpener(opener, now, ""), "/")
	var first broker.ChainID
	if err := t.tx.Scan(prefix[:len(prefix)-len(noTime)], prefix, func(key string, _ []byte) bool {
		_, first = endAndChain(key)
		return false
	}); err != nil {
		return err
	}
	c, _, err := t.Chain(first)
	if err != nil {
		return err
	}
	root, _, err := t.Delegation(c.Root)
	if err != nil {
		return err
	}
	return broker.Errorf(broker.Denied, op, "you have %d open chains, and may have no more", most).
		With(broker.CodeManyChains).After(max(root.Expires.Sub(now), 0)+time.Second). // the index has times of less precision
		Lacks("use a chain that you have, or wait until one ends", "open_chains")
}

// Everywhere is the place of all chains: see [Tx.EachLive].
var Everywhere = []broker.ChainID{""}

// Places returns the chains in which a revocation may cover something: delegations that were open at a time or later,
// and grants that are live or static. The result is Everywhere when the index cannot tell. With a policy it includes the
// chains in which the selector may cover a later step.
func (t *Tx) Places(rv broker.Revocation, open time.Time, policy broker.Policy) ([]broker.ChainID, error) {
	if rv.Chain != "" {
		return []broker.ChainID{rv.Chain}, nil
	}
	p := places{t: t, open: broker.IDTime(open), seen: map[broker.ChainID]bool{}}
	switch {
	case rv.Node != "":
		d, _, err := t.Delegation(rv.Node)
		p.put(d.Chain)
		return p.list, err
	case rv.Grant != "":
		g, _, err := t.Grant(rv.Grant)
		p.put(g.Chain)
		return p.list, err
	}
	if indexed, err := t.hasIndex(); err != nil || !indexed {
		return Everywhere, err
	}
	s, err := selector.ParseRecorded(rv.Selector)
	if err != nil {
		return nil, err
	}
	terms, ok := s.Terms()
	if !ok {
		return Everywhere, nil
	}
	err = each(terms, nil, func(term selector.Term) error { return p.add(term, policy) })
	return p.list, err
}

// places collects chains, each once.
type places struct {
	t    *Tx
	open string // chains that ended before are left out, unless they have live or static grants
	seen map[broker.ChainID]bool
	list []broker.ChainID
}

func (p *places) put(id broker.ChainID) {
	if id != "" && !p.seen[id] {
		p.seen[id] = true
		p.list = append(p.list, id)
	}
}

func (p *places) add(term selector.Term, policy broker.Policy) error {
	switch term.Key() {
	case "chain":
		p.put(broker.ChainID(term.Value()))
		return nil
	case "subtree":
		d, _, err := p.t.Delegation(broker.DelegationID(term.Value()))
		p.put(d.Chain)
		return err
	case "grant":
		g, _, err := p.t.Grant(broker.GrantID(term.Value()))
		p.put(g.Chain)
		return err
	case "spiffe", "task", "label", "tool":
		if prefix, below := term.Below(); below && term.Key() == "spiffe" {
			return p.listed(keyTerms(indexTerm("spiffe", "", prefix)))
		}
		return p.listed(keyTerms(indexTerm(term.Key(), term.Name(), term.Value()) + " "))
	}
	// The other terms select grants: those that there are, and later ones of tools.
	for _, prefix := range []string{prefixLive, prefixStatic, prefixLeftover} {
		if err := p.withGrants(prefix); err != nil {
			return err
		}
	}
	if policy == nil {
		return nil
	}
	return p.later(term, policy)
}

// listed adds the chains of the index below a prefix.
func (p *places) listed(prefix string) error {
	var ended []broker.ChainID
	err := p.t.tx.Scan(prefix, "", func(key string, _ []byte) bool {
		end, id := endAndChain(key)
		if end >= p.open {
			p.put(id)
		} else if !p.seen[id] {
			ended = append(ended, id)
		}
		return true
	})
	return each(ended, err, func(id broker.ChainID) error {
		busy, err := p.t.hasGrants(id)
		if err == nil && busy {
			p.put(id)
		}
		return err
	})
}

// withGrants adds the chains of a family of grants. It reads one key for each chain.
func (p *places) withGrants(prefix string) error {
	for after := ""; ; {
		key, err := p.t.first(prefix, after)
		if err != nil || key == "" {
			return err
		}
		id := broker.ChainID(key[len(prefix) : len(prefix)+broker.IDLength])
		p.put(id)
		after = inChain(prefix, id) + "~" // after each id of the chain
	}
}

// later adds the chains with tools of which the term may select a later grant. It reads one key for each tool.
func (p *places) later(term selector.Term, policy broker.Policy) error {
	all := keyTerms(indexTerm("tool", "", ""))
	for after := ""; ; {
		key, err := p.t.first(all, after)
		if err != nil || key == "" {
			return err
		}
		name, _, _ := strings.Cut(key[len(all):], " ")
		tool, known := policy.Tool(broker.ToolName(name))
		if known && term.MayMatchLater(tool, policy.Digest()) {
			if err := p.listed(all + name + " "); err != nil {
				return err
			}
		}
		after = all + name + " ~"
	}
}

// first returns the first key with a prefix after another key; empty: there is none.
func (t *Tx) first(prefix, after string) (first string, err error) {
	err = t.tx.Scan(prefix, after, func(key string, _ []byte) bool { first = key; return false })
	return first, err
}

// hasGrants reports whether a chain has grants that are live or static, or leases that Vault has still to remove.
func (t *Tx) hasGrants(id broker.ChainID) (bool, error) {
	for _, prefix := range []string{prefixLive, prefixStatic, prefixLeftover} {
		if key, err := t.first(inChain(prefix, id), ""); err != nil || key != "" {
			return key != "", err
		}
	}
	return false, nil
}

// retireAtOnce is the most chains that one transaction takes out of the index.
const retireAtOnce = 500

// Retired lists chains with keys in the index that are not needed any more, at most so many as one transaction takes.
func (t *Tx) Retired(now time.Time) (list []broker.ChainID, err error) {
	var ended []broker.ChainID
	at, kept, long := broker.IDTime(now), broker.IDTime(now.Add(-keepEnded)), 0
	err = t.tx.Scan(prefixEnded, "", func(key string, _ []byte) bool {
		end, id := endAndChain(key)
		if end >= at {
			return false
		}
		if ended = append(ended, id); end <= kept {
			long = len(ended)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	for i, id := range ended {
		if i >= long { // its terms are still listed: most are done with
			if listed, err := t.has(keyOpen(id)); err != nil {
				return nil, err
			} else if !listed {
				continue
			}
		}
		c, _, err := t.Chain(id)
		if err != nil {
			return nil, err
		}
		drop, err := t.obsolete(c, now)
		if err != nil {
			return nil, err
		}
		if len(drop) > 0 {
			list = append(list, id)
		}
		if len(list) == retireAtOnce {
			break
		}
	}
	return list, nil
}

// Retire takes the obsolete keys of chains out of the index.
func (t *Tx) Retire(list []broker.ChainID, now time.Time) error {
	return each(list, nil, func(id broker.ChainID) error {
		c, _, err := t.Chain(id)
		if err != nil {
			return err
		}
		drop, err := t.obsolete(c, now)
		return each(drop, err, t.drop)
	})
}

// obsolete returns the keys of a chain that the index has and does not need.
func (t *Tx) obsolete(c broker.Chain, now time.Time) (keys []string, err error) {
	root, ok, err := t.Delegation(c.Root)
	if err != nil || !ok || now.Before(root.Expires) {
		return nil, err
	}
	if live, err := t.first(inChain(prefixLive, c.ID), ""); err != nil || live != "" {
		return nil, err
	}
	listed, err := t.has(keyOpen(c.ID))
	if err != nil {
		return nil, err
	}
	kept := now.Sub(root.Expires) > keepEnded
	if !listed && !kept {
		return nil, nil
	}
	k, err := t.indexOf(c)
	if err != nil {
		return nil, err
	}
	if keys = k.open; !kept {
		return keys, nil
	}
	keys = append(keys, k.ended)
	static, err := t.first(inChain(prefixStatic, c.ID), "")
	if err != nil || static != "" {
		return keys, err
	}
	return append(keys, k.terms...), nil
}

// needed returns the keys that the index must have for a chain.
func (t *Tx) needed(c broker.Chain, now time.Time) (keys []string, err error) {
	k, err := t.indexOf(c)
	if err != nil {
		return nil, err
	}
	live, err := t.first(inChain(prefixLive, c.ID), "")
	switch {
	case err != nil:
		return nil, err
	case live != "" || now.Before(k.end):
		return append(append(k.open, k.terms...), k.ended), nil
	case now.Sub(k.end) <= keepEnded:
		return append(k.terms, k.ended), nil
	}
	static, err := t.first(inChain(prefixStatic, c.ID), "")
	if static == "" {
		return nil, err
	}
	return k.terms, err
}

// Unindexed returns those chains of a list of which the index lacks a key.
func (t *Tx) Unindexed(list []broker.ChainID, now time.Time) (lacking []broker.ChainID, err error) {
	err = each(list, nil, func(id broker.ChainID) error {
		c, ok, err := t.Chain(id)
		if err != nil || !ok {
			return err
		}
		keys, err := t.needed(c, now)
		complete := true
		err = each(keys, err, func(key string) error {
			known, err := t.has(key)
			complete = complete && known
			return err
		})
		if !complete {
			lacking = append(lacking, id)
		}
		return err
	})
	return lacking, err
}

// Index writes the keys that the index lacks for chains.
func (t *Tx) Index(list []broker.ChainID, now time.Time) error {
	return each(list, nil, func(id broker.ChainID) error {
		c, ok, err := t.Chain(id)
		if err != nil || !ok {
			return err
		}
		keys, err := t.needed(c, now)
		if err != nil {
			return err
		}
		return t.markAll(keys)
	})
}

// ToIndex lists the chains that the index may have to list: those that may be open or ended a short time ago, and those
// with live or static grants.
func (t *Tx) ToIndex(now time.Time) ([]broker.ChainID, error) {
	p := places{t: t, seen: map[broker.ChainID]bool{}}
	since := prefixChain + "ch" + broker.IDTime(now.Add(-broker.MaxChainTTL-keepEnded))
	list, err := ids[broker.ChainID](t, prefixChain, since)
	err = each(list, err, func(id broker.ChainID) error { p.put(id); return nil })
	return p.list, cmp.Or(err, p.withGrants(prefixLive), p.withGrants(prefixStatic))
}

// SetIndexed says that the index lists all that it must from a revision on.
func (c *Cache) SetIndexed(from broker.Revision) { c.indexed.Store(uint64(from) + 1) }

// hasIndex reports whether the transaction sees a complete index. One that began before the index was complete does not.
func (t *Tx) hasIndex() (bool, error) {
	from := t.cache.indexed.Load()
	if from == 0 {
		return false, nil
	}
	head, err := t.Head()
	return uint64(head)+1 >= from, err
}
