// Package selector implements the language that selects the delegations and grants of a revocation, and the request
// that carries it.
package selector

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// Subject is the input of a [Selector]: a delegation, or a grant under it. The fields from Grant to Leaked are zero
// for a delegation.
type Subject struct {
	Chain  broker.Chain
	Path   []broker.Delegation // root first; the last has the grant
	Grant  broker.GrantID
	Tool   broker.ToolName
	Args   args.Args
	Vault  broker.VaultPath     // Vault mount and role
	Bundle string               // digest of the policy bundle that decided
	Leaked []broker.ValueDigest // of the values of its secret
	At     time.Time            // when the grant or delegation was created

	// later is not nil for a grant that will be created at At or later. It has the arguments that the grant may have.
	later map[string]broker.Parameter
}

// Selector selects the delegations and grants of a revocation. [Parse] makes one. The zero Selector matches nothing.
//
//	chain:ch…                 of this chain
//	subtree:dl…               this delegation, or anything below it
//	spiffe:spiffe://td/a/b    held by exactly this SPIFFE ID
//	spiffe:spiffe://td/a/*    held by a SPIFFE ID below /a; spiffe://td/* is the whole trust domain
//	task:"rotate the keys"    of a chain opened for exactly this task
//	label.env:prod            of a chain with this label
//	since:2026-01-02T03:04:05Z, until:…   created at or after, created before
//	grant:gr…                 this grant
//	tool:deploy               a grant for this tool
//	arg.table:users           a grant with this argument, as text; of a list, one element
//	vault:database/creds/x    a grant minted at this mount and role
//	vault:database/*          or anywhere below
//	bundle:sha256:…           a grant decided under this policy bundle
//	leaked:sha256:…           a grant that handed out a value with this SHA-256; see [ForLeaked]
//
// Terms join with not, and, or (binding in that order) and parentheses. A value is quoted as in Go if it contains a
// parenthesis, a quote or a character that is not visible ASCII.
//
// The holder is that of the delegation itself, or of the one that the grant is directly under, not of its ancestors.
// The terms from grant to leaked ask for facts that only grants have. For a delegation they are neither true nor
// false, and if the result depends on them, the selector does not match. So neither tool:x nor not tool:x matches a
// delegation, while (tool:x or chain:ch…) matches the delegations of that chain. The same holds for since and until
// if the time is unknown.
type Selector struct{ root *node }

// node is one term, or an operator over other nodes.
type node struct {
	op    string // "and", "or", "not"; empty for a term
	parts []*node
	term  term
}

// term is one condition. Its value is in canonical spelling.
type term struct {
	key, name, value string             // key or key.name, and value
	at               time.Time          // of since and until
	digest           broker.ValueDigest // of leaked
}

// verdict is a value of three-valued logic. In its order, and is min and or is max.
type verdict int8

const (
	no verdict = iota - 1
	open
	yes
)

func yesIf(b bool) verdict {
	if b {
		return yes
	}
	return no
}

// Matches reports whether the selector selects the subject.
func (s Selector) Matches(subject Subject) bool {
	return s.root != nil && s.root.holds(subject) == yes
}

// MayMatchLater reports whether the selector may select a grant that will be created at subject.At or later, for a tool
// with these arguments. The subject's Grant and Args are not known yet, and are ignored.
func (s Selector) MayMatchLater(subject Subject, arguments map[string]broker.Parameter) bool {
	subject.Grant, subject.later = laterGrant, arguments
	if subject.later == nil {
		subject.later = map[string]broker.Parameter{}
	}
	return s.root != nil && s.root.holds(subject) != no
}

// laterGrant is the id of a grant that will be created. No selector can name it.
const laterGrant broker.GrantID = "later"

// Target returns the one chain, delegation or grant that the selector names, so that it can be fenced by itself. The
// other two are empty. For any other selector ok is false.
func (s Selector) Target() (chain broker.ChainID, node broker.DelegationID, grant broker.GrantID, ok bool) {
	if s.root == nil {
		return "", "", "", false
	}
	switch t := s.root.term; t.key {
	case "chain":
		return broker.ChainID(t.value), "", "", true
	case "subtree":
		return "", broker.DelegationID(t.value), "", true
	case "grant":
		return "", "", broker.GrantID(t.value), true
	}
	return "", "", "", false
}

// Holder returns the SPIFFE ID of a selector that selects the delegations of exactly one holder.
func (s Selector) Holder() (id spiffeid.ID, ok bool) {
	if s.root == nil || s.root.op != "" || s.root.term.key != "spiffe" {
		return spiffeid.ID{}, false
	}
	id, err := spiffeid.FromString(s.root.term.value)
	return id, err == nil
}

// LeakedValue returns the digest of a selector that selects the grants that handed out one value.
func (s Selector) LeakedValue() (d broker.ValueDigest, ok bool) {
	if s.root == nil || s.root.op != "" || s.root.term.key != "leaked" {
		return "", false
	}
	return s.root.term.digest, true
}

// String is the selector in canonical spelling, which [Parse] reads back. It is empty for the zero Selector.
func (s Selector) String() string {
	if s.root == nil {
		return ""
	}
	return s.root.String()
}

// MarshalText is [Selector.String].
func (s Selector) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is [Parse], but reads an empty text as the zero Selector.
func (s *Selector) UnmarshalText(text []byte) (err error) {
	*s = Selector{}
	if len(text) > 0 {
		*s, err = Parse(string(text))
	}
	return err
}

func (n *node) holds(s Subject) verdict {
	switch n.op {
	case "not":
		return -n.parts[0].holds(s)
	case "and":
		v := yes
		for _, p := range n.parts {
			v = min(v, p.holds(s))
		}
		return v
	case "or":
		v := no
		for _, p := range n.parts {
			v = max(v, p.holds(s))
		}
		return v
	}
	return n.term.holds(s)
}

func (t term) holds(s Subject) verdict {
	switch t.key {
	case "chain":
		return yesIf(string(s.Chain.ID) == t.value)
	case "subtree":
		return yesIf(slices.ContainsFunc(s.Path, func(d broker.Delegation) bool { return string(d.ID) == t.value }))
	case "spiffe":
		return yesIf(len(s.Path) > 0 && withinPath(t.value, s.Path[len(s.Path)-1].Holder.String()))
	case "task":
		return yesIf(s.Chain.Task == t.value || s.Chain.Envelope != nil && s.Chain.Envelope.Task == t.value)
	case "label":
		claimed, is := s.Chain.Labels[t.name]
		signed, also := s.Chain.SignedLabels()[t.name]
		return yesIf(is && claimed == t.value || also && signed == t.value)
	case "since", "until":
		if s.At.IsZero() {
			return open
		}
		if s.later != nil && s.At.Before(t.at) {
			return open // it may be created before or after
		}
		return yesIf(s.At.Before(t.at) == (t.key == "until"))
	}
	if s.Grant == "" {
		return open
	}
	switch t.key {
	case "grant":
		return yesIf(string(s.Grant) == t.value)
	case "tool":
		return yesIf(string(s.Tool) == t.value)
	case "arg":
		if s.later != nil {
			if _, takes := s.later[t.name]; !takes {
				return no
			}
			return open
		}
		value, ok := s.Args.Get(t.name)
		return yesIf(ok && value.ReadsAs(t.value))
	case "vault":
		return yesIf(withinPath(t.value, s.Vault.String()))
	case "bundle":
		return yesIf(s.Bundle == t.value)
	case "leaked":
		return yesIf(slices.Contains(s.Leaked, t.digest))
	}
	panic("selector: a term was parsed that has no meaning: " + t.key)
}

// withinPath reports whether path is the pattern or, for a pattern that ends in "/*", below it.
func withinPath(pattern, path string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(path, prefix)
	}
	return path == pattern
}

func (n *node) String() string {
	switch n.op {
	case "":
		return n.term.String()
	case "not":
		return "not " + n.parts[0].within("not")
	}
	s := make([]string, len(n.parts))
	for i, p := range n.parts {
		s[i] = p.within(n.op)
	}
	return strings.Join(s, " "+n.op+" ")
}

// within puts parentheses around a node that binds less strongly than the operator above it.
func (n *node) within(op string) string {
	if n.op == "or" && op != "or" || n.op == "and" && op == "not" {
		return "(" + n.String() + ")"
	}
	return n.String()
}

func (t term) String() string {
	key := t.key
	if t.name != "" {
		key += "." + t.name
	}
	if t.value == "" || strings.ContainsFunc(t.value, func(r rune) bool { return !isBare(r) }) {
		return key + ":" + strconv.Quote(t.value)
	}
	return key + ":" + t.value
}

// isBare reports whether a value with this character needs no quotes.
func isBare(r rune) bool {
	return r > ' ' && r < 0x7f && r != '(' && r != ')' && r != '"'
}
