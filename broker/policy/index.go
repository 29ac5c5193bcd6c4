package policy

import (
	"maps"
	"slices"

	"github.com/cedar-policy/cedar-go"
	"github.com/pawlsec/pawl/broker"
)

// bySubject holds rules by the principal entity in their scope ("==" or "in"). The zero entity holds the rules for
// any principal.
type bySubject map[cedar.EntityUID][]*rule

// index holds rules by action, then by the resource in their scope, then by the principal. A rule has one entry for
// each of its actions, so the size is linear. The scope of a rule found here matches, because rules that can match
// nothing are left out. Only the conditions remain to be evaluated.
type index map[broker.Action]map[cedar.EntityUID]bySubject

func newIndex(rules []*rule) index {
	idx := index{}
	for _, r := range rules {
		if !r.canMatch() {
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

// of returns for each action the rules with a scope that matches the tool: those for the tool itself, its groups and
// any tool. No other rule can match or fail, because Cedar evaluates a policy's conditions only when its scope matches.
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

// slice holds the rules for one action on one tool, by principal, and the context members that they read.
type slice struct {
	rules []bySubject
	reads reads
}

// pick returns the rules for one principal. The subjects are all its entities. The caller must not change the result.
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
