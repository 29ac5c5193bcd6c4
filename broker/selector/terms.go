package selector

import (
	"strings"

	"github.com/pawlsec/pawl/broker"
)

// Term is one condition of a selector, for a ledger that finds chains by it.
type Term struct{ term term }

// Key is the key of the term, as it is written: chain, spiffe, label, and so on.
func (t Term) Key() string { return t.term.key }

// Name is the name of a label or of an argument. Other terms have none.
func (t Term) Name() string { return t.term.name }

// Value is the value of the term in canonical spelling.
func (t Term) Value() string { return t.term.value }

// Below returns the beginning that the values of a term have in common, when it ends in "/*".
func (t Term) Below() (prefix string, ok bool) {
	return strings.CutSuffix(t.term.value, "*")
}

// MayMatchLater reports whether the term may select a later grant of a tool, under the policy bundle with this digest.
func (t Term) MayMatchLater(tool broker.Tool, bundle string) bool {
	s := Selector{&node{term: t.term}}
	return s.MayMatchLater(Subject{Tool: tool.Name, Vault: tool.Path, Bundle: bundle}, tool.Arguments)
}

// Terms returns terms of the selector, so that each chain in which it selects something, or may select a later step,
// has one of them. ok is false for a selector that may select something in any chain.
func (s Selector) Terms() (terms []Term, ok bool) {
	if s.root == nil {
		return nil, true
	}
	return s.root.terms()
}

func (n *node) terms() (terms []Term, ok bool) {
	switch n.op {
	case "not":
		return nil, false
	case "or":
		for _, p := range n.parts {
			part, ok := p.terms()
			if !ok {
				return nil, false
			}
			terms = append(terms, part...)
		}
		return terms, true
	case "and": // one part is enough: the one with the fewest chains, as far as the terms tell
		for _, p := range n.parts {
			if part, found := p.terms(); found && (!ok || breadth(part) < breadth(terms)) {
				terms, ok = part, true
			}
		}
		return terms, ok
	}
	return []Term{{n.term}}, n.term.key != "since" && n.term.key != "until"
}

// breadth estimates how many chains have one of the terms. Terms with the same breadth are about as many.
func breadth(terms []Term) (most int) {
	for _, t := range terms {
		_, below := t.Below()
		n := 7 // those of grants alone: all chains with live grants
		switch key := t.Key(); {
		case key == "chain" || key == "subtree" || key == "grant":
			n = 1
		case key == "spiffe" && !below:
			n = 2
		case key == "task":
			n = 3
		case key == "tool":
			n = 4
		case key == "label":
			n = 5
		case key == "spiffe":
			n = 6
		}
		most = max(most, n)
	}
	return most
}
