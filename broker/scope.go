package broker

import (
	"fmt"
	"maps"
	"slices"

	"github.com/pawlsec/pawl/broker/args"
)

// Right is what a delegation may do with one tool. Use and Delegate are separate: a
// coordinator may pass on what it may not use itself.
type Right struct {
	Tool     ToolName                   `json:"tool"`
	Use      bool                       `json:"use,omitempty"`      // may take steps with the tool
	Delegate bool                       `json:"delegate,omitempty"` // may pass the tool on, for use or for further delegation
	Args     map[string]args.Constraint `json:"args,omitempty"`     // each named argument must be given and inside; others are free
}

// Allows reports which of the arguments are outside the right: none means all are inside.
// A constrained argument that is not given is outside, since leaving it out may mean "all".
func (r Right) Allows(args args.Args) (outside []string) {
	for _, name := range slices.Sorted(maps.Keys(r.Args)) {
		if v, ok := args.Get(name); !ok || !r.Args[name].Allows(v) {
			outside = append(outside, name)
		}
	}
	return outside
}

// Scope is a delegation's rights, one for each tool, in the order of their names.
// The zero Scope allows nothing.
type Scope []Right

// NewScope puts rights in order; it refuses two for one tool, a right to nothing, and more
// than [MaxRights].
func NewScope(rights []Right) (Scope, error) {
	if len(rights) == 0 || len(rights) > MaxRights {
		return nil, fmt.Errorf("between 1 and %d rights are needed", MaxRights)
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

// Right gives the right for a tool.
func (s Scope) Right(tool ToolName) (Right, bool) {
	for _, r := range s {
		if r.Tool == tool {
			return r, true
		}
	}
	return Right{}, false
}

func (s Scope) Tools() []ToolName {
	names := make([]ToolName, len(s))
	for i, r := range s {
		names[i] = r.Tool
	}
	return names
}

// Wider names what child asks for beyond what s may pass on: "tool:deploy",
// "tool:deploy:argument:env". None means that every call child can ever allow, by itself or by
// further delegation, is inside what s may pass on. What cannot be decided is wider.
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
