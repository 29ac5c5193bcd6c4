package policy

import (
	"maps"

	"github.com/cedar-policy/cedar-go"
	scope "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// reads lists the context members that policies read, and the names that they read below each member.
type reads map[string]names

// names is a set; nil means every name.
type names map[string]bool

func (n names) has(name string) bool { return n == nil || n[name] }

// add widens r by o.
func (r reads) add(o reads) {
	for member, n := range o {
		have, known := r[member]
		switch {
		case !known:
			r[member] = maps.Clone(n)
		case n == nil:
			r[member] = nil
		case have != nil:
			maps.Copy(have, n)
		}
	}
}

// readsOf finds context.member.name, context.used.contains("name"), context.member and a bare context. It counts each
// occurrence of the context or a member, and each occurrence that is part of a longer expression. If the first count
// is higher, the policy reads the context, which is every, or the member as a whole.
func readsOf(p *scope.Policy, every reads) reads {
	found := reads{}
	nested := map[string]int{} // occurrences of "" (the context) or a member in a longer expression
	total := map[string]int{}  // all occurrences
	visit := func(n scope.StrOpNode, longer bool) {
		switch member, depth := contextMember(n.Arg); depth {
		case 0:
			nested[""]++
			if _, known := found[string(n.Value)]; !known {
				found[string(n.Value)] = names{}
			}
			if longer {
				total[string(n.Value)]++
			}
		case 1:
			nested[member]++
			if found[member] == nil {
				found[member] = names{}
			}
			found[member][string(n.Value)] = true
		}
	}
	for _, c := range p.Conditions {
		scope.Inspect(scope.NewNode(c.Body), func(n scope.IsNode) bool {
			switch n := n.(type) {
			case scope.NodeTypeVariable:
				if n.Name == "context" {
					total[""]++
				}
			case scope.NodeTypeAccess:
				visit(n.StrOpNode, true)
			case scope.NodeTypeHas:
				visit(n.StrOpNode, false)
			case scope.NodeTypeContains:
				if tool, ok := usedTool(n); ok {
					nested["used"]++
					if found["used"] == nil {
						found["used"] = names{}
					}
					found["used"][tool] = true
				}
			}
			return true
		})
	}
	if total[""] > nested[""] {
		all := maps.Clone(every)
		if _, named := found["caller"]; !named {
			delete(all, "caller") // needs a window of its own
		}
		return all
	}
	for member := range found {
		if total[member] > nested[member] {
			found[member] = nil
		}
	}
	return found
}

// usedTool returns the tool of context.used.contains("tool").
func usedTool(n scope.NodeTypeContains) (tool string, ok bool) {
	v, literal := n.Right.(scope.NodeValue)
	if member, depth := contextMember(n.Left); !literal || depth != 1 || member != "used" {
		return "", false
	}
	name, ok := v.Value.(cedar.String)
	return string(name), ok
}

// contextMember returns depth 0 for the context itself, the name and depth 1 for a member of it, and -1 otherwise. It
// inspects at most two steps, so that a long chain of members costs little.
func contextMember(n scope.IsNode) (member string, depth int) {
	isContext := func(n scope.IsNode) bool {
		v, ok := n.(scope.NodeTypeVariable)
		return ok && v.Name == "context"
	}
	if isContext(n) {
		return "", 0
	}
	if a, ok := n.(scope.NodeTypeAccess); ok && isContext(a.Arg) {
		return string(a.Value), 1
	}
	return "", -1
}
