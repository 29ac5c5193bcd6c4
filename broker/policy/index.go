package policy

import (
	"maps"
	"slices"

	"github.com/cedar-policy/cedar-go"
	"github.com/pawlsec/pawl/broker"
)

// bySubject holds rules by the entity that their scope asks the principal to be or to be in.
// The zero entity holds those for any principal.
type bySubject map[cedar.EntityUID][]*rule

// index holds rules by action, then by what their scope asks of the resource, then of the
// principal. A rule stands in one place for each of its actions, so the size is linear. Whoever
// finds a rule in it knows that its scope holds, for rules that can match nothing are left out;
// only the conditions remain to be evaluated.
type index map[broker.Action]map[cedar.EntityUID]bySubject

func newIndex(rules []*rule) index {
	idx := index{}
	for _, r := range rules {
		if !r.matches() {
			continue
		}
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

// of gives for each action the slices whose rules' scopes match the tool: those for itself,
// for its groups and for any tool. No rule outside them can match, since Cedar evaluates a
// policy's conditions only when its scope holds, and so none outside can fail either.
func (idx index) of(t *tool) map[broker.Action]slice {
	relevant := map[broker.Action]slice{}
	for action, byObject := range idx {
		s := slice{reads: reads{}}
		for _, key := range append([]cedar.EntityUID{{}, t.uid}, t.entity.Parents.Slice()...) {
			rules, ok := byObject[key]
			if !ok {
				continue
			}
			s.rules = append(s.rules, rules)
			for _, r := range slices.Concat(slices.Collect(maps.Values(rules))...) {
				s.reads.add(r.reads)
			}
		}
		relevant[action] = s
	}
	return relevant
}

// slice is the rules whose scope matches one action on one tool, by the principal, and what they look at.
type slice struct {
	rules []bySubject
	reads reads
}

// pick gives the rules for one principal, which is all of the subjects. They must not be changed.
func (s slice) pick(subjects []cedar.EntityUID) []*rule {
	var room [16][]*rule
	found := room[:0]
	for _, one := range s.rules {
		for _, subject := range subjects {
			if list := one[subject]; len(list) > 0 {
				found = append(found, list)
			}
		}
	}
	if len(found) == 1 {
		return found[0]
	}
	return slices.Concat(found...)
}
