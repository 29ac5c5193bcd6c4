package policy

import (
	"github.com/cedar-policy/cedar-go"
	"github.com/pawlsec/pawl/broker"
)

// bySubject holds rules by the entity that their scope asks the principal to be or to be in.
// The zero entity holds those for any principal.
type bySubject map[cedar.EntityUID][]*rule

// index holds rules by action, then by what their scope asks of the resource, then of the
// principal. A rule stands in one place for each of its actions, so the size is linear.
type index map[broker.Action]map[cedar.EntityUID]bySubject

func newIndex(rules []*rule) index {
	idx := index{}
	for _, r := range rules {
		for _, a := range r.actions() {
			if idx[a] == nil {
				idx[a] = map[cedar.EntityUID]bySubject{}
			}
			if idx[a][r.object()] == nil {
				idx[a][r.object()] = bySubject{}
			}
			at := idx[a][r.object()]
			at[r.subject()] = append(at[r.subject()], r)
		}
	}
	return idx
}

// of gives for each action the slices whose rules' scopes may match the tool: those for itself,
// for its groups and for any tool. No rule outside them can match, since Cedar evaluates a
// policy's conditions only when its scope holds, and so none outside can fail either.
func (idx index) of(t *tool) map[broker.Action][]bySubject {
	relevant := map[broker.Action][]bySubject{}
	for action, byObject := range idx {
		keys := append([]cedar.EntityUID{{}, t.uid}, t.entity.Parents.Slice()...)
		for _, key := range keys {
			if rules, ok := byObject[key]; ok {
				relevant[action] = append(relevant[action], rules)
			}
		}
	}
	return relevant
}

// pick gives the rules for one principal out of slices.
func pick(slices []bySubject, subjects []cedar.EntityUID) (rules []*rule) {
	for _, s := range slices {
		for _, subject := range subjects {
			rules = append(rules, s[subject]...)
		}
	}
	return rules
}
