package broker

import (
	"fmt"
	"maps"
	"slices"

	"github.com/pawlsec/pawl/broker/args"
)

// Right is the permission of a delegation for one tool. Use and Delegate are separate: a coordinator may pass a tool on
// that it may not use itself.
type Right struct {
	Tool     ToolName `json:"tool"`
	Use      bool     `json:"use,omitempty"`      // take steps with the tool
	Delegate bool     `json:"delegate,omitempty"` // pass the tool on, for use or for further delegation

	// Args constrains arguments. Each named argument must be given and be inside its constraint; the others are free.
	Args map[string]args.Constraint `json:"args,omitempty"`
}

// Allows returns the names of the arguments outside the right. None means that the right allows the arguments. A
// constrained argument that is not given is outside, because a callee may read its absence as "all".
func (r Right) Allows(args args.Args) (outside []string) {
	for _, name := range slices.Sorted(maps.Keys(r.Args)) {
		if v, ok := args.Get(name); !ok || !r.Args[name].Allows(v) {
			outside = append(outside, name)
		}
	}
	return outside
}

// Scope is the rights of a delegation, one for each tool, in the order of the tools' names. The zero Scope allows
// nothing.
type Scope []Right

// NewScope sorts rights. It refuses two rights for one tool, a right that permits nothing, an invalid name, none at
// all, and more than [MaxRights].
func NewScope(rights []Right) (Scope, error) {
	if len(rights) == 0 || len(rights) > MaxRights {
		return nil, fmt.Errorf("a scope has 1 to %d rights", MaxRights)
	}
	s := slices.SortedFunc(slices.Values(rights), func(a, b Right) int {
		if a.Tool < b.Tool {
			return -1
		}
		return 1
	})
	for i, r := range s {
		if _, err := ParseToolName(string(r.Tool)); err != nil {
			return nil, err
		}
		if !r.Use && !r.Delegate {
			return nil, fmt.Errorf("the right for tool %q is neither to use nor to delegate", r.Tool)
		}
		if i > 0 && s[i-1].Tool == r.Tool {
			return nil, fmt.Errorf("two rights for tool %q", r.Tool)
		}
		for name := range r.Args {
			if err := args.CheckName(name); err != nil {
				return nil, err
			}
		}
	}
	return s, nil
}

// Right returns the right for a tool.
func (s Scope) Right(tool ToolName) (Right, bool) {
	for _, r := range s {
		if r.Tool == tool {
			return r, true
		}
	}
	return Right{}, false
}

// Tools returns the names of the tools, in order.
func (s Scope) Tools() []ToolName {
	names := make([]ToolName, len(s))
	for i, r := range s {
		names[i] = r.Tool
	}
	return names
}

// Gains names the tools that the holder of s could use by child and cannot use by s: "tool:deploy:use". Whoever may only
// pass a tool on must not come to use it, by a delegation to itself or by one that a holder below passes back.
func (s Scope) Gains(child Scope) (gains []string) {
	for _, c := range child {
		if r, _ := s.Right(c.Tool); c.Use && !r.Use {
			gains = append(gains, "tool:"+string(c.Tool)+":use")
		}
	}
	return gains
}

// Wider names the parts of child that s may not pass on: "tool:deploy", "tool:deploy:argument:env". None means that s
// may pass on every call that child can ever allow, by itself or by further delegation. A part that cannot be decided
// counts as wider.
func (s Scope) Wider(child Scope) (wider []string) {
	for _, c := range child {
		r, ok := s.Right(c.Tool)
		if !ok || !r.Delegate {
			wider = append(wider, "tool:"+string(c.Tool))
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(r.Args)) {
			if arg, ok := c.Args[name]; !ok || !r.Args[name].Covers(arg) {
				wider = append(wider, "tool:"+string(c.Tool)+":argument:"+name)
			}
		}
	}
	return wider
}
