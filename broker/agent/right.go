package agent

import (
	"fmt"
	"maps"
	"slices"

	"github.com/pawlsec/pawl/broker/api"
)

// Right allows a delegation to use one tool, or to pass it on.
type Right struct {
	Tool     string
	Use      bool                  // take steps with the tool
	Delegate bool                  // pass the tool on
	Args     map[string]Constraint // each named argument is required and must be inside; others are free
}

// wireRights encodes rights for a request. The error is for the first invalid constraint.
func wireRights(rights []Right) ([]api.Right, error) {
	out := make([]api.Right, len(rights))
	for i, r := range rights {
		out[i] = api.Right{Tool: r.Tool, Use: r.Use, Delegate: r.Delegate}
		for _, name := range slices.Sorted(maps.Keys(r.Args)) {
			c := r.Args[name]
			if err := c.check(); err != nil {
				detail := fmt.Sprintf("argument %q of tool %q: %v", name, r.Tool, err)
				return nil, api.NewProblem(ErrMalformed, "", detail)
			}
			if out[i].Args == nil {
				out[i].Args = map[string]api.Constraint{}
			}
			out[i].Args[name] = api.Constraint(c.wire)
		}
	}
	return out, nil
}

// rightsOf decodes rights of an answer. It keeps constraints of kinds that this version does not know.
func rightsOf(wire []api.Right) []Right {
	out := make([]Right, len(wire))
	for i, r := range wire {
		out[i] = Right{Tool: r.Tool, Use: r.Use, Delegate: r.Delegate}
		for name, c := range r.Args {
			if out[i].Args == nil {
				out[i].Args = map[string]Constraint{}
			}
			out[i].Args[name] = Constraint{wire: string(c)}
		}
	}
	return out
}
