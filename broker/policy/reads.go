package policy

import (
	"maps"

	"github.com/cedar-policy/cedar-go"
	scope "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// reads says what policies look at in the context: its members, and of each the members' names.
type reads map[string]names

// names is a set; nil is every name.
type names map[string]bool

func (n names) has(name string) bool { return n == nil || n[name] }

// every is the whole context.
func every() reads {
	r := reads{}
	for _, member := range []string{"args", "chain", "history", "used", "proof", "now", "receiver", "violation"} {
		r[member] = nil
	}
	return r
}

// add widens r by what o looks at.
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

// readsOf looks for context.member.name, context.used.contains("name"), context.member and a bare
// context. Each expression is met from the outside in, so what is part of a longer one was seen with
// it and counts once.
func readsOf(p *scope.Policy) reads {
	found := reads{}
	followed := map[string]int{} // how often "" (the context) or a member is part of something longer
	bare := map[string]int{}     // how often it is met at all
	meet := func(n scope.StrOpNode, longer bool) {
		switch member, depth := contextMember(n.Arg); depth {
		case 0:
			followed[""]++
			if _, known := found[string(n.Value)]; !known {
				found[string(n.Value)] = names{}
			}
			if longer {
				bare[string(n.Value)]++
			}
		case 1:
			followed[member]++
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
					bare[""]++
				}
			case scope.NodeTypeAccess:
				meet(n.StrOpNode, true)
			case scope.NodeTypeHas:
				meet(n.StrOpNode, false)
			case scope.NodeTypeContains:
				if tool, ok := usedTool(n); ok {
					followed["used"]++
					if found["used"] == nil {
						found["used"] = names{}
					}
					found["used"][tool] = true
				}
			}
			return true
		})
	}
	if bare[""] > followed[""] {
		return every()
	}
	for member := range found {
		if bare[member] > followed[member] {
			found[member] = nil
		}
	}
	return found
}

// usedTool gives the tool of context.used.contains("tool").
func usedTool(n scope.NodeTypeContains) (tool string, ok bool) {
	v, literal := n.Right.(scope.NodeValue)
	if member, depth := contextMember(n.Left); !literal || depth != 1 || member != "used" {
		return "", false
	}
	name, ok := v.Value.(cedar.String)
	return string(name), ok
}

// contextMember tells the context itself (0), a member of it (its name, 1) and all else (-1)
// apart. It looks two steps deep and no further, so that a long chain of members costs little.
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
