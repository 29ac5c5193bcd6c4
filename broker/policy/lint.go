package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/cedar-policy/cedar-go"
	scope "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/eval"
	"github.com/pawlsec/pawl/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxWrong is the most wrong policies that an error lists.
const maxWrong = 20

// check refuses policies that are valid Cedar but wrong: they can never match, or a condition always fails. A misspelt
// tool in a forbid lets through what it was meant to stop. It names all of them, each with its file and line.
func (p *Policy) check() error {
	if len(p.rules) == 0 {
		p.warnings = append(p.warnings, "the bundle has no policy, so everything is denied")
	}
	shape := p.shape()
	known := validators{}
	var wrong []error
	for _, r := range p.rules {
		found := p.lint(r, shape)
		if err := cmp.Or(checkConstant(r), p.checkTypes(r, known)); err != nil && len(found) == 0 {
			found = append(found, err.Error())
		}
		for _, text := range found {
			wrong = append(wrong, fmt.Errorf("%s: policy %q: %s", r.where, r.id, text))
		}
	}
	slices.SortStableFunc(wrong, func(a, b error) int { return cmp.Compare(a.Error(), b.Error()) })
	if more := len(wrong) - maxWrong; more > 0 {
		wrong = append(wrong[:maxWrong], fmt.Errorf("and %d more", more))
	}
	return errors.Join(wrong...)
}

// lint finds misspelt tools, actions, agents and context members.
func (p *Policy) lint(r *rule, shape fields) (found []string) {
	warn := func(format string, args ...any) {
		if text := fmt.Sprintf(format, args...); !slices.Contains(found, text) {
			found = append(found, text)
		}
	}
	p.lintScope(r, warn)
	for _, c := range r.scope().Conditions {
		scope.Inspect(scope.NewNode(c.Body), func(n scope.IsNode) bool {
			for _, text := range p.lintNode(n, shape) {
				warn("%s", text)
			}
			return true
		})
	}
	return found
}

// checkConstant refuses a condition that reads nothing of the question and does not hold.
func checkConstant(r *rule) error {
	for _, c := range r.scope().Conditions {
		constant := true
		scope.Inspect(scope.NewNode(c.Body), func(n scope.IsNode) bool {
			_, reads := n.(scope.NodeTypeVariable)
			constant = constant && !reads
			return constant
		})
		if !constant {
			continue
		}
		v, err := eval.Eval(c.Body, eval.Env{Entities: &world{tool: newTool(broker.Tool{})}})
		if err != nil {
			return fmt.Errorf("its condition always fails: %w", err)
		}
		if v != cedar.Boolean(c.Condition == scope.ConditionWhen) {
			return errors.New("can match nothing: its condition never holds")
		}
	}
	return nil
}

func (p *Policy) lintScope(r *rule, warn func(string, ...any)) {
	s := r.scope()
	subject := []cedar.EntityType{typeAgent, typeAgentGroup, typeTrustDomain}
	p.lintTarget("principal", s.Principal, subject, warn)
	p.lintTarget("resource", s.Resource, []cedar.EntityType{typeTool, typeToolGroup}, warn)
	if len(r.actions()) == 0 {
		warn("can match nothing: its scope names no Action")
	}
	for _, a := range r.actions() {
		if !slices.Contains(actions(), a) {
			warn("can match nothing with Action::%q: there is no such action", a)
		}
	}
}

// lintTarget checks one side of a scope. The first of types is the side's own type.
func (p *Policy) lintTarget(side string, s scope.IsScopeNode, types []cedar.EntityType, warn func(string, ...any)) {
	own := types[0]
	switch n := s.(type) {
	case scope.ScopeTypeIs:
		if n.Type != own {
			warn("can match nothing: %s is always %s, never %s", side, own, n.Type)
		}
	case scope.ScopeTypeIsIn:
		if n.Type != own {
			warn("can match nothing: %s is always %s, never %s", side, own, n.Type)
		}
	case scope.ScopeTypeEq:
		types = types[:1]
	}
	e := target(s)
	if e.IsZero() {
		return
	}
	if !slices.Contains(types, e.Type) {
		warn("can match nothing: %s cannot be %s", side, e)
	} else if why := p.unknown(e); why != "" {
		warn("can match nothing: %s", why)
	}
}

// unknown returns the reason why an entity cannot occur, or empty text if it can.
func (p *Policy) unknown(e cedar.EntityUID) string {
	id := string(e.ID)
	ok := true
	switch e.Type {
	case typeAgent:
		_, err := spiffeid.FromString(id)
		ok = err == nil
	case typeAgentGroup:
		ok = isGroup(id)
	case typeTrustDomain:
		td, err := spiffeid.TrustDomainFromString(id)
		ok = err == nil && td.Name() == id
	case typeTool:
		_, ok = p.tools[broker.ToolName(id)]
	case typeToolGroup:
		ok = false
		for _, t := range p.tools {
			ok = ok || t.entity.Parents.Contains(e)
		}
	case typeAction:
		ok = slices.Contains(actions(), broker.Action(id))
	default:
		ok = false
	}
	if ok {
		return ""
	}
	return fmt.Sprintf("%s does not exist", e)
}

// fields holds the members of a record by name. Nil fields are a plain value, or of unknown form.
type fields map[string]fields

func (p *Policy) lintNode(n scope.IsNode, shape fields) (found []string) {
	entity := func(v cedar.Value) {
		if e, ok := v.(cedar.EntityUID); ok && p.unknown(e) != "" {
			found = append(found, p.unknown(e))
		}
	}
	switch n := n.(type) {
	case scope.NodeValue:
		entity(n.Value)
		if set, ok := n.Value.(cedar.Set); ok {
			for v := range set.All() {
				entity(v)
			}
		}
	case scope.NodeTypeAccess:
		found = missing(n.StrOpNode, shape)
	case scope.NodeTypeHas:
		found = missing(n.StrOpNode, shape)
	case scope.NodeTypeContains:
		if name, ok := usedName(n.BinaryNode); ok && p.tools[broker.ToolName(name)] == nil {
			found = append(found, fmt.Sprintf("context.used never has %q: there is no such tool", name))
		}
	}
	return found
}

// usedName returns the tool in context.used.contains("tool").
func usedName(n scope.BinaryNode) (string, bool) {
	left, ok := n.Left.(scope.NodeTypeAccess)
	if !ok || left.Value != "used" {
		return "", false
	}
	v, ok := n.Right.(scope.NodeValue)
	if !ok {
		return "", false
	}
	name, ok := v.Value.(cedar.String)
	return string(name), ok
}

// missing returns a warning about a member that no request can have.
func missing(n scope.StrOpNode, shape fields) []string {
	where, names, ok := resolve(n.Arg, shape, maxShape)
	if !ok || names == nil {
		return nil
	}
	if _, has := names[string(n.Value)]; has {
		return nil
	}
	return []string{fmt.Sprintf("%s never has a member %q", where, n.Value)}
}

// maxShape limits how many members deep resolve goes.
const maxShape = 4

// resolve returns the members of the record that an expression like context.args denotes.
func resolve(n scope.IsNode, shape fields, deep int) (where string, names fields, ok bool) {
	switch n := n.(type) {
	case scope.NodeTypeVariable:
		names, ok = shape[string(n.Name)]
		return string(n.Name), names, ok
	case scope.NodeTypeAccess:
		if deep == 0 {
			return "", nil, false
		}
		where, names, ok = resolve(n.Arg, shape, deep-1)
		if !ok {
			return "", nil, false
		}
		names, ok = names[string(n.Value)]
		return where + "." + string(n.Value), names, ok
	}
	return "", nil, false
}
